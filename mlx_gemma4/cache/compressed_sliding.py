"""A sliding layer's ring as codes: an explicit choice (`kv_bits_sliding`), since the window is bounded anyway.

Blocks of 64 positions in ring order, slot of position p is p % capacity with the window rounded up to whole blocks;
behind them the exact tail of `blocks.py`, without sinks, which leave a window. One query attends to the tail exactly
and to the codes where they lie, in one or two segments of the ring. Several queries see different windows: for them
the coded part of the window is decoded, never more than `window` positions.

Worked example, window 512: capacity 512. After 1,000 positions the tail holds 896 to 999 and the ring the codes of 384
to 895, of which the next query, at 1,000, sees 489 to 895. Trimming within the tail is exact, since a window before its
first position is still there.

Worth it only for windows beyond the tail; `make_cache` leaves smaller ones as they are.

Bytes: H_kv * (2 * TAIL * D * itemsize + capacity * (4 * (key words + value words) + 2)).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx

from ..kernels.flash_attention import attend_partial
from ..kernels.turboquant import Codec, unrotate
from ..kernels.turboquant_attention import CodedKeys, turboquant_attention
from .base import Snapshot, View
from .blocks import BLOCK, TAIL, BlockCache, BlockSnapshot, Rows
from .coded import CodedRows, decoded
from .compressed import merged, turned
from .sliding import ChunkView


def ring_capacity(window: int) -> int:
    """Slots for codes of a window."""
    return -(-window // BLOCK) * BLOCK


@dataclass(frozen=True)
class CompressedRingView:
    keys: mx.array  # exact, [B, H_kv, T, D]: tail and this step's
    values: mx.array
    coded_keys: CodedKeys
    coded_values: CodedKeys
    q_start: int
    coded: int  # position of the first exact row
    window: int
    left_padding: tuple[int, ...] | None

    def attend(self, q: mx.array, scale: float = 1.0, reach: mx.array | None = None) -> mx.array:
        first_visible = None if self.left_padding is None else mx.array(self.left_padding, mx.int32)
        oldest = max(0, self.q_start - self.window + 1)
        if q.shape[2] > 1:
            keys, values = self._whole_window(oldest)
            return ChunkView(keys, values, self.q_start, oldest, self.window, first_visible).attend(q, scale, reach)
        exact = attend_partial(
            q,
            self.keys,
            self.values,
            scale=scale,
            q_start=self.q_start,
            k_start=self.coded,
            window=self.window,
            first_visible=first_visible,
        )
        parts = [exact]
        rotated = turned(self.coded_keys.codec, q)
        for start, stop, position in self._pieces(oldest):
            first = None if first_visible is None else first_visible - (position - start)
            out, lse = turboquant_attention(
                rotated,
                self.coded_keys,
                self.coded_values,
                None,
                None,
                scale=scale,
                start=start,
                length=stop,
                first=first,
            )
            parts.append((unrotate(self.coded_values.codec, out), lse))
        return merged(parts, q.dtype)

    def _pieces(self, oldest: int) -> list[tuple[int, int, int]]:
        """Positions oldest .. coded as (first slot, end slot, position of the first slot) in order of position."""
        capacity = ring_capacity(self.window)
        pieces = []
        while oldest < self.coded:
            slot = oldest % capacity
            n = min(self.coded - oldest, capacity - slot)
            pieces.append((slot, slot + n, oldest))
            oldest += n
        return pieces

    def _whole_window(self, oldest: int) -> tuple[mx.array, mx.array]:
        """Keys and values from position `oldest` to the end of the step."""
        slots = [(start, stop) for start, stop, _ in self._pieces(oldest)]
        both = []
        for rows, gain, exact in (
            (self.coded_keys, self.coded_keys.codec.key_gain, self.keys),
            (self.coded_values, self.coded_values.codec.value_gain, self.values),
        ):
            past = [decoded(rows, slots, gain, exact.dtype)] if slots else []
            # A window may begin within the tail.
            both.append(mx.concatenate([*past, exact[:, :, max(0, oldest - self.coded) :]], axis=2))
        return both[0], both[1]


class CompressedSlidingCache(BlockCache):
    kind: ClassVar[str] = "sliding ring"
    sinks: ClassVar[int] = 0

    def __init__(self, window: int, key_codec: Codec, value_codec: Codec, left_padding: Sequence[int] | None = None):
        super().__init__(left_padding)
        self.window = window
        self.keys = CodedRows("keys", key_codec, unit=False)
        self.values = CodedRows("values", value_codec, unit=True)
        self.rows = (self.keys, self.values)

    def size(self) -> int:
        return min(self.offset, self.window)

    def append(self, keys: mx.array, values: mx.array) -> View:
        """Remembers [B, H_kv, L, D]; the view serves the L queries of the same positions."""
        start, coded = self.offset, self.coded
        rows, lead = self._take_in((keys, values))
        view: View
        if coded:
            codes = self.keys.held(), self.values.held()
            view = CompressedRingView(
                rows[0], rows[1], codes[0], codes[1], start, coded, self.window, self.left_padding
            )
        else:
            view = ChunkView(rows[0], rows[1], start, 0, self.window, self.first_visible)
        self._code_blocks(rows, lead, self._code)
        return view

    def _code(self, block: Rows, first: int) -> None:
        capacity = ring_capacity(self.window)
        dropped = max(0, block[0].shape[2] - capacity)
        slot = (first + dropped) % capacity
        for coded_rows, x in zip(self.rows, block, strict=True):
            x = x[:, :, dropped:]
            fits = min(capacity - slot, x.shape[2])
            coded_rows.write(x[:, :, :fits], slot, capacity)
            if fits < x.shape[2]:
                coded_rows.write(x[:, :, fits:], 0, capacity)

    def is_trimmable(self, n: int = 1) -> bool:
        # Past the window, blocks have been written over; as long as they have not, all are there.
        return self.cut_point(self.offset - n) == self.offset - n if n <= self.offset else False

    def cut_point(self, position: int) -> int:
        found = super().cut_point(position)
        return found if found >= self.coded or self.coded <= ring_capacity(self.window) else 0

    def snapshot(self) -> Snapshot:
        # The ring is written over, so the snapshot holds it; MLX copies it when it is.
        return BlockSnapshot(self.offset, 0, tuple(self._arrays()), self.coded)

    def _check_alive(self, snapshot: Snapshot) -> None:
        pass

    def restore(self, snapshot: Snapshot) -> None:
        assert isinstance(snapshot, BlockSnapshot)
        self.offset, self.coded = snapshot.offset, snapshot.coded
        self.exact, ring = snapshot.arrays[:2], snapshot.arrays[2:]
        self.keys.codes, self.keys.scales, self.values.codes = ring if ring else (None, None, None)

    def saved(self) -> dict[str, mx.array]:
        return self.contents()

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"window": self.window}

    def status(self) -> str:
        return f"{super().status()}, window {self.window}"

    def _exact_part(self) -> str:
        return f"last {BLOCK} to {TAIL - 1}"
