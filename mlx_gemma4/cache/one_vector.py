"""The cache of K=V global layers (26B-A4B, 31B): one vector per position and head, half the bytes, nothing lost.

In these layers, with u = k_proj(x) / rms(k_proj(x)):

    value = u                      key = RoPE(k_norm.weight * u)

so u is all there is to remember. How attention gets keys from it, tile by tile and without ever storing them, is
`kernels/key_form.py`. Never read a stored *key* as value: it carries weight and rotation.

Bytes: capacity * H_kv * D * itemsize per row, half of keys and values; the cos/sin table it needs is shared by all
layers (`Rope.table`, 512 bytes per position once per model).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from ..kernels.flash_attention import attend_one_vector
from ..kernels.key_form import KeyForm
from .base import View, write_at
from .full import GrowingCache


@dataclass(frozen=True)
class OneVectorView:
    vectors: mx.array  # [B, H_kv, T, D], position 0 first
    form: KeyForm
    q_start: int
    left_padding: tuple[int, ...] | None

    def attend(self, q: mx.array, scale: float = 1.0) -> mx.array:
        first = None if self.left_padding is None else mx.array(self.left_padding)
        return attend_one_vector(q, self.vectors, self.form, scale=scale, q_start=self.q_start, first_visible=first)


class OneVectorCache(GrowingCache):
    kind: ClassVar[str] = "global, one vector for key and value"
    _ARRAYS: ClassVar[tuple[str, ...]] = ("vectors",)

    def __init__(self, left_padding: Sequence[int] | None = None):
        super().__init__(left_padding)
        self.vectors: mx.array | None = None

    def append(self, vectors: mx.array, form: KeyForm) -> View:
        """Remembers u [B, H_kv, L, D]."""
        start = self.offset
        self.offset += vectors.shape[2]
        self.vectors = write_at(self._room(self.vectors, vectors), vectors, start)
        return OneVectorView(self.vectors[:, :, : self.offset], form, start, self.left_padding)
