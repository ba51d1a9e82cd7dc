"""What of a prompt is already in the cache.

Owns one prompt cache, what it holds, and the ways back: snapshots at positions later prompts are likely to share,
within a byte budget. Leaves what prompts look like to `senses.py` and `chat.py`, how caches trim and restore to
`cache/`, and files to `session_file.py`.

    turn 1   [ system ] [ user 1 ] [ <|turn>model | thought 1 | answer 1 ]      marks after "system" and "<|turn>model"
    turn 2   [ system ] [ user 1 ] [ <|turn>model | answer 1 ] [ user 2 ]       thought 1 is gone: here they part

Sliding layers keep a ring and cannot trim past their window, compressed ones only inside their exact tail or to whole
blocks. So for turn 2 the memory trims to the last position that every layer can, or goes back to the latest mark the
prompt shares if that is no earlier, or starts anew; the rest of the prompt is computed again. Global layers are never
copied: they forget what lies behind. So marks are a chain, each a beginning of what the cache holds, and going back
gives up those beyond.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from . import cache as kv
from .generation import cache_offset

# What snapshots may take, beside the live cache: five of 26B-A4B's rings in bfloat16, one of 31B's, dozens of E4B's.
DEFAULT_BYTES = 1 << 30


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


@dataclass
class Mark:
    """A way back. Its snapshots hold the rings as they were; of global layers only their length."""

    length: int  # positions
    snapshots: list[kv.Snapshot]
    used: int  # when it was made or last gone back to

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for snapshot in self.snapshots for a in snapshot.arrays)


class PromptMemory:
    """make_cache: as `model.make_cache`; called when a cache is needed. max_bytes: what marks may take; the latest one
    is kept whatever it takes.

    ids: what the cache holds, position by position: token ids, at media the keys of `Prompt.keys`.
    """

    def __init__(self, make_cache: Callable[[], list[Any]], max_bytes: int = DEFAULT_BYTES):
        self._make_cache = make_cache
        self.max_bytes = max_bytes
        self.forget()

    def forget(self) -> None:
        """Lets go of the cache and all marks."""
        self._cache: list[Any] | None = None
        self.ids: list[int] = []
        self.marks: list[Mark] = []  # by length
        self._clock = 0

    @property
    def cache(self) -> list[Any]:
        if self._cache is None:
            self._cache = self._make_cache()
        return self._cache

    def new_cache(self) -> list[Any]:
        """An empty one like this memory's, for `settle`."""
        return self._make_cache()

    def reuse(self, prompt: Sequence[int]) -> int:
        """Brings the cache to the longest beginning of `prompt` it can, and returns that length.

        At least the last id is left to compute, since logits are not cached.
        """
        shared = min(common_prefix(self.ids, prompt), len(prompt) - 1)
        keep = shared if shared == len(self.ids) else kv.cut_point(self.cache, shared)
        mark = max((m for m in self.marks if m.length <= shared), key=lambda m: m.length, default=None)
        if mark is not None and mark.length >= keep and keep < len(self.ids):
            # Also where trimming would go no further: a compressed tail comes back exact.
            kv.restore(self.cache, mark.snapshots)
            mark.used = self._tick()
            keep = mark.length
        elif keep > 0:
            kv.trim(self.cache, len(self.ids) - keep)
        elif self.ids:
            self.forget()
        self.ids = self.ids[:keep]
        # What lay behind is about to be overwritten in the layers that were not copied.
        self.marks = [m for m in self.marks if m.length <= keep]
        return keep

    def hold(self, ids: Sequence[int]) -> None:
        """Takes note that `ids` were fed, as far as the cache says it got."""
        if self._cache is None:
            self.ids = []
            return
        # Codes that no step has read yet are found now: what is not evaluated belongs to the thread that asked for it.
        mx.eval([c.state for c in self._cache])
        self.ids = list(ids[: cache_offset(self._cache)])

    def mark(self) -> None:
        """Makes the present position a way back."""
        self.marks = [m for m in self.marks if m.length < len(self.ids)]
        self.marks.append(Mark(len(self.ids), kv.snapshot(self.cache), self._tick()))
        while len(self.marks) > 1 and self.mark_bytes > self.max_bytes:
            self.marks.remove(min(self.marks[:-1], key=lambda m: m.used))

    def settle(self, cache: list[Any], ids: Sequence[int], marks: Sequence[tuple[int, list[kv.Snapshot]]]) -> None:
        """Takes over a cache that holds `ids`, with (length, snapshots) of ways back."""
        self.forget()
        self._cache, self.ids = cache, list(ids)
        self.marks = [Mark(length, snapshots, self._tick()) for length, snapshots in sorted(marks, key=lambda m: m[0])]

    def copy(self) -> "PromptMemory":
        """A memory of its own that holds the same. Arrays are shared until one of the two writes to them."""
        other = PromptMemory(self._make_cache, self.max_bytes)
        if self._cache is not None:
            cache = self._make_cache()
            for new, old in zip(cache, self._cache, strict=True):
                new.take_over(old)
            other.settle(cache, self.ids, [(m.length, list(m.snapshots)) for m in self.marks])
        return other

    @property
    def nbytes(self) -> int:
        """Bytes the cache holds now; 0 before the first prompt. Marks come on top."""
        return 0 if self._cache is None else kv.nbytes(self._cache)

    @property
    def mark_bytes(self) -> int:
        return sum(m.nbytes for m in self.marks)

    def status(self) -> list[str]:
        return kv.status(self.cache)

    def _tick(self) -> int:
        self._clock += 1
        return self._clock
