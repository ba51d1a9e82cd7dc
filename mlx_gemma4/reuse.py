"""What of a prompt is already in the cache.

Owns one prompt cache, the ids it holds, and one way back: a snapshot at a position the next prompt is sure to
share. Leaves what prompts look like to `turns.py` and `chat.py`, and how caches trim and restore to `cache/`.

    turn 1   [ system | user 1 | <|turn>model | thought 1 | answer 1 ]    snapshot after "user 1"
    turn 2   [ system | user 1 | <|turn>model | answer 1 | user 2 ... ]   thought 1 is gone: here the ids part

Sliding layers keep a ring and cannot trim past their window, compressed ones only inside their exact tail or to
whole blocks. So for turn 2 the memory trims to the last position that every layer can, or goes back to the
snapshot if that is no earlier, or starts anew; the rest of the prompt is computed again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from . import cache as kv
from .generation import cache_offset


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


class PromptMemory:
    """make_cache: as `model.make_cache`; called when a cache is needed. `ids`: what the cache holds."""

    def __init__(self, make_cache: Callable[[], list[Any]]):
        self._make_cache = make_cache
        self.forget()

    def forget(self) -> None:
        """Lets go of the cache and the way back."""
        self._cache: list[Any] | None = None
        self.ids: list[int] = []
        self._marked: list[int] = []
        self._snapshot: Any = None

    @property
    def cache(self) -> list[Any]:
        if self._cache is None:
            self._cache = self._make_cache()
        return self._cache

    def reuse(self, prompt: Sequence[int]) -> int:
        """Brings the cache to the longest beginning of `prompt` it can, and returns that length.

        At least the last id is left to compute, since logits are not cached.
        """
        most = len(prompt) - 1
        keep = min(common_prefix(self.ids, prompt), most)
        if keep < len(self.ids):
            keep = kv.cut_point(self.cache, keep)
        back = len(self._marked)
        if back > most or list(prompt[:back]) != self._marked:
            back = 0
        if keep > back:
            kv.trim(self.cache, len(self.ids) - keep)
            if keep < len(self._marked):  # about to be overwritten
                self._marked, self._snapshot = [], None
            self.ids = self.ids[:keep]
        elif back:  # also where trimming would go no further: a compressed tail comes back exact
            kv.restore(self.cache, self._snapshot)
            self.ids = list(self._marked)
        elif self.ids:
            self.forget()
        return len(self.ids)

    def hold(self, ids: Sequence[int]) -> None:
        """Takes note that `ids` were fed, as far as the cache says it got."""
        if self._cache is None:
            self.ids = []
            return
        # Codes that no step has read yet are found now: what is not evaluated belongs to the thread that asked for it.
        mx.eval([c.state for c in self._cache])
        self.ids = list(ids[: cache_offset(self._cache)])

    def mark(self) -> None:
        """Makes the present position the way back."""
        self._marked = list(self.ids)
        self._snapshot = kv.snapshot(self.cache)

    @property
    def nbytes(self) -> int:
        """Bytes the cache holds now; 0 before the first prompt."""
        return 0 if self._cache is None else kv.nbytes(self._cache)

    def status(self) -> list[str]:
        return kv.status(self.cache)
