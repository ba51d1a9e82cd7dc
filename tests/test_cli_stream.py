"""Answers on the screen: whatever the pieces and the screen, what remains in the scrollback is the whole text."""

import io
import random
import re
from collections.abc import Callable

import pytest
from fake_chat import MARKDOWN

from mlx_gemma4.cli.tui import stream
from mlx_gemma4.cli.tui.markdown import Renderer, blocks, split_stable
from mlx_gemma4.cli.tui.stream import AnswerView, MarkdownView, PlainView

SEQUENCE = re.compile(r"\x1b\[\??[0-9;]*[A-Za-z]")

LONG = (
    MARKDOWN
    + "\n## Numbers\n\n"
    + "".join(f"{i}. item number {i} with some words to wrap the line at narrow widths\n" for i in range(1, 40))
    + "\n```\n"
    + "".join(f"line {i} of a listing\n\n" for i in range(40))
    + "```\n\n"
    + "| n | n squared |\n|---|---|\n"
    + "".join(f"| {i} | {i * i} |\n" for i in range(40))
    + "\nA last *paragraph* with <html> tags, 漢字 and 👍🏽 emoji.\nA second line"
)


class Screen(io.StringIO):
    """A terminal that knows what we write: text, newlines, cursor up, erase below, colours. Keeps all rows."""

    def __init__(self, columns: int, rows: int):
        super().__init__()
        self.columns, self.height = columns, rows
        self.rows: list[str] = [""]
        self.row = self.column = 0
        self.bytes_written = 0

    def isatty(self) -> bool:
        return True

    def write(self, data: str) -> int:
        self.bytes_written += len(data)
        at = 0
        while at < len(data):
            found = SEQUENCE.match(data, at)
            if found:
                self._sequence(found.group())
                at = found.end()
                continue
            self._character(data[at])
            at += 1
        return len(data)

    def _sequence(self, text: str) -> None:
        if text.endswith("A"):
            self.row -= int(text[2:-1])
            top = max(0, len(self.rows) - self.height)
            assert self.row >= top, "the cursor left the screen: rows in the scrollback cannot be re-drawn"
        elif text == "\x1b[J":
            self.rows[self.row] = self.rows[self.row][: self.column]
            del self.rows[self.row + 1 :]
        else:
            assert text in ("\x1b[?2026h", "\x1b[?2026l") or text.endswith("m"), repr(text)

    def _character(self, c: str) -> None:
        if c == "\r":
            self.column = 0
        elif c == "\n":
            self.row, self.column = self.row + 1, 0
            if self.row == len(self.rows):
                self.rows.append("")
        else:
            assert c.isprintable() or c in "\u200d", repr(c)
            line = self.rows[self.row]
            self.rows[self.row] = line[: self.column] + c + line[self.column + 1 :]
            self.column += 1


def pieces(text: str, seed: int) -> list[str]:
    chance = random.Random(seed)
    out = []
    while text:
        n = chance.choice([1, 1, 2, 3, 5, 9, 40])
        out.append(text[:n])
        text = text[n:]
    return out


def plain(lines: list[str]) -> list[str]:
    return [SEQUENCE.sub("", line).rstrip() for line in lines]


def shown(screen: Screen) -> list[str]:
    lines = [row.rstrip() for row in screen.rows]
    assert lines[-1] == "" and screen.column == 0, "the cursor must rest on an empty line"
    return lines[:-1]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (34, 8), (120, 60)])
def test_any_pieces_leave_the_rendered_text(columns: int, rows: int, seed: int):
    screen = Screen(columns, rows)
    clock = iter(range(10**6))
    view = MarkdownView(screen, size=lambda: (columns, rows), clock=lambda: next(clock))
    for piece in pieces(LONG, seed):
        view.text(piece)
    view.finish()
    assert shown(screen) == plain(Renderer(columns - 1).lines(LONG))


def test_slow_clock_draws_less_and_shows_the_same():
    every, throttled = Screen(80, 24), Screen(80, 24)
    fast = iter(range(10**6))
    for screen, clock in ((every, lambda: float(next(fast))), (throttled, lambda: 0.0)):
        view = MarkdownView(screen, size=lambda: (80, 24), clock=clock)
        for piece in pieces(LONG, 1):
            view.text(piece)
        view.finish()
    assert shown(every) == shown(throttled)
    assert throttled.bytes_written < every.bytes_written * 0.6


def test_lines_that_change_above_the_screen_are_repeated_once_not_lost():
    # The closing stars change the line with the opening ones, which is far above the screen by then.
    words = [f"w{i}" for i in range(300)]
    screen = Screen(60, 10)
    clock = iter(range(10**6))
    view = MarkdownView(screen, size=lambda: (60, 10), clock=lambda: next(clock))
    for word in words:
        view.text(f"**{word} " if word == "w5" else f"{word}** " if word == "w290" else f"{word} ")
    view.text("\nafter\n")
    view.finish()
    lines = shown(screen)
    final = plain(Renderer(59).lines(" ".join(words).replace("w5 ", "**w5 ").replace("w290", "w290**") + "\nafter"))
    assert lines[-len(final) :] == final, "the whole final form is there"
    assert len(lines) < 2 * len(final) + 2


def test_a_new_colour_alone_prints_nothing_twice():
    comment = "".join(f"line {i} of a comment\n" for i in range(40))
    source = f"```c\n/* {comment}*/\nint x;\n```\n"
    screen = Screen(60, 10)
    clock = iter(range(10**6))
    view = MarkdownView(screen, size=lambda: (60, 10), clock=lambda: next(clock))
    for line in source.splitlines(keepends=True):
        view.text(line)
    view.finish()
    assert shown(screen) == plain(Renderer(59).lines(source))


