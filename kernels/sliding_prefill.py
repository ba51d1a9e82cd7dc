"""Windowed attention of many queries, images' blocks included: the Metal kernel or its reference.

Owns shapes and the launch. The rule that brings a call here is in `sliding_attention.py`.

Sizes. A threadgroup answers 8 * RT rows with RT simdgroups, and all of them add up each other's partial scores: 4 is
where that addition is still small beside the products and 32 rows share each byte of a key. Its threadgroup memory is
the rows' queries plus 256 * RT * RT * KT bytes of scores, at most STASH_BYTES + 8 KB.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx

from .backend import metal_kernel, use_metal
from .reference.sliding_prefill import sliding_prefill as reference

WIDTHS = (32, 64, 128, 256)
TYPES = (mx.float32, mx.float16, mx.bfloat16)
STASH_BYTES = 16 << 10  # threadgroup memory for queries
MAX_ROW_TILES = 4
KEY_TILES = 2  # 8 keys each, per step of the loop


def sliding_prefill(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float = 1.0,
    q_start: int,
    k_start: int = 0,
    window: int,
    first_visible: mx.array | None = None,
    reach: mx.array | None = None,
) -> mx.array:
    """Attention of q [B, H, L, D] at positions q_start + i over keys, values [B, H_kv, T, D] at k_start + j.

    Query p sees key t when t > p - window, t >= first_visible[b] (int32 [B]) and t <= p, or, with `reach` (int32
    [B, L]), t < reach[b, p - q_start]. The Metal kernel gives 0 for a query that sees nothing; the reference, numbers.
    """
    options = {
        "scale": scale,
        "q_start": q_start,
        "k_start": k_start,
        "window": window,
        "first_visible": first_visible,
        "reach": reach,
    }
    if fits_kernel(q, keys) and use_metal("sliding_prefill"):
        return differentiable(launch, reference)(q, keys, values, **options)
    return reference(q, keys, values, **options)


def launch(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    q_start: int,
    k_start: int,
    window: int,
    first_visible: mx.array | None,
    reach: mx.array | None,
) -> mx.array:
    """`sliding_prefill` on the Metal kernel."""
    B, H, L, D = q.shape
    kv_heads = keys.shape[1]
    G = H // kv_heads
    RT = row_tiles(G * L, D, q.dtype)
    kernel = metal_kernel(
        "sliding_prefill", ["q", "keys", "values", "start", "scale", "first", "reach"], ["out"], ["sliding"]
    )
    none = mx.zeros((1,), mx.int32)
    (out,) = kernel(
        inputs=[
            q,
            keys,
            values,
            mx.array([q_start, k_start, window], mx.int32),
            mx.array(scale * math.log2(math.e), mx.float32),
            none if first_visible is None else first_visible.astype(mx.int32),
            none if reach is None else reach.astype(mx.int32),
        ],
        template=[
            ("T", q.dtype),
            ("D", D),
            ("G", G),
            ("RT", RT),
            ("KT", KEY_TILES),
            ("PADDED", first_visible is not None),
            ("BLOCKS", reach is not None),
        ],
        grid=(32 * RT * -(-G * L // (8 * RT)), kv_heads, B),
        threadgroup=(32 * RT, 1, 1),
        output_shapes=[q.shape],
        output_dtypes=[q.dtype],
    )
    return out


def differentiable(launch: Callable[..., mx.array], reference: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """`launch(q, keys, values, **options)` with the gradients of `reference`: a kernel of ours has none for MLX."""

    def run(q: mx.array, keys: mx.array, values: mx.array, **options: Any) -> mx.array:
        @mx.custom_function
        def forward(q, keys, values):
            return launch(q, keys, values, **options)

        @forward.vjp
        def backward(primals, cotangent, _):
            return tuple(mx.vjp(lambda *x: reference(*x, **options), list(primals), [cotangent])[1])

        return cast(mx.array, forward(q, keys, values))

    return run


def fits_kernel(q: mx.array, keys: mx.array) -> bool:
    """Whether the sliding kernels take these widths and types."""
    return q.shape[3] in WIDTHS and q.dtype in TYPES and keys.dtype == q.dtype


def row_tiles(rows: int, width: int, dtype: mx.Dtype) -> int:
    """Tiles of 8 rows per threadgroup, a power of two: enough for all rows, within the limits above."""
    most = min(MAX_ROW_TILES, width // 16, STASH_BYTES // (8 * width * dtype.size))
    tiles = 1
    while tiles < most and 8 * tiles < rows:
        tiles *= 2
    return tiles
