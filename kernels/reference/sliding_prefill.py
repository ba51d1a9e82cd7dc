"""Windowed attention in plain MLX ops, with or without images' blocks. [B, H, L, D] in, the same out.

Owns the case of images, where queries see ahead; without them a window is a matter of `flash_attention`. Which
positions an image's queries see is the caller's business: `reach`.

Memory: tiles of queries whose scores with all keys that one of them sees stay within TILE_ELEMENTS, as far as one
query's row allows.
"""

from typing import cast

import mlx.core as mx

from .flash_attention import MASKED, TILE_ELEMENTS, dot_products, flash_attention, plain_reader, tile_sizes, wait_for


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

    Query p sees key t when t > p - window, t >= first_visible[b] (int [B]) and t <= p, or, with `reach` (int [B, L],
    computed here to find the tiles), t < reach[b, p - q_start].
    """
    if reach is None:
        return flash_attention(
            q,
            plain_reader(keys, values),
            scale=scale,
            q_start=q_start,
            k_start=k_start,
            window=window,
            first_visible=first_visible,
        )
    B, H, L, D = q.shape
    kv_heads, T = keys.shape[1:3]
    ends = cast(list[int], reach.max(axis=0).tolist())
    furthest = max(end - (q_start + i) for i, end in enumerate(ends))
    rows, _ = tile_sizes(L, B, H, None, window)
    rows = max(1, min(rows, TILE_ELEMENTS // (B * H * (window + rows + furthest))))
    out: list[mx.array] = []
    for i in range(0, L, rows):
        tile = wait_for(q[:, :, i : i + rows], out[-1] if out else None)
        n = tile.shape[2]
        start = max(0, q_start + i - window + 1 - k_start)
        stop = min(T, max(ends[i : i + n]) - k_start)
        positions = mx.arange(k_start + start, k_start + stop)
        queries = mx.arange(q_start + i, q_start + i + n)[:, None]
        seen = (positions > queries - window) & (positions < reach[:, i : i + n, None])  # [B, n, keys]
        if first_visible is not None:
            seen = seen & (positions >= first_visible[:, None, None])
        scores = dot_products((tile * scale).reshape(B, kv_heads, -1, D), keys[:, :, start:stop])
        scores = mx.where(seen[:, None, None], scores.reshape(B, kv_heads, H // kv_heads, n, -1), MASKED)
        weights = mx.softmax(scores, axis=-1).astype(values.dtype).reshape(B, kv_heads, -1, stop - start)
        out.append((weights @ values[:, :, start:stop]).reshape(B, H, n, -1))
    return out[0] if len(out) == 1 else mx.concatenate(out, axis=2)
