"""The cache of K=V global layers (26B-A4B, 31B): one vector per position and head, half the bytes, nothing lost.

In these layers, with u = k_proj(x) / rms(k_proj(x)):

    value = u                      key = RoPE(k_norm.weight * u)

so u is all there is to remember. Only the rotated pairs of a key (64 of 256 for a 512-wide head) depend on the
position; for the rest the weight is folded into the query:

    q . key = (q * w)[still] . u[still]  +  q[rotated] . RoPE(w * u)[rotated]

The first product reads u as it lies, the second rebuilds a quarter of each key, a tile at a time. That is the form for
decoding; a prefill tile has so many queries that it rebuilds whole keys, once per tile, and takes one product. Never
read a stored *key* as value: it carries weight and rotation.

Bytes: capacity * H_kv * D * itemsize per row, half of keys and values; the cos/sin table it needs is shared by all
layers (`Rope.table`, 512 bytes per position once per model).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from ..kernels.flash_attention import attend_reader
from ..kernels.reference.flash_attention import Reader, wait_for
from ..models.rope import Rope, rotate_pairs
from .base import View, write_at
from .full import GrowingCache

# From this many query rows per KV head on, rebuilding whole keys costs less than the second product.
WHOLE_KEYS_FROM = 64


@dataclass(frozen=True)
class KeyForm:
    """How a layer's keys follow from its stored vectors. `weight` is k_norm's, [D]."""

    weight: mx.array
    rope: Rope

    def keys(self, u: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        """Whole keys [B, H_kv, T, D] of vectors u [B, H_kv, T, D] and their tables; what a plain cache would store."""
        # Weight and rotation in float32, one rounding, as `rebuild` does.
        return self.rope.rotate(u.astype(mx.float32) * self.weight.astype(mx.float32), cos, sin).astype(u.dtype)

    def rotated(self, u: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        """The rotated dimensions of the keys only, [B, H_kv, T, 2P]: first halves of the pairs, then second halves."""
        half, pairs = self.rope.width // 2, self.rope.pairs
        w = self.weight.astype(mx.float32)
        a = u[..., :pairs].astype(mx.float32) * w[:pairs]
        b = u[..., half : half + pairs].astype(mx.float32) * w[half : half + pairs]
        return mx.concatenate([*rotate_pairs(a, b, cos, sin)], axis=-1).astype(u.dtype)

    def split_query(self, q: mx.array) -> tuple[mx.array, mx.array]:
        """q [B, H, L, D] -> (q * w with the rotated dimensions zero [.., D], the rotated dimensions [.., 2P])."""
        half, pairs = self.rope.width // 2, self.rope.pairs
        index = mx.arange(self.rope.width) % half
        still = mx.where(index >= pairs, self.weight.astype(mx.float32), 0.0)
        rotated = mx.concatenate([q[..., :pairs], q[..., half : half + pairs]], axis=-1)
        return (q * still).astype(q.dtype), rotated


@dataclass(frozen=True)
class OneVectorView:
    vectors: mx.array  # [B, H_kv, T, D], position 0 first
    form: KeyForm
    q_start: int
    left_padding: tuple[int, ...] | None

    def attend(self, q: mx.array, scale: float = 1.0) -> mx.array:
        T = self.vectors.shape[2]
        cos, sin = self.form.rope.table(T)
        first_visible = None if self.left_padding is None else mx.array(self.left_padding)

        def tables(start: int, stop: int) -> tuple[mx.array, mx.array]:
            if first_visible is None:
                return cos[start:stop], sin[start:stop]
            rows = mx.maximum(mx.arange(start, stop) - first_visible[:, None], 0)  # [B, stop - start]
            return cos[rows][:, None], sin[rows][:, None]

        def read_parts(start: int, stop: int, after: mx.array | None) -> tuple[tuple[mx.array, mx.array], mx.array]:
            u = wait_for(self.vectors[:, :, start:stop], after)
            return (u, self.form.rotated(u, *tables(start, stop))), u

        def read_whole(start: int, stop: int, after: mx.array | None) -> tuple[tuple[mx.array], mx.array]:
            u = wait_for(self.vectors[:, :, start:stop], after)
            return (self.form.keys(u, *tables(start, stop)),), u

        kv_heads = self.vectors.shape[1]
        if q.shape[1] // kv_heads * q.shape[2] < WHOLE_KEYS_FROM:
            reader = Reader(self.form.split_query, read_parts, T, kv_heads, rebuilt=2 * self.form.rope.pairs)
        else:
            reader = Reader(lambda q: (q,), read_whole, T, kv_heads, rebuilt=self.form.rope.width)
        return attend_reader(q, reader, scale=scale, q_start=self.q_start, first_visible=first_visible)


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
