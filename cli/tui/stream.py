"""An answer on the screen while it is being generated.

Owns: where text and thoughts go (terminal or pipe), markdown that grows without flicker, and the rule that
nothing already shown is lost from the scrollback. Leaves generation, statistics and the prompt line to
others; knows nothing about models.

How the markdown grows. The text is cut into top-level blocks (paragraph, list, fence, table ...). A block
followed by another one can no longer change: it is printed once and never touched again. Only the last block
is re-drawn, in place, and of it only the screen lines that differ. When that block grows past the screen its
upper lines are printed for good too, so a long listing scrolls like any other output.

    # Plan       printed
                 printed
    - one        re-drawn
    - tw
"""

import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from .markdown import Renderer

# C0 and C1 controls except tab and newline: a model must not be able to drive the terminal.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")

BOLD = "\x1b[1m"
DIM = "\x1b[2m"
RESET = "\x1b[0m"


def printable(text: str) -> str:
    """`text` without control characters other than tab and newline."""
    return _CONTROLS.sub("", text)


def wants_style(stream: TextIO) -> bool:
    """Whether colours and cursor movement are welcome: a terminal, not TERM=dumb, NO_COLOR unset or empty."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class AnswerView(Protocol):
    """Receives one answer piece by piece; `finish` must be called once, also after an interruption."""

    def thought(self, text: str) -> None: ...

    def text(self, text: str) -> None: ...

    def finish(self) -> None: ...


def open_view(*, markdown: bool, show_thoughts: bool) -> AnswerView:
    """The view that suits stdout: markdown on a capable terminal, else plain text.

    Thoughts beside plain text go to stderr, and only if that is a terminal.
    """
    if markdown and wants_style(sys.stdout):
        return MarkdownView(sys.stdout, show_thoughts)
    return PlainView(sys.stdout, sys.stderr if show_thoughts and sys.stderr.isatty() else None)


class PlainView:
    """Text as it comes to `out`; thoughts to `thoughts` (None: dropped), dimmed if that is a terminal.

    For pipes, NO_COLOR and --no-markdown. A thought never goes to an `out` that is not a terminal: the caller
    passes a different stream or None.
    """

    def __init__(self, out: TextIO, thoughts: TextIO | None = None):
        self._out = out
        self._thoughts = thoughts
        self._dim = thoughts is not None and wants_style(thoughts)
        self._clean = printable if out.isatty() else str
        self._kind: str | None = None
        self._ends_line = True

    def thought(self, text: str) -> None:
        if self._thoughts is None or not text:
            return
        if self._kind != "thought":
            text = text.lstrip("\n")
            if not text:
                return
            self._kind = "thought"
            if not self._dim:
                self._thoughts.write("[thought] ")
        text = printable(text)
        self._thoughts.write(f"{DIM}{text}{RESET}" if self._dim else text)
        self._thoughts.flush()

    def text(self, text: str) -> None:
        if self._kind != "text":
            if self._out.isatty() or self._kind == "thought":
                text = text.lstrip("\n")
            if not text:
                return
            self._close_thought(answer_follows=True)
            self._kind = "text"
        self._out.write(self._clean(text))
        self._out.flush()
        self._ends_line = text.endswith("\n")

    def _close_thought(self, answer_follows: bool) -> None:
        if self._kind == "thought" and self._thoughts is not None:
            mark = "\n" if self._dim else "[answer]\n"
            self._thoughts.write(f"\n{mark}" if answer_follows else "\n")
            self._thoughts.flush()

    def finish(self) -> None:
        """Ends the last line, so that whatever prints next starts on its own."""
        self._close_thought(answer_follows=False)
        if self._kind == "text" and not self._ends_line:
            self._out.write("\n")
        self._kind = None
        self._ends_line = True
        self._out.flush()


class MarkdownView:
    """Markdown on a terminal, thoughts dimmed above it. See the head of this file."""

    def __init__(
        self,
        out: TextIO,
        show_thoughts: bool = True,
        size: Callable[[], tuple[int, int]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._out = out
        self._show_thoughts = show_thoughts
        self._size = size or (lambda: terminal_size(out))
        self._clock = clock
        self._renderer: Renderer | None = None
        self._kind: str | None = None
        self._restart()

    def _restart(self) -> None:
        self._pending = ""  # text of the blocks that may still change
        # Lines of those blocks that are on the screen for good, without colours: a new colour is no new line.
        self._printed: list[str] = []
        self._first_block = True
        self._region = Region(self._out)
        self._next_draw = 0.0

    def thought(self, text: str) -> None:
        if not self._show_thoughts:
            return
        text = printable(text)
        if self._kind != "thought":
            text = text.lstrip("\n")
            if not text:
                return
            self._leave(answer_follows=False)
            self._kind = "thought"
        self._out.write(f"{DIM}{text}{RESET}")
        self._out.flush()

    def text(self, text: str) -> None:
        if self._kind != "text":
            text = text.lstrip("\n")
            if not text:
                return
            self._leave(answer_follows=True)
            self._kind = "text"
        self._pending += printable(text)
        now = self._clock()
        if now >= self._next_draw:
            self._draw(last=False)
            # Drawing takes at most about a fifth of the time, and happens no more than 30 times a second.
            self._next_draw = now + max(1 / 30, 5 * (self._clock() - now))

    def finish(self) -> None:
        self._leave(answer_follows=False)
        self._kind = None

    def _leave(self, answer_follows: bool) -> None:
        """Closes the open thought or answer with everything that is still to be shown."""
        if self._kind == "thought":
            self._out.write("\n\n" if answer_follows else "\n")
        elif self._kind == "text":
            self._draw(last=True)
        self._out.flush()
        self._restart()

    def _draw(self, last: bool) -> None:
        from . import markdown

        columns, rows = self._size()
        # One column stays free: terminals and rich may disagree on the width of an emoji by one.
        width = max(20, columns - 1)
        if self._renderer is None or self._renderer.width != width:
            self._renderer = markdown.Renderer(width)
        stable, self._pending = (self._pending, "") if last else markdown.split_stable(self._pending)

        done = self._spaced(self._renderer.lines(stable))
        if done:
            self._first_block = False
            words = markdown.without_style(done)
            same = _common(words, self._printed)
            # What is printed may reach into the next block; a line that changed since is printed again, not lost.
            self._printed = self._printed[same:] if same == len(words) else []
            done = done[same:]
        live = self._spaced(self._renderer.lines(self._pending))
        words = markdown.without_style(live)
        same = _common(words, self._printed)
        self._printed = words[:same]
        live = live[same:]

        if len(live) > rows - 2:
            keep = max(1, rows // 2)
            # A table may still change in every line: show only its end for now, and the whole once it is
            # complete.
            if not markdown.ends_in_table(self._pending):
                done += live[:-keep]
                self._printed = words[:-keep]
            live = live[-keep:]
        self._region.update(done, live, columns)
        if last:
            self._region.close()

    def _spaced(self, lines: list[str]) -> list[str]:
        return lines if self._first_block or not lines else ["", *lines]


def _common(a: list[str], b: list[str]) -> int:
    """How many leading lines two lists share."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


