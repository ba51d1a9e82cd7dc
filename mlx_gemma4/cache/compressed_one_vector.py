"""The compressed cache of K=V global layers (26B-A4B, 31B): one coded vector per position, read as key and as value.

With u as in `one_vector.py`, value = u and key = RoPE(w * u). Two rows are coded per position and KV head:

    vectors    u, D wide, without scale: its mean square is 1
    rotated    the rotated dimensions of the key, after RoPE: 128 of a 512-wide head, with their scale

    score = (q * w)[still] . u[still]  +  q[rotated] . rotated

The first product runs over all of the coded u, since the query is zero where it is not to count; so no position enters
and no weight. 640 coded coordinates stand for 1,024 numbers: 2.20 bits each at 3.5. Rebuilding the rotated dimensions
from the codes of u would save the second row, at the price of a rotation per position read.

Segments, blocks and sinks are as in `compressed.py`; exact rows hold u, from which keys are rebuilt. The rotated row is
padded with zeros to a power of two, at least 32, where a small model rotates fewer.

Bytes: H_kv * (SINKS + TAIL) * D * itemsize exact, and H_kv * (4 * words of both + 2) per coded position: 2,820 in
26B-A4B and 11,280 in 31B at 3.5 bits over all layers, where 16 bits take 10,240 and 40,960 (20,480 and 81,920 as keys
and values).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from ..kernels.flash_attention import attend_partial
from ..kernels.key_form import KeyForm
from ..kernels.turboquant import Codec, unrotate
from ..kernels.turboquant_attention import CodedKeys, turboquant_attention
from .base import View
from .blocks import SINKS, BlockCache, Rows, code_capacity
from .coded import CodedRows
from .compressed import Segments, by_tiles, merged, turned
from .one_vector import OneVectorView

LEAST_WIDTH = 32  # of the codec


def rotated_width(pairs: int) -> int:
    """Width of the coded row of a key's rotated dimensions, for `pairs` rotated pairs."""
    return max(LEAST_WIDTH, 1 << (2 * pairs - 1).bit_length())


def padded(x: mx.array, width: int) -> mx.array:
    """x [..., n] with zeros up to [..., width]."""
    missing = width - x.shape[-1]
    return mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def tables(form: KeyForm, positions: mx.array) -> tuple[mx.array, mx.array]:
    """cos and sin for keys at `positions` [n] or [B, n]; padded positions get those of 0.

    Computed, not looked up: a table of the whole context (`Rope.table`) would be a seventh of this cache.
    """
    cos, sin = form.rope.angles(mx.maximum(positions, 0))
    return (cos[:, None], sin[:, None]) if positions.ndim == 2 else (cos, sin)


@dataclass(frozen=True)
class CompressedOneVectorView:
    vectors: mx.array  # exact u, [B, H_kv, T, D]: sinks, tail and this step's
    form: KeyForm
    coded_vectors: CodedKeys
    coded_rotated: CodedKeys
    at: Segments

    def attend(self, q: mx.array, scale: float = 1.0) -> mx.array:
        keys = self.form.keys(self.vectors, *self._exact_tables())
        return by_tiles(q, lambda rows, first: self._attend(rows, keys, first, scale))

    def _attend(self, q: mx.array, keys: mx.array, first: int, scale: float) -> mx.array:
        exact = attend_partial(
            q,
            keys,
            self.vectors,
            scale=scale,
            q_start=self.at.q_start + first,
            k_start=self.at.k_start,
            visible=self.at.exact_visible(self.vectors.shape[2]),
        )
        still, moving = self.form.split_query(q)
        u, r = self.coded_vectors.codec, self.coded_rotated.codec
        out, lse = turboquant_attention(
            turned(u, still),
            self.coded_vectors,
            None,
            self.coded_rotated,
            turned(r, padded(moving, r.width)),
            scale=scale,
            start=SINKS,
            length=self.at.coded,
            first=self.at.first_code,
        )
        return merged([exact, (unrotate(u, out), lse)], q.dtype)

    def _exact_tables(self) -> tuple[mx.array, mx.array]:
        stop = self.at.coded + self.vectors.shape[2] - SINKS
        sinks, tail = mx.arange(SINKS), mx.arange(self.at.coded, stop)
        if self.at.left_padding is not None:
            padding = mx.array(self.at.left_padding)[:, None]
            sinks, tail = mx.broadcast_to(sinks, (len(self.at.left_padding), SINKS)), tail - padding
        return tables(self.form, mx.concatenate([sinks, tail], axis=-1))


class CompressedOneVectorCache(BlockCache):
    kind: ClassVar[str] = "global, one vector for key and value"

    def __init__(self, vector_codec: Codec, rotated_codec: Codec, left_padding: Sequence[int] | None = None):
        super().__init__(left_padding)
        self.vectors = CodedRows("vectors", vector_codec, unit=True)
        self.rotated = CodedRows("rotated", rotated_codec, unit=False)
        self.rows = (self.vectors, self.rotated)

    def append(self, vectors: mx.array, form: KeyForm) -> View:
        """Remembers u [B, H_kv, L, D]."""
        start, coded = self.offset, self.coded
        rows, lead = self._take_in((vectors,))
        view: View
        if coded:
            at = Segments(start, coded, self.left_padding)
            view = CompressedOneVectorView(rows[0], form, self.vectors.held(), self.rotated.held(), at)
        else:
            view = OneVectorView(rows[0], form, start, self.left_padding)

        def code(block: Rows, first: int) -> None:
            (u,) = block
            stop = first + u.shape[2]
            capacity = code_capacity(self.vectors.capacity, stop, vectors.shape[2])
            positions = mx.arange(first, stop)
            if self.left_padding is not None:
                positions = positions - mx.array(self.left_padding)[:, None]
            self.vectors.write(u, first, capacity)
            rotated = form.rotated(u, *tables(form, positions))
            self.rotated.write(padded(rotated, self.rotated.codec.width), first, capacity)

        self._code_blocks(rows, lead, code)
        return view
