"""Elementwise pieces of the graph, fused into one kernel where the machine can.

`mx.compile` fuses on Metal always; on a CPU it calls a C++ compiler at run time and fails where there is none, so there
the plain functions run when no compiler is found.
"""

import shutil
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

CAN_FUSE = mx.metal.is_available() or shutil.which("g++") is not None


def fused(function: Callable) -> Callable:
    return mx.compile(function, shapeless=True) if CAN_FUSE else function


@fused
def geglu(gate: mx.array, x: mx.array) -> mx.array:
    """gelu_tanh(gate) * x, elementwise."""
    return nn.gelu_approx(gate) * x


@fused
def soft_cap(cap: float, x: mx.array) -> mx.array:
    """cap * tanh(x / cap), elementwise."""
    return mx.tanh(x / cap) * cap
