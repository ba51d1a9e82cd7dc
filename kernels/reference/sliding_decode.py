"""Windowed attention of a few queries over keys in storage order, in plain MLX ops: a window is one tile."""

import mlx.core as mx

from .flash_attention import MASKED, dot_products


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

    Slot s < used holds position newest - (newest_slot - s) mod capacity. Query p sees key t when t <= p,
    t > p - window and t >= first_visible[b] (int [B]).
    """
    B, H, L, D = q.shape
    kv_heads, capacity = keys.shape[1:3]
    keys, values = keys[:, :, :used], values[:, :, :used]
    scores = dot_products((q * scale if scale != 1.0 else q).reshape(B, kv_heads, H // kv_heads * L, D), keys)
    if L > 1 or used > window or first_visible is not None:
        positions = newest - (newest_slot - mx.arange(used)) % capacity
        queries = mx.arange(newest - L + 1, newest + 1)[:, None]
        seen = ((positions <= queries) & (positions > queries - window))[None]  # [1, L, used]
        if first_visible is not None:
            seen = seen & (positions >= first_visible[:, None, None])
        scores = mx.where(seen[:, None, None], scores.reshape(B, kv_heads, H // kv_heads, L, used), MASKED)
        scores = scores.reshape(B, kv_heads, -1, used)
    weights = mx.softmax(scores, axis=-1).astype(values.dtype)
    return (weights @ values).reshape(B, H, L, D)
