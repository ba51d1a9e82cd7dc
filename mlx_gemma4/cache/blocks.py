"""What compressed caches share: which positions are codes, which are still exact, and the way back.

    positions   0 ........ 15 | 16 ............................ coded | coded ............ offset
    held as     exact (sinks)   codes, in blocks of 64                  exact: the tail of 64 to 127

New positions join the tail. A step attends to it exactly, then the oldest whole blocks are coded until 64 to 127
positions remain; codes are never changed afterwards. The first 16 real positions of each row stay exact for good:
much attention rests on them, and a value there is as long as any other, so that its error would show everywhere.

Worked example, SINKS 16, BLOCK 64: 130 positions prefilled are attended to exactly, then block 0..63 is coded and 66
remain; 61 tokens later the tail holds 127, the next makes it 128 and block 64..127 is coded.

Exact rows lie in one buffer [sinks | tail], so that one call attends to both. Codes of the first 16 positions exist
and are never read. Rows of a batch with left padding have their sinks after it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx

from .base import LayerCache, Snapshot, room_for, write_at
from .coded import CodedRows

SINKS = 16
BLOCK = 64
TAIL = 2 * BLOCK  # most positions that await coding between steps

Rows = tuple[mx.array, ...]  # what a layer remembers of positions, [B, H_kv, n, D] each


def coded_positions(offset: int) -> int:
    """How many of `offset` positions are codes after a step that ended there (without trimming since)."""
    return max(0, offset // BLOCK - 1) * BLOCK


def code_capacity(have: int, needed: int, new: int) -> int:
    """Slots for codes when `needed` are to be held and a step brought `new` positions.

    A prefilled chunk allocates what it needs. Decoding runs ahead by 256 slots or a 128th, so copies stay rare and
    the buffer is at most 1 % too large once it holds 25,600 positions.
    """
    if needed <= have:
        return have
    return needed if new > 1 else max(needed, have + max(256, have // 128 // BLOCK * BLOCK))


@dataclass(frozen=True)
class BlockSnapshot(Snapshot):
    coded: int = 0  # positions that were codes; `arrays` hold the exact rest


class BlockCache(LayerCache):
    """Subclasses name their coded rows, code blocks of exact rows and form the views."""

    sinks: ClassVar[int] = SINKS

    def __init__(self, left_padding: Sequence[int] | None = None):
        super().__init__(left_padding)
        self.coded = 0
        self.exact: Rows = ()  # [B, H_kv, sinks + TAIL, D] each
        self.rows: tuple[CodedRows, ...] = ()

    def _take_in(self, new: Rows) -> tuple[Rows, int]:
        """Remembers `new` exactly. Returns everything exact, [sinks | tail, new] each, and how many sinks it begins
        with: none as long as there are no codes, when the tail holds all positions."""
        lead = self.sinks if self.coded else 0
        used, L = self.sinks + self.offset - self.coded, new[0].shape[2]
        self.offset += L
        if used + L <= self.sinks + TAIL:
            room = self.exact or tuple(room_for(None, x.shape, x.dtype, self.sinks + TAIL) for x in new)
            self.exact = tuple(write_at(b, x, used) for b, x in zip(room, new, strict=True))
            return tuple(b[:, :, self.sinks - lead : used + L] for b in self.exact), lead
        if used == self.sinks and not lead:
            return new, lead
        old = (b[:, :, self.sinks - lead : used] for b in self.exact)
        return tuple(mx.concatenate([a, b], axis=2) for a, b in zip(old, new, strict=True)), lead

    def _code_blocks(self, rows: Rows, lead: int, code: Callable[[Rows, int], None]) -> None:
        """Hands the oldest blocks of `rows`, as `_take_in` returned them, to `code` with their first position, until
        fewer than TAIL positions remain."""
        awaiting = self.offset - self.coded
        if awaiting < TAIL:
            return
        n = (awaiting // BLOCK - 1) * BLOCK
        block = tuple(x[:, :, lead : lead + n] for x in rows)
        code(block, self.coded)
        kept = []
        for x, b in zip(rows, block, strict=True):
            tail = x[:, :, lead + n :]
            x = mx.concatenate([self._sinks(x[:, :, :lead], b), tail], axis=2) if self.sinks else tail
            kept.append(room_for(x, x.shape, x.dtype, self.sinks + TAIL))
        self.exact = tuple(kept)
        self.coded += n

    def _sinks(self, old: mx.array, block: mx.array) -> mx.array:
        """The first real positions of each row [B, H_kv, sinks, D], as far as `block`, about to be coded, has them."""
        if self.left_padding is None:
            return old if self.coded else block[:, :, : self.sinks]
        B, H, n, D = block.shape
        index = (mx.array(self.left_padding)[:, None] + mx.arange(self.sinks) - self.coded)[:, None, :, None]
        here = mx.broadcast_to(mx.clip(index, 0, n - 1), (B, H, self.sinks, D))
        found = mx.take_along_axis(block, here, axis=2)
        inside = (index >= 0) & (index < n)
        return mx.where(inside, found, old if self.coded else mx.zeros_like(found))

    def contents(self) -> dict[str, mx.array]:
        out = {f"exact.{i}": x for i, x in enumerate(self.exact)}
        for rows in self.rows:
            out |= rows.contents()
        return out

    def saved(self) -> dict[str, mx.array]:
        out = self.contents()
        for rows in self.rows:
            out |= rows.contents(self.coded)
        return {name: x for name, x in out.items() if x.shape[2] > 0}

    def settings(self) -> dict[str, Any]:
        return super().settings() | {rows.name: rows.settings() for rows in self.rows}

    def place(self) -> dict[str, Any]:
        return super().place() | {"coded": self.coded}

    def settle(self, contents: dict[str, mx.array], place: dict[str, Any]) -> None:
        self._stand_at(place)
        self.coded = place["coded"]
        self.exact = tuple(contents[f"exact.{i}"] for i in range(sum(name.startswith("exact.") for name in contents)))
        for rows in self.rows:
            rows.settle(contents)

    def size(self) -> int:
        return self.offset

    def is_trimmable(self, n: int = 1) -> bool:
        """Inside the tail, exactly; further back to a multiple of BLOCK, whose last positions are then codes."""
        target = self.offset - n
        return target >= self.coded or (target >= 0 and target % BLOCK == 0)

    def cut_point(self, position: int) -> int:
        position = min(position, self.offset)
        return position if position >= self.coded else position // BLOCK * BLOCK

    def trim(self, n: int) -> int:
        n = min(n, self.offset)
        if n <= 0 or not self.is_trimmable(n):
            return 0
        self.offset -= n
        if self.offset < self.coded:
            self._forget_codes(self.offset)
        return n

    def _forget_codes(self, coded: int) -> None:
        if coded < self.coded:
            self._truncations.append((len(self._truncations), coded))
        self.coded = coded

    def snapshot(self) -> Snapshot:
        return BlockSnapshot(self.offset, len(self._truncations), self.exact, self.coded)

    def restore(self, snapshot: Snapshot) -> None:
        self._check_alive(snapshot)
        assert isinstance(snapshot, BlockSnapshot)
        self._forget_codes(snapshot.coded)
        self.offset, self.exact = snapshot.offset, snapshot.arrays

    def _check_alive(self, snapshot: Snapshot) -> None:
        # Exact rows are in the snapshot; only codes can have been written over.
        assert isinstance(snapshot, BlockSnapshot)
        later = self._truncations[snapshot.stamp :]
        if snapshot.coded > self.coded or any(position < snapshot.coded for _, position in later):
            self._gone(snapshot)

    def status(self) -> str:
        coded = ", ".join(f"{rows.name} {rows.codec.bits:g} bits" for rows in self.rows)
        exact = str(self.exact[0].dtype).removeprefix("mlx.core.") if self.exact else "empty"
        return f"{self.kind}, {coded} ({self.real_bits():.2f} with scales), {self._exact_part()} exact, {exact}"

    def real_bits(self) -> float:
        """Stored bits per number of a key or value, side information included, of positions that are codes."""
        return 8 * sum(rows.row_bytes for rows in self.rows) / (2 * self.rows[0].codec.width)

    def _exact_part(self) -> str:
        return f"first {self.sinks} and last {BLOCK} to {TAIL - 1}"
