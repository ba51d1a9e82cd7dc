"""Attention of sliding layers: which way one call goes, and what the queries of images may see ahead.

On Metal, for widths and types that `sliding_prefill.fits_kernel` names:

    one query over the ring          MLX's fused single-query kernel, well tuned, whatever the order of the keys
    the same with padding to hide    sliding_decode: it finds the padding itself, where MLX's reads a mask
    2 to DECODE_QUERIES in order     sliding_decode: the window is split among simdgroups, and read once for all queries
    more, or images                  sliding_prefill: MLX has nothing fused at 256 and computes all L x T scores

Elsewhere the references of the same names. Owns these rules and `block_reach`; the kernels' own files own shapes and
launches, `cache/sliding.py` the ring.
"""

import mlx.core as mx

from . import sliding_decode as decode
from . import sliding_prefill as prefill

# Head widths for which MLX 0.32 has a fused single-query Metal kernel (mlx/backend/metal/scaled_dot_product_attention).
FUSED_DECODE_WIDTHS = (64, 96, 128, 256)
# Queries that are worth a kernel that keeps all of them in one tile: the steps that verify a draft.
DECODE_QUERIES = 8


def attend_chunk(
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
    """Queries q [B, H, L, D] over keys, values [B, H_kv, T, D] in order of position, of which the last L are the
    queries' own -> [B, H, L, D]. Arguments as in `sliding_prefill`; `reach` comes from `block_reach`.
    """
    if reach is None and q.shape[2] <= DECODE_QUERIES and decode.runs_on_metal(q, keys):
        T = keys.shape[2]
        return decode.sliding_decode(
            q,
            keys,
            values,
            scale=scale,
            newest=k_start + T - 1,
            newest_slot=T - 1,
            used=T,
            window=window,
            first_visible=first_visible,
        )
    return prefill.sliding_prefill(
        q,
        keys,
        values,
        scale=scale,
        q_start=q_start,
        k_start=k_start,
        window=window,
        first_visible=first_visible,
        reach=reach,
    )


def attend_ring(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float = 1.0,
    newest: int,
    window: int,
    first_visible: mx.array | None = None,
) -> mx.array:
    """One query q [B, H, 1, D] at position `newest` over whole ring buffers [B, H_kv, capacity, D] -> [B, H, 1, D].

    Position p lies in slot p % window; a ring that is still growing has fewer than `window` slots and has not wrapped.
    `first_visible` int32 [B] or None where no row's padding is in the ring any more.
    """
    used = min(newest + 1, window)
    if first_visible is None and q.shape[3] in FUSED_DECODE_WIDTHS and mx.metal.is_available():
        return mx.fast.scaled_dot_product_attention(q, keys[:, :, :used], values[:, :, :used], scale=scale)
    return decode.sliding_decode(
        q,
        keys,
        values,
        scale=scale,
        newest=newest,
        newest_slot=newest % window,
        used=used,
        window=window,
        first_visible=first_visible,
    )


def block_reach(blocks: mx.array, q_start: int) -> mx.array:
    """One past the last position that each query of a step may see: int32 [B, L].

    blocks: integer [B, L], the number of the image (or video frame) that the step's positions belong to, negative for
    text. An image's positions see each other in both directions, in sliding layers only and still no further back than
    the window (transformers, models/gemma4/modeling_gemma4.py, `create_masks_for_vision_model`:
    AND(sliding window, OR(causal, same block)), the window's side ahead being open). Runs of one number are one image,
    as transformers counts them (`get_block_sequence_ids_for_mask`). What an image's positions saw in an earlier step is
    done: steps must not end inside an image.
    """
    B, L = blocks.shape
    ends = mx.arange(1, L + 1, dtype=mx.int32)
    goes_on = (blocks[:, 1:] == blocks[:, :-1]) & (blocks[:, 1:] >= 0)
    goes_on = mx.concatenate([goes_on, mx.zeros((B, 1), mx.bool_)], axis=1)
    # The nearest end of a run at or after each position.
    return q_start + mx.cummin(mx.where(goes_on, L, ends), axis=1, reverse=True)
