"""Figures for people: bytes, rates, the dim line after a turn, the meters while something long runs.

Owns wording and number formats. Leaves measuring to `mlx_gemma4.chat` (its `Stats`) and colours on answers to
`stream.py`. Sizes are decimal (1 MB = 10**6 bytes), as operating systems and download pages print them.
"""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from .stream import DIM, RESET, terminal_size, wants_style

if TYPE_CHECKING:
    from mlx_gemma4.events import Shortened, Stats

# Clears the line the cursor is on and returns to its start.
WIPE = "\r\x1b[2K"

_ENDED = {
    "length": "cut at the token limit · ",
    "cancelled": "stopped · ",
    "repetition": "stopped, it only repeated itself · ",
}


def size(count: int | float) -> str:
    """`12_345_678` -> `12.3 MB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.{1 if count < 100 * scale else 0}f} {unit}"
    return f"{int(count)} B"


def rate(tokens_per_second: float) -> str:
    """`31.24` -> `31.2 tok/s`; three digits and up without decimals."""
    return f"{tokens_per_second:,.{1 if tokens_per_second < 100 else 0}f} tok/s"


def dim(text: str, stream: TextIO | None = None) -> None:
    """A line of side information: on stderr; on a terminal with colours dimmed and wrapped between words."""
    target = stream or sys.stderr
    if wants_style(target):
        width = max(20, terminal_size(target)[0] - 1)
        for line in textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]:
            target.write(f"{DIM}{line}{RESET}\n")
    else:
        target.write(f"{text}\n")
    target.flush()


@contextmanager
def busy(what: str, stream: TextIO | None = None) -> Iterator[None]:
    """Shows `what` on a terminal's last line while something runs, and wipes it afterwards."""
    target = stream or sys.stderr
    if not wants_style(target):
        yield
        return
    target.write(f"{WIPE}{DIM}{what} ...{RESET}")
    target.flush()
    try:
        yield
    finally:
        target.write(WIPE)
        target.flush()


def turn_line(stats: Stats, columns: int | None = None) -> str:
    """What one turn cost, in one line: prompt, answer, context, cache. Fewer words where `columns` are few."""
    reused = f" ({stats.cached_tokens:,} re-used)" if stats.cached_tokens else ""
    ended = _ENDED.get(stats.finish_reason, "")
    # A rate needs something computed: a prompt taken from the cache, or an answer of one token, has none.
    read = f" at {rate(stats.prompt_tps)}" if stats.prompt_tps and stats.prompt_tokens > stats.cached_tokens else ""
    said = f" at {rate(stats.generation_tps)}" if stats.generation_tps else ""
    used = _of(stats.context_used, stats.context_limit)
    line = (
        f"{ended}prompt {_tokens(stats.prompt_tokens)}{reused}{read} · answer {_tokens(stats.generation_tokens)}{said}"
        f" · context {used} · cache {size(stats.cache_bytes)}"
    )
    if columns is None or len(line) < columns:
        return line
    short = (
        f"{stats.prompt_tokens:,} in{reused}{read} · {stats.generation_tokens:,} out{said}"
        f" · {used} · {size(stats.cache_bytes)}"
    )
    return ended + short.replace(" tok/s", "/s").replace(" at ", " ").replace(" of ", "/")


def shortened_line(event: Shortened) -> str:
    """What was done to a conversation that no longer fitted."""
    what = "left out" if event.summary is None else "summed up"
    return f"the context was full: the oldest {event.messages:,} messages were {what}"


def _tokens(count: int) -> str:
    return f"{count:,} token{'' if count == 1 else 's'}"


def long_stats(stats: Stats, cache_status: list[str]) -> list[str]:
    """Everything known about the last turn, one fact per line."""
    new = stats.prompt_tokens - stats.cached_tokens
    thought = f"{stats.thought_tokens:,} of them thought" if stats.thought_tokens else "no thought"
    rows = [
        ("prompt", f"{_tokens(stats.prompt_tokens)}: {stats.cached_tokens:,} re-used, {new:,} computed"),
        ("prompt rate", rate(stats.prompt_tps)),
        ("answer", f"{_tokens(stats.generation_tokens)}, {thought} ({stats.finish_reason})"),
        ("answer rate", rate(stats.generation_tps)),
        ("context", _of(stats.context_used, stats.context_limit)),
        ("cache", f"{size(stats.cache_bytes)} ({stats.cache_bytes:,} bytes)"),
        *(("cache kind", line) for line in cache_status),
        ("peak memory", size(stats.peak_memory)),
    ]
    return [f"{name:<12} {value}" for name, value in rows]


def _of(used: int, limit: int | None) -> str:
    return f"{used:,} of {limit:,}" if limit else f"{used:,}"


class PrefillMeter:
    """Progress while a long prompt is read: on a terminal only, and only once it has taken over a second.

    An instance is the `progress` callback of `Chat.stream`; `clear` must follow before anything else is
    printed.
    """

    def __init__(self, stream: TextIO | None = None, after: float = 1.0, clock: Callable[[], float] = time.monotonic):
        self._stream = stream or sys.stderr
        self._enabled = wants_style(self._stream)
        self._after = after
        self._clock = clock
        self._start = clock()
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        if not self._enabled or not total or self._clock() - self._start < self._after:
            return
        self._stream.write(f"{WIPE}{DIM}reading the prompt: {done:,} of {total:,} tokens ({done / total:.0%}){RESET}")
        self._stream.flush()
        self._shown = True

    def clear(self) -> None:
        self._start = self._clock()  # a turn with calls reads several prompts
        if self._shown:
            self._stream.write(WIPE)
            self._stream.flush()
            self._shown = False
