"""Pictures, sounds and clips that wait for the next message, and the lines that tell about them.

Owns their order and what the message with them looks like. Leaves reading files to `mlx_gemma4.senses`, and paths in
a line to `attachments.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mlx_gemma4.errors import UsageError

from . import status
from .stream import printable

if TYPE_CHECKING:
    from mlx_gemma4.media.items import Item
    from mlx_gemma4.senses import Senses


class Pending:
    """What was attached and not sent yet."""

    def __init__(self) -> None:
        self.items: list[Item] = []

    def add(self, senses: Senses, kind: str, source: Any) -> list[Item]:
        """Reads a file and keeps it; what it became. Raises MediaError, and UsageError where the model cannot."""
        from mlx_gemma4.media.sources import name_of

        with status.busy(f"reading {printable(name_of(source, kind))}"):
            items = senses.items(kind, source)
        self.items += items
        return items

    def message(self, text: str) -> str | list[dict[str, Any]]:
        """What to send: what is attached, then the text."""
        if not self.items:
            return text
        return [*({"type": item.kind, item.kind: item} for item in self.items), {"type": "text", "text": text}]

    def drop(self, number: str) -> list[Item]:
        """Takes out one, counted from 1, or all where `number` is empty; what was taken out. Raises UsageError."""
        if not self.items:
            raise UsageError("nothing is attached")
        if not number:
            return self.drop_all()
        if not number.isdecimal() or not 1 <= int(number) <= len(self.items):
            raise UsageError(f"/drop takes a number from 1 to {len(self.items)}, or nothing for all; not {number!r}")
        return [self.items.pop(int(number) - 1)]

    def drop_all(self) -> list[Item]:
        gone, self.items = self.items, []
        return gone


def describe(item: Item) -> str:
    """`cat.png, 256 tokens`; of a video the frames, of a long sound its windows."""
    count = len(item.parts)
    parts = {"video": f"{count} frame{'' if count == 1 else 's'}, ", "audio": f"{count} windows, " if count > 1 else ""}
    return f"{printable(item.name)}, {parts.get(item.kind, '')}{item.tokens:,} token{'' if item.tokens == 1 else 's'}"


def attached(items: Iterable[Item]) -> list[str]:
    """What to say about items just read: their cost, and what was done to them."""
    lines = []
    for item in items:
        lines += [f"attached: {describe(item)}", *(f"  {printable(note)}" for note in item.notes)]
    return lines
