"""The cache of sliding layers: a ring of the last `window` positions, whatever the context.

Worked example, window 4. Slot of position p is p % 4:

    append 3 tokens (0 1 2)    slots [0 1 2]        grows until the window is full
    append 1 token  (3)        slots [0 1 2 3]
    append 1 token  (4)        slots [4 1 2 3]      decode: written in place, seen in storage order
    append 3 tokens (5 6 7)    the view is [2 3 4 | 5 6 7]: a query at 5 sees 2..5, one at 7 sees 4..7
                               slots [4 5 6 7]      then the last 4 are kept

Bytes: at most window * 2 * H_kv * D * itemsize per row, plus the chunk in flight while a chunk is prefilled. Keys are
stored after RoPE, so the order of slots does not matter to a single query.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx

from ..kernels.flash_attention import attend
from ..kernels.sliding_attention import attend_chunk, attend_ring
from .base import LayerCache, Snapshot, View, room_for, write_at

STEP = 256  # slots added at a time until the ring is full


@dataclass(frozen=True)
class ChunkView:
    """Keys and values [B, H_kv, T, D] in order of position, the first at k_start; queries begin at q_start."""

    keys: mx.array
    values: mx.array
    q_start: int
    k_start: int
    window: int | None  # None: a global layer
    first_visible: mx.array | None

    def attend(self, q: mx.array, scale: float = 1.0, reach: mx.array | None = None) -> mx.array:
        where = {"q_start": self.q_start, "k_start": self.k_start, "first_visible": self.first_visible}
        if self.window is None:
            return attend(q, self.keys, self.values, scale=scale, **where)
        return attend_chunk(q, self.keys, self.values, scale=scale, window=self.window, reach=reach, **where)


@dataclass(frozen=True)
class RingView:
    """A full or growing ring in storage order, whole buffers, for one query that sees all of it but padding."""

    keys: mx.array
    values: mx.array
    newest: int  # its position, which is the query's
    window: int
    first_visible: mx.array | None  # int [B]; None when no padding is in the ring

    def attend(self, q: mx.array, scale: float = 1.0) -> mx.array:
        return attend_ring(
            q,
            self.keys,
            self.values,
            scale=scale,
            newest=self.newest,
            window=self.window,
            first_visible=self.first_visible,
        )


class SlidingCache(LayerCache):
    kind: ClassVar[str] = "sliding ring"
    _ARRAYS: ClassVar[tuple[str, ...]] = ("keys", "values")

    def __init__(self, window: int, left_padding: Sequence[int] | None = None):
        super().__init__(left_padding)
        self.window = window
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def size(self) -> int:
        return min(self.offset, self.window)

    def append(self, keys: mx.array, values: mx.array) -> View:
        """Remembers [B, H_kv, L, D]; the view serves the L queries of the same positions."""
        start = self.offset
        self.offset += keys.shape[2]
        if keys.shape[2] == 1:
            return self._append_one(keys, values, start)
        return self._append_chunk(keys, values, start)

    def _append_one(self, keys: mx.array, values: mx.array, position: int) -> RingView:
        slot = position % self.window
        if self.keys is None or slot >= self.keys.shape[2]:
            capacity = self._capacity(slot + 1)
            self.keys = room_for(self.keys, keys.shape, keys.dtype, capacity)
            self.values = room_for(self.values, values.shape, values.dtype, capacity)
        assert self.values is not None
        self.keys = write_at(self.keys, keys, slot)
        self.values = write_at(self.values, values, slot)
        return RingView(self.keys, self.values, position, self.window, self._padding_left())

    def _capacity(self, needed: int) -> int:
        return min(self.window, -(-needed // STEP) * STEP)

    def _padding_left(self) -> mx.array | None:
        """`first_visible`, or None when every padded position has left the ring."""
        if self.left_padding is None or max(self.left_padding) <= self.offset - self.size():
            return None
        return self.first_visible

    def _append_chunk(self, keys: mx.array, values: mx.array, start: int) -> ChunkView:
        kept = min(start, self.window - 1)
        keys = self._in_order(self.keys, start, kept, keys)
        values = self._in_order(self.values, start, kept, values)
        view = ChunkView(keys, values, start, start - kept, self.window, self.first_visible)
        self.keys = self._as_ring(keys)
        self.values = self._as_ring(values)
        return view

    def _in_order(self, ring: mx.array | None, offset: int, kept: int, new: mx.array) -> mx.array:
        """The last `kept` positions before `offset`, then `new`, by position."""
        if ring is None or kept == 0:
            return new
        first, last = (offset - kept) % self.window, (offset - 1) % self.window
        if first <= last:
            return mx.concatenate([ring[:, :, first : last + 1], new], axis=2)
        return mx.concatenate([ring[:, :, first : self.window], ring[:, :, : last + 1], new], axis=2)

    def _as_ring(self, ordered: mx.array) -> mx.array:
        """The last `window` of `ordered` (which ends at self.offset), each at its slot."""
        if self.offset <= self.window:
            return room_for(ordered, ordered.shape, ordered.dtype, self._capacity(self.offset))
        first_slot = self.offset % self.window  # slot of the oldest position kept
        last = ordered[:, :, -self.window :]
        split = self.window - first_slot
        return mx.concatenate([last[:, :, split:], last[:, :, :split]], axis=2)

    def is_trimmable(self, n: int = 1) -> bool:
        # Past the window, older positions have been overwritten and cannot come back.
        return n <= self.offset <= self.window

    def snapshot(self) -> Snapshot:
        # Holding the arrays is enough: MLX copies an array that is written to while something else holds it.
        return Snapshot(self.offset, len(self._truncations), tuple(self._arrays()))

    def _check_alive(self, snapshot: Snapshot) -> None:
        pass  # it holds all it needs

    def restore(self, snapshot: Snapshot) -> None:
        self.keys, self.values = snapshot.arrays if snapshot.arrays else (None, None)
        self.offset = snapshot.offset

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"window": self.window}

    def status(self) -> str:
        return f"{super().status()}, window {self.window}"