def test_unchanged_lines_are_not_drawn_again():
    screen = Screen(80, 24)
    clock = iter(range(10**6))
    view = MarkdownView(screen, size=lambda: (80, 24), clock=lambda: next(clock))
    view.text("- first\n- second\n- third")
    before = screen.bytes_written
    view.text(" and more")
    assert screen.bytes_written - before < len(" and more") + 40, "only the last line has changed"
    view.finish()


def test_a_narrowed_terminal_loses_nothing():
    screen = Screen(80, 24)
    size = [80, 24]
    clock = iter(range(10**6))
    view = MarkdownView(screen, size=lambda: (size[0], size[1]), clock=lambda: next(clock))
    view.text("one two three four five six seven eight nine ten eleven twelve")
    size[0] = screen.columns = 100
    view.text(" thirteen")
    view.finish()
    assert shown(screen)[-1].endswith("thirteen")


def test_thoughts_are_dim_and_apart():
    out = io.StringIO()
    view = MarkdownView(out, size=lambda: (80, 24))
    view.thought("\n\nhmm ")
    view.thought("well")
    view.text("\n\nYes.")
    view.finish()
    assert out.getvalue().startswith("\x1b[2mhmm \x1b[0m\x1b[2mwell\x1b[0m\n\n")
    assert SEQUENCE.sub("", out.getvalue()) == "hmm well\n\nYes.\n"


@pytest.mark.parametrize("make", [lambda out: MarkdownView(out), lambda out: PlainView(io.StringIO(), out)])
def test_a_thought_that_was_stopped_ends_its_line(make: Callable[[io.StringIO], AnswerView]):
    out = io.StringIO()
    view = make(out)
    view.thought("hmm")
    view.finish()
    assert SEQUENCE.sub("", out.getvalue()).removeprefix("[thought] ") == "hmm\n"


def test_hidden_thoughts_leave_no_trace():
    out = io.StringIO()
    view = MarkdownView(out, show_thoughts=False, size=lambda: (80, 24))
    view.thought("hmm")
    view.text("Yes.")
    view.finish()
    assert SEQUENCE.sub("", out.getvalue()) == "Yes.\n"


def test_a_model_cannot_drive_the_terminal():
    screen = Screen(80, 24)
    view = MarkdownView(screen, size=lambda: (80, 24))
    view.thought("a\x1b[2J")
    view.text("b\x1b]0;title\x07\x9b31mc\x08")
    view.finish()
    assert shown(screen) == ["a[2J", "", "b]0;title31mc"]


def test_nothing_a_reader_could_want_is_dropped():
    source = (
        'a <div class="x">tag</div> [link](http://example.org/a) ![picture](pic.png) line\nbreak\n\n'
        "[1]: http://example.org/reference\n\n<!-- note -->\n\n7. seven\n8. eight\n\n"
        "| head | " + "long" * 20 + " |\n|---|---|\n| x | " + "word" * 30 + " |\n"
    )
    text = "\n".join(plain(Renderer(60).lines(source)))
    for wanted in (
        '<div class="x">tag</div>',
        "link (http://example.org/a)",
        "picture",
        "pic.png",
        "line\nbreak",
        "[1]: http://example.org/reference",
        "<!-- note -->",
        "7. seven",
        "8. eight",
    ):
        assert wanted in text
    squeezed = re.sub(r"\s", "", text)
    assert squeezed.count("long") == 20 and squeezed.count("word") == 30


def test_code_copies_clean():
    lines = plain(Renderer(60).lines("```python\nif x:\n    y = 1\n\n    z\n```\n"))
    assert lines == ["```python", "if x:", "    y = 1", "", "    z", "```"]


@pytest.mark.parametrize("seed", range(40))
def test_blocks_and_splits_keep_every_character(seed: int):
    chance = random.Random(seed)
    tokens = ["#", "-", "1. ", "> ", "|", "```", "\n", "\n\n", "    ", "a", " b", "*", "_", "[x](y)", "~", "\t", "|-|"]
    text = "".join(chance.choice(tokens) for _ in range(80))
    assert "".join(split_stable(text)) == text
    assert "".join("".join(blocks(text)).split()) == "".join(text.split())
    Renderer(30).lines(text)


def test_a_number_may_still_become_a_list_item():
    assert split_stable("1. one\n\n2") == ("", "1. one\n\n2")
    assert split_stable("text\n\n- a\n") == ("text\n\n", "- a\n")
    assert split_stable("```\n\n# no heading\n\n") == ("", "```\n\n# no heading\n\n")


def test_plain_view_in_a_pipe_is_the_text_alone():
    out = io.StringIO()
    view = PlainView(out, None)
    view.thought("not here")
    view.text("*a*")
    view.text("\x1b[1m b\n")
    view.finish()
    assert out.getvalue() == "*a*\x1b[1m b\n"


def test_plain_view_ends_its_last_line():
    out, err = io.StringIO(), io.StringIO()
    view = PlainView(out, err)
    view.thought("hm")
    view.text("yes")
    view.finish()
    assert out.getvalue() == "yes\n"
    assert err.getvalue() == "[thought] hm\n[answer]\n"


def test_style_needs_a_willing_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert stream.wants_style(Screen(80, 24))
    assert not stream.wants_style(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not stream.wants_style(Screen(80, 24))
    monkeypatch.setenv("NO_COLOR", "")
    assert stream.wants_style(Screen(80, 24))
    monkeypatch.setenv("TERM", "dumb")
    assert not stream.wants_style(Screen(80, 24))
