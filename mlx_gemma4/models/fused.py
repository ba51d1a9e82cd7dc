"""Elementwise pieces of the graph, fused into one kernel where the machine can.

Each computes in float32 and rounds once at its end: inside a kernel that costs nothing, and a bfloat16 model comes a
fifth closer to the float32 one (KL).

`mx.compile` fuses on Metal; on a CPU it calls g++ at run time and, where there is none, runs the operations one by one.
"""

import math
from functools import partial

import mlx.core as mx

ROOT_2_OVER_PI = math.sqrt(2.0 / math.pi)

# Shapeless: one compilation serves every batch and chunk length.
fused = partial(mx.compile, shapeless=True)


@fused
def geglu(gate: mx.array, x: mx.array) -> mx.array:
    """gelu_tanh(gate) * x, elementwise, in x's dtype."""
    g = gate.astype(mx.float32)
    # Products for the cube: as a power it costs as much as the tanh.
    gelu = 0.5 * g * (1.0 + mx.tanh(ROOT_2_OVER_PI * (g + 0.044715 * (g * g * g))))
    return (gelu * x).astype(x.dtype)


@fused
def soft_cap(cap: float, x: mx.array) -> mx.array:
    """cap * tanh(x / cap), elementwise, in float32 whatever x is: bfloat16 would merge logits near the cap."""
    return mx.tanh(x.astype(mx.float32) / cap) * cap
