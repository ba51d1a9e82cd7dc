"""The plain cache of global layers with separate keys and values (E2B, E4B): everything since the start.

Worked example, growing by 256 positions: 5 tokens prefilled allocate 256 slots and use 5; token 257 allocates the next
step. Past 4,096 positions a decode step that overflows adds a sixteenth of the capacity, so copies stay rare; a
prefilled chunk allocates exactly what it needs, rounded up to 256.

Bytes: capacity * 2 * H_kv * D * itemsize per row.
"""

from collections.abc import Sequence
from typing import ClassVar

import mlx.core as mx

from .base import LayerCache, Snapshot, View, room_for, write_at
from .sliding import ChunkView

STEP = 256


def grown_capacity(old: int, needed: int, new: int) -> int:
    """Slots to allocate when `old` do not hold `needed`, of which `new` are being appended."""
    step = STEP if new > 1 else max(STEP, old // 16 // STEP * STEP)
    return -(-needed // step) * step if step == STEP else max(needed, old + step)


class GrowingCache(LayerCache):
    """What caches that keep every position share: nothing is overwritten, so going back is forgetting the end."""

    def size(self) -> int:
        return self.offset

    def saved(self) -> dict[str, mx.array]:
        return {name: a[:, :, : self.offset] for name, a in self.contents().items()}

    def is_trimmable(self, n: int = 1) -> bool:
        return n <= self.offset

    def snapshot(self) -> Snapshot:
        # The length is all there is to remember, as long as nothing before it is overwritten.
        return Snapshot(self.offset, len(self._truncations))

    def restore(self, snapshot: Snapshot) -> None:
        self._check_alive(snapshot)
        self.trim(self.offset - snapshot.offset)

    def _room(self, buffer: mx.array | None, new: mx.array) -> mx.array:
        """`buffer` with slots for all positions up to self.offset, of which `new` [B, H_kv, L, D] are the last."""
        have = 0 if buffer is None else buffer.shape[2]
        if buffer is not None and self.offset <= have:
            return buffer
        return room_for(buffer, new.shape, new.dtype, grown_capacity(have, self.offset, new.shape[2]))


class GlobalCache(GrowingCache):
    kind: ClassVar[str] = "global keys and values"
    _ARRAYS: ClassVar[tuple[str, ...]] = ("keys", "values")

    def __init__(self, left_padding: Sequence[int] | None = None):
        super().__init__(left_padding)
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def append(self, keys: mx.array, values: mx.array) -> View:
        """Remembers keys after RoPE and values, [B, H_kv, L, D]."""
        start = self.offset
        self.offset += keys.shape[2]
        self.keys = write_at(self._room(self.keys, keys), keys, start)
        self.values = write_at(self._room(self.values, values), values, start)
        n = self.offset
        return ChunkView(self.keys[:, :, :n], self.values[:, :, :n], start, 0, None, self.first_visible)
