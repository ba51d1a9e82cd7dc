"""Merging of partial attention in plain MLX ops: the reference of the kernel, and what runs without Metal."""

import mlx.core as mx


def merge_partials(outs: mx.array, lses: mx.array) -> tuple[mx.array, mx.array]:
    """As `merge_partials.merge_partials`."""
    # Against the largest, which is finite even if it is MASKED: no weight overflows and at least one is 1.
    peak = lses.max(axis=0)
    weights = mx.exp(lses - peak)
    total = weights.sum(axis=0)
    return (weights[..., None] * outs).sum(axis=0) / total[..., None], peak + mx.log(total)
