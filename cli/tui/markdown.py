"""Markdown to terminal lines, block by block.

Owns: cutting text into top-level blocks, telling finished blocks from the one still growing, and rendering
without dropping a character a reader could want (HTML tags, link addresses, single line breaks). Leaves
drawing to `stream.py`.
"""

import io
import re
from itertools import pairwise
from typing import Any, ClassVar

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, ListItem, Markdown, MarkdownElement, TableElement
from rich.segment import Segment
from rich.style import Style
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text
from rich.theme import Theme

_SGR = re.compile(r"\x1b\[[0-9;]*m")
_TRAILING_BLANKS = re.compile(r" +((?:\x1b\[0?m)?)$")
# Readable on dark and light backgrounds alike.
_THEME = Theme({"markdown.code": "bold cyan", "markdown.item.number": "bold", "markdown.block_quote": "italic"})

# `html` off shows tags as text; without `image` and `reference` their addresses stay readable too.
_PARSER = (
    MarkdownIt("commonmark", {"html": False})
    .enable(["strikethrough", "table"])
    .disable(["image", "reference", "html_block", "html_inline"])
)


class _Heading(Heading):
    """Bold at the left margin; rich centres headings and frames the first level."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        self.text.stylize(Style(bold=True, underline=self.tag == "h1"))
        yield self.text


class _CodeBlock(CodeBlock):
    """Code at the left margin between dimmed fences, without background or padding: it copies clean."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        language = "" if self.lexer_name in ("text", "") else self.lexer_name
        yield Text(f"```{language}", style="dim")
        code = str(self.text).rstrip("\n")
        yield Syntax(code, self.lexer_name, theme="ansi_dark", background_color="default", word_wrap=True, padding=0)
        yield Text("```", style="dim")


class _ListItem(ListItem):
    """Numbers with their dot: `1. one`, where rich writes ` 1 one`.

    The margin depends on the item's own number alone: with rich's, all items would move when the tenth comes.
    """

    def render_number(self, console: Console, options: ConsoleOptions, number: int, last_number: int) -> RenderResult:
        numeral = f" {number}. "
        style = console.get_style("markdown.item.number", default="none")
        lines = console.render_lines(
            self.elements, options.update(width=options.max_width - len(numeral)), style=self.style
        )
        for i, line in enumerate(lines):
            yield Segment(" " * len(numeral) if i else numeral, style)
            yield from line
            yield Segment("\n")


class _Table(TableElement):
    """Long words are folded; rich would cut them with an ellipsis."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for part in super().__rich_console__(console, options):
            if isinstance(part, Table):
                for column in part.columns:
                    column.overflow = "fold"
            yield part


class _Markdown(Markdown):
    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        "list_item_open": _ListItem,
        "table_open": _Table,
        "heading_open": _Heading,
        "fence": _CodeBlock,
        "code_block": _CodeBlock,
    }

    def __init__(self, text: str):
        super().__init__("", hyperlinks=False)
        self.parsed = _PARSER.parse(text)
        for token in self.parsed:
            for child in token.children or ():
                # Verse and addresses: models mean their single line breaks.
                if child.type == "softbreak":
                    child.type = "hardbreak"


def _block_starts(text: str) -> list[tuple[int, str]]:
    """(first line number, kind of token) of each top-level block."""
    return [(t.map[0], t.type) for t in _PARSER.parse(text) if t.level == 0 and t.map and t.nesting >= 0]


def split_stable(text: str) -> tuple[str, str]:
    """(blocks that can no longer change, the rest). Whole lines decide: `2` may still become `2. item`."""
    starts = _block_starts(text[: text.rfind("\n") + 1])
    if len(starts) < 2:
        return "", text
    lines = text.splitlines(keepends=True)
    cut = starts[-1][0]
    return "".join(lines[:cut]), "".join(lines[cut:])


def blocks(text: str) -> list[str]:
    """The source text of each top-level block."""
    lines = text.splitlines(keepends=True)
    starts = [*(line for line, _ in _block_starts(text)), len(lines)]
    return ["".join(lines[a:b]) for a, b in pairwise(starts)]


def ends_in_table(text: str) -> bool:
    starts = _block_starts(text)
    return bool(starts) and starts[-1][1] == "table_open"


def without_style(lines: list[str]) -> list[str]:
    """The lines without colours and weights."""
    return [_SGR.sub("", line) for line in lines]


class Renderer:
    """Text to lines for one terminal width, with the colours that terminal knows."""

    def __init__(self, width: int, **console_options: Any):
        self.width = width
        self._console = Console(
            file=io.StringIO(),
            width=width,
            force_terminal=True,
            legacy_windows=False,
            theme=_THEME,
            highlight=False,
            **console_options,
        )

    def lines(self, text: str) -> list[str]:
        """Screen lines of all blocks of `text`, one empty line between blocks; no newlines inside."""
        out: list[str] = []
        for block in blocks(text):
            with self._console.capture() as capture:
                self._console.print(_Markdown(block))
            lines = [_TRAILING_BLANKS.sub(r"\1", line) for line in capture.get().split("\n")]
            while lines and not _SGR.sub("", lines[-1]):
                lines.pop()
            while lines and not _SGR.sub("", lines[0]):
                lines.pop(0)
            out += ["", *lines] if out else lines
        return out
