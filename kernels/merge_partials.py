"""Joins attention over several segments of the keys into attention over all of them, by their log-sum-exp.

Owns the choice of path; the arithmetic is in `reference/merge_partials.py` and `metal/merge_partials.metal`. Who makes
partials: `flash_attention.attend_partial`, `turboquant_attention`, and the splits of its own kernel.
"""

import math

import mlx.core as mx

from . import backend
from .reference import merge_partials as reference

THREADS = 256  # per threadgroup of the kernel


def merge_partials(outs: mx.array, lses: mx.array) -> tuple[mx.array, mx.array]:
    """outs float32 [S, B, H, L, D], lses float32 [S, B, H, L] -> (out float32 [B, H, L, D], lse float32 [B, H, L]).

    outs[s] is normalised over what segment s saw and lses[s] = log(sum(exp(score))) there, so that
    out = sum_s exp(lses[s] - lse) outs[s] and lse = log(sum_s exp(lses[s])). A segment that saw nothing has out 0 and
    lse MASKED; where all saw nothing the result is the same again.
    """
    if not backend.use_metal("merge_partials"):
        return reference.merge_partials(outs, lses)
    _, *shape, D = outs.shape
    kernel = backend.metal_kernel("merge_partials", ["outs", "lses"], ["out", "lse"])
    out, lse = kernel(
        inputs=[outs, lses],
        template=[],
        grid=(D, math.prod(shape), 1),
        threadgroup=(min(D, THREADS), 1, 1),
        output_shapes=[(*shape, D), tuple(shape)],
        output_dtypes=[mx.float32, mx.float32],
    )
    return out, lse
