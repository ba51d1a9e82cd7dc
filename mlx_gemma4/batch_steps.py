"""The rows of a batch under way: one token of each at a time, and how rows join and leave the caches.

Owns the batch's caches and the order of computing. Leaves what a row says to `batch_row.py` and which rows come when to
`batches.py`.

Rows are padded on the left, so that all of them write the same position of the caches at the same time. A row that is
done leaves at once. One that joins is read from so late a position on that it ends where the others stand:

    position      0 1 2 3 4 5 6 7 8 9 10
    first row     a b c d e f - - -          done after three tokens
    second row    . . a b c d - - - - -
    third row     . . . . . . a b c - -      in the place of the first

What lies before a row's first position is never seen by it, and its rotary positions count from there.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext
from typing import Any

import mlx.core as mx

from . import ple_disk
from .batch_row import BatchAnswer, Row
from .cache import LayerCache
from .cache.blocks import coded_positions
from .events import Event
from .generation import CLEAR_EVERY, check_numbers, chooser, prefill

# A batch takes in new rows until it is so many times as long as its longest prompt, or has LEAST positions: what lies
# before a row costs memory and time, too. Then it runs empty, and the next one begins.
TIMES, LEAST = 2, 512
# Rows join when so large a share of the batch is free, since joining copies the caches.
FREE_SHARE = 4

Said = tuple[int, Event | BatchAnswer]


class Batch:
    """The rows under way, their caches, and the token chosen for each that nobody was told yet."""

    def __init__(self, model: Any, pad: int, step: int):
        self.rows: list[Row] = []
        self._model, self._pad, self._prefill_step = model, pad, step
        self._cache: list[LayerCache] = []
        self._chosen = mx.array([], mx.int32)  # [B]
        self._longest = 0  # prompt of those it began with
        self._steps = 0

    def takes(self, size: int) -> bool:
        """Whether it is time for new rows, of `size` in all."""
        if not self.rows:
            return True
        free = size - len(self.rows)
        return free >= max(1, size // FREE_SHARE) and self._offset <= max(LEAST, TIMES * self._longest)

    def admit(self, new: list[Row], report: Callable[[int], bool]) -> bool:
        """Reads the prompts of `new`, none longer than the batch when it has rows. report(tokens read of them) is told;
        when it returns False, so does this, and they are not in."""
        if not self.rows:
            self._longest = max(len(row.prompt) for row in new)
        end = self._offset if self.rows else self._longest
        padding = [end - len(row.prompt) for row in new]
        start = min(padding)
        tokens = mx.array([[self._pad] * (p - start) + row.prompt for p, row in zip(padding, new, strict=True)])
        cache = self._model.make_cache(left_padding=padding)
        if start > 0:
            _begin_at(cache, self._cache, start)
        going = True

        def told(done: int) -> bool:
            nonlocal going
            going = report(sum(max(0, start + done - p) for p in padding))
            return going

        if told(0):
            prefill(self._model, tokens[:, :-1], cache, max(1, self._prefill_step // len(new)), told)
        if not going:
            return False
        logits = self._model(tokens[:, -1:], cache=cache)[:, -1, :]
        check_numbers(logits)
        chosen = self._choose(new, logits)
        if not told(end - start):
            return False
        if self.rows:
            _join(self._cache, cache)
            self._chosen = mx.concatenate([self._chosen, chosen])
        else:
            self._cache, self._chosen = cache, chosen
        self.rows = [*self.rows, *new]
        return True

    def step(self) -> Generator[Said, None, None]:
        """One token of every row. While the caller looks at it, the device computes what follows.

        Under a guide a token is known before the next one is chosen. Otherwise the next one is under way first, and
        what a row that has just stopped would have said is thrown away.
        """
        yield from self._without_failed()
        if not self.rows:
            return
        rows, chosen = self.rows, self._chosen
        guided = any(row.guide is not None for row in rows)
        spoken: list[Said] = []
        if guided:
            spoken = _told(rows, chosen.tolist())  # type: ignore[arg-type]
            self._chosen = mx.array([row.last for row in rows], mx.int32)
        self._keep([row.may_go_on(0 if guided else 1) for row in rows])
        logits = None
        if self.rows:
            for i, row in enumerate(self.rows):
                if row.seen is not None:
                    row.seen = mx.concatenate([row.seen, self._chosen[i : i + 1]])
            # Nothing evaluates a row of a table on disk before it is there.
            lazy = not guided and not any(row.processors for row in self.rows)
            with ple_disk.late() if lazy else nullcontext():
                logits = self._model(self._chosen[:, None], cache=self._cache)[:, -1, :]
                if not guided:
                    self._chosen = self._choose(self.rows, logits)
            mx.async_eval(logits if guided else self._chosen)
        yield from spoken if guided else _told(rows, chosen.tolist())  # type: ignore[arg-type]
        if guided and logits is not None:
            self._chosen = self._choose(self.rows, logits)
        yield from self._without_failed()
        self._keep([row.reason is None for row in self.rows])
        self._steps += 1
        if self._steps % CLEAR_EVERY == 0:
            mx.clear_cache()

    @property
    def _offset(self) -> int:
        return self._cache[0].offset if self._cache else 0

    def _choose(self, rows: Sequence[Row], logits: mx.array) -> mx.array:
        """A token for each row, int32 [B], by logits [B, V]."""
        if all(row.plain for row in rows):
            return chooser(None)(logits)[0].astype(mx.int32)
        each = [row.choose(logits[i : i + 1]) for i, row in enumerate(rows)]
        return mx.concatenate([token.astype(mx.int32) for token in each])

    def _without_failed(self) -> Generator[Said, None, None]:
        """Ends the rows for which no token could be chosen."""
        failed = [row for row in self.rows if row.reason == "error"]
        self._keep([row.reason != "error" for row in self.rows])
        for row in failed:
            for event in row.end("error"):
                yield row.number, event
            yield row.number, row.answer()

    def _keep(self, which: Sequence[bool]) -> None:
        """Forgets the other rows."""
        if all(which):
            return
        left = [i for i, stays in enumerate(which) if stays]
        self.rows = [self.rows[i] for i in left]
        if not left:
            self._cache, self._chosen = [], mx.array([], mx.int32)
            return
        index = mx.array(left)
        self._chosen = self._chosen[index]
        for c in self._cache:
            padding = _paddings(c)
            _settle(c, {name: a[index] for name, a in c.contents().items()}, [padding[i] for i in left])


def _told(rows: Sequence[Row], tokens: Sequence[int]) -> list[Said]:
    """What the rows say with these tokens."""
    out: list[Said] = []
    for row, token in zip(rows, tokens, strict=True):
        out += [(row.number, event) for event in row.take(token)]
        if row.reason is not None:
            out.append((row.number, row.answer()))
    return out


# Rows of caches. All arrays of a cache have the batch as their first axis.


def _paddings(cache: LayerCache) -> list[int]:
    rows = next(iter(cache.contents().values())).shape[0]
    return list(cache.left_padding or (0,) * rows)


def _settle(cache: LayerCache, contents: dict[str, mx.array], padding: Sequence[int], **place: int) -> None:
    cache.settle(contents, cache.place() | place | {"left_padding": padding if any(padding) else None})
    mx.eval(cache.state)  # one layer after the other, so that only one is there twice


def _begin_at(new: Sequence[LayerCache], old: Sequence[LayerCache], start: int) -> None:
    """Lets empty caches stand at position `start`, with room as in `old`; the rows' padding reaches at least so far."""
    for n, o in zip(new, old, strict=True):
        rows = len(n.left_padding or ())
        empty = {name: mx.zeros((rows, *a.shape[1:]), a.dtype) for name, a in o.contents().items()}
        coded = {"coded": coded_positions(start)} if "coded" in o.place() else {}
        _settle(n, empty, n.left_padding or (), offset=start, **coded)


def _join(cache: Sequence[LayerCache], new: Sequence[LayerCache]) -> None:
    """Adds the rows of `new`, which stand at the same position."""
    for c, n in zip(cache, new, strict=True):
        more, padding = n.contents(), _paddings(c) + _paddings(n)
        _settle(c, {name: mx.concatenate([a, more[name]]) for name, a in c.contents().items()}, padding)
