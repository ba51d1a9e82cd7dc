"""Chooses how one attention call is computed: MLX's fused kernel where it exists, the tiled reference elsewhere.

Owns the choice; the arithmetic is in `reference/flash_attention.py`. Metal kernels of our own for 512-wide heads and
windowed prefill join here.
"""

import mlx.core as mx

from .reference.flash_attention import MASKED, Reader, dot_products, flash_attention, plain_reader

# Head widths for which MLX 0.32 has a fused single-query Metal kernel (mlx/backend/metal/scaled_dot_product_attention).
FUSED_DECODE_WIDTHS = (64, 96, 128, 256)


def attend(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float = 1.0,
    q_start: int,
    k_start: int = 0,
    window: int | None = None,
    first_visible: mx.array | None = None,
) -> mx.array:
    """Causal attention of q [B, H, L, D] over keys, values [B, H_kv, T, D] -> [B, H, L, D].

    Arguments as in `reference.flash_attention.flash_attention`.
    """
    if uses_fused_decode(q):
        mask = None
        if first_visible is not None:
            mask = (mx.arange(k_start, k_start + keys.shape[2]) >= first_visible[:, None])[:, None, None, :]
        return mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask=mask)
    return flash_attention(
        q,
        plain_reader(keys, values),
        scale=scale,
        q_start=q_start,
        k_start=k_start,
        window=window,
        first_visible=first_visible,
    )


def attend_ring(q: mx.array, keys: mx.array, values: mx.array, *, scale: float, visible: mx.array | None) -> mx.array:
    """One query [B, H, 1, D] over a ring in storage order; `visible` is boolean [B, T] or None for all."""
    if uses_fused_decode(q):
        mask = None if visible is None else visible[:, None, None, :]
        return mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask=mask)
    B, H, _, D = q.shape
    kv_heads = keys.shape[1]
    rows = (q * scale if scale != 1.0 else q).reshape(B, kv_heads, H // kv_heads, D)
    scores = dot_products(rows, keys)
    if visible is not None:
        scores = mx.where(visible[:, None, None, :], scores, MASKED)
    weights = mx.softmax(scores, axis=-1).astype(values.dtype)
    return (weights @ values).reshape(B, H, 1, D)


def attend_reader(
    q: mx.array, reader: Reader, *, scale: float, q_start: int, first_visible: mx.array | None
) -> mx.array:
    """As `attend`, for a cache that hands out its keys a tile at a time."""
    return flash_attention(q, reader, scale=scale, q_start=q_start, first_visible=first_visible)


def uses_fused_decode(q: mx.array) -> bool:
    return q.shape[2] == 1 and q.shape[3] in FUSED_DECODE_WIDTHS and mx.metal.is_available()
