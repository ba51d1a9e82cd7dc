"""Attention on codes in plain MLX ops: decodes a tile of positions, then the tiled softmax of `flash_attention.py`.

The reference of the kernel; what runs without Metal; and, with the kernel that decodes tiles, prefill everywhere.
Scratch is bounded as in `flash_attention.py`, whatever the context length: one tile of rows is decoded at a time.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import mlx.core as mx

from .flash_attention import MASKED, Reader, flash_attention_partial, wait_for
from .turboquant_decode import turboquant_decode

if TYPE_CHECKING:
    from ..turboquant_attention import CodedKeys


def turboquant_attention(
    q: mx.array,
    keys: "CodedKeys",
    values: "CodedKeys | None",
    rotary: "CodedKeys | None",
    q_rotary: mx.array | None,
    *,
    scale: float,
    start: int,
    length: int,
    first: mx.array | None,
    decode: Callable[..., mx.array] = turboquant_decode,
) -> tuple[mx.array, mx.array]:
    """As `turboquant_attention.turboquant_attention`, in the dtype of q; `decode` reads tiles of codes."""
    if length <= start:
        return mx.zeros(q.shape, mx.float32), mx.full(q.shape[:-1], MASKED, mx.float32)
    scored = [rows for rows in (keys, rotary) if rows is not None]

    def split(joined: mx.array) -> list[mx.array]:
        parts = mx.split(joined, [keys.codec.width], axis=-1) if rotary is not None else [joined]
        return [part * (scale * rows.codec.key_gain) for part, rows in zip(parts, scored, strict=True)]

    def read(begin: int, end: int, after: mx.array | None) -> tuple[list[mx.array], mx.array]:
        def tile(rows: "CodedKeys") -> mx.array:
            return decode(rows.codec, wait_for(rows.codes, after), rows.scales, start + begin, start + end, q.dtype)

        tiles = [tile(rows) for rows in scored]
        return tiles, tiles[0] if values is None else tile(values)

    reader = Reader(
        split=split,
        read=read,
        length=length - start,
        kv_heads=keys.codes.shape[1],
        rebuilt=sum(rows.codec.width for rows in (keys, values, rotary) if rows is not None),
    )
    # Every code lies before every query, so the queries stand at the end of the codes.
    joined = q if q_rotary is None else mx.concatenate([q, q_rotary.astype(q.dtype)], axis=-1)
    out, lse = flash_attention_partial(joined, reader, q_start=length, k_start=start, first_visible=first)
    return out * (keys if values is None else values).codec.value_gain, lse
