"""Tile decode in plain MLX ops: the rows asked for, through the codec's own decoder."""

from typing import TYPE_CHECKING

import mlx.core as mx

from .turboquant import decode

if TYPE_CHECKING:
    from ..turboquant import Codec


def turboquant_decode(
    codec: "Codec",
    codes: mx.array,
    scales: mx.array | None,
    start: int,
    stop: int,
    dtype: mx.Dtype,
    gain: float = 1.0,
) -> mx.array:
    """As `turboquant_decode.turboquant_decode`."""
    part = None if scales is None else scales[:, :, start:stop]
    return decode(codec, codes[:, :, start:stop], part, dtype, gain)