class Region:
    """The lowest lines of the terminal, re-drawn in place; the cursor rests at the end of the last one."""

    def __init__(self, out: TextIO):
        self._out = out
        self._shown = [""]
        self._columns = 0

    def update(self, done: list[str], live: list[str], columns: int) -> None:
        """Prints `done` for good, and `live` below it. No line holds a newline or is wider than `columns`."""
        new = [*done, *(live or [""])]
        same = _common(new, self._shown)
        last = len(self._shown) - 1
        if self._columns not in (0, columns):
            # Resized: most terminals re-wrap what they show, so the old lines may fill more rows now.
            same = 0
            up = sum(max(1, -(-_cells(line) // columns)) for line in self._shown) - 1
        else:
            same = min(same, len(new) - 1)
            up = last - same
        self._columns = columns
        if up < 0:
            self._out.write("\n" + "\n".join(new[same:]))
        elif up == 0 and same == last and new[same].startswith(self._shown[last]):
            self._out.write(new[same][len(self._shown[last]) :])
            self._out.writelines("\n" + line for line in new[same + 1 :])
        else:
            # Erased and drawn in one synchronised update (DEC mode 2026, ignored where unknown): no flicker.
            climb = f"\x1b[{up}A" if up else ""
            self._out.write(f"\x1b[?2026h{climb}\r\x1b[J" + "\n".join(new[same:]) + "\x1b[?2026l")
        self._out.flush()
        self._shown = live or [""]

    def close(self) -> None:
        """Leaves the cursor at the start of the line below everything shown."""
        if self._shown != [""]:
            self._out.write("\n")
        self._shown = [""]


def _cells(line: str) -> int:
    from rich.text import Text

    return Text.from_ansi(line).cell_len


def terminal_size(stream: TextIO) -> tuple[int, int]:
    """(columns, rows) of the terminal behind `stream`; 80 by 24 where it does not say."""
    with suppress(OSError, ValueError):
        size = os.get_terminal_size(stream.fileno())
        if size.columns and size.lines:
            return size.columns, size.lines
    return 80, 24
