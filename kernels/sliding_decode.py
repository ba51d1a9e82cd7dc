"""Windowed attention of a few queries over keys in storage order: the Metal kernel or its reference.

Owns shapes and the launch. The rule that brings a call here is in `sliding_attention.py`.

Sizes. A threadgroup has SIMDGROUPS simdgroups for all rows of a KV head (up to 32, 16 at float32 and 256 wide; further
rows go to further threadgroups and read the keys again). RT of them share the columns, the others share the slots, so
that a window of 1,024 needs no split between threadgroups. Threadgroup memory: the queries plus 8.5 KB.
"""

import math

import mlx.core as mx

from .backend import metal_kernel, use_metal
from .reference.sliding_decode import sliding_decode as reference
from .sliding_prefill import differentiable, fits_kernel, row_tiles

SIMDGROUPS = 8
SCORE_TILES = 4  # 8x8 matrices of scores that a simdgroup computes at a time


def sliding_decode(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float = 1.0,
    newest: int,
    newest_slot: int,
    used: int,
    window: int,
    first_visible: mx.array | None = None,
) -> mx.array:
    """Attention of q [B, H, L, D] at positions newest - L + 1 + i over whole buffers [B, H_kv, capacity, D].

    Slot s < used holds position newest - (newest_slot - s) mod capacity: a ring of `window` slots for one query, of at
    least window + L - 1 for more, or positions in order with the newest in the last slot. Query p sees key t when
    t <= p, t > p - window and t >= first_visible[b] (int32 [B]). The Metal kernel gives 0 for a query that sees
    nothing; the reference, numbers.
    """
    run = differentiable(launch, reference) if runs_on_metal(q, keys) else reference
    return run(
        q,
        keys,
        values,
        scale=scale,
        newest=newest,
        newest_slot=newest_slot,
        used=used,
        window=window,
        first_visible=first_visible,
    )


def runs_on_metal(q: mx.array, keys: mx.array) -> bool:
    """Whether `sliding_decode` launches its kernel for these now; asks the switch, which records the answer."""
    return fits_kernel(q, keys) and use_metal("sliding_decode")


def launch(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    newest: int,
    newest_slot: int,
    used: int,
    window: int,
    first_visible: mx.array | None,
) -> mx.array:
    """`sliding_decode` on the Metal kernel."""
    B, H, L, D = q.shape
    kv_heads = keys.shape[1]
    G = H // kv_heads
    RT = row_tiles(G * L, D, q.dtype)
    kernel = metal_kernel("sliding_decode", ["q", "keys", "values", "start", "scale", "first"], ["out"], ["sliding"])
    (out,) = kernel(
        inputs=[
            q,
            keys,
            values,
            mx.array([newest, newest_slot, used, window], mx.int32),
            mx.array(scale * math.log2(math.e), mx.float32),
            mx.zeros((1,), mx.int32) if first_visible is None else first_visible.astype(mx.int32),
        ],
        template=[
            ("T", q.dtype),
            ("D", D),
            ("G", G),
            ("RT", RT),
            ("KT", SCORE_TILES // RT),
            ("KS", SIMDGROUPS // RT),
            ("PADDED", first_visible is not None),
        ],
        grid=(32 * SIMDGROUPS * -(-G * L // (8 * RT)), kv_heads, B),
        threadgroup=(32 * SIMDGROUPS, 1, 1),
        output_shapes=[q.shape],
        output_dtypes=[q.dtype],
    )
    return out
