"""Attention of few queries in plain MLX ops: which reader serves; tiles and softmax are `flash_attention.py`'s."""

import mlx.core as mx

from ..key_form import KeyForm, reader_of
from .flash_attention import flash_attention_partial


def flash_decode(
    q: mx.array,
    keys: mx.array,
    values: mx.array | None,
    form: KeyForm | None = None,
    *,
    scale: float = 1.0,
    q_start: int,
    k_start: int = 0,
    first_visible: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """As `flash_decode.flash_decode`."""
    reader = reader_of(q, keys, values, form, first_visible)
    where = {"q_start": q_start, "k_start": k_start, "first_visible": first_visible}
    return flash_attention_partial(q, reader, scale=scale, **where)
