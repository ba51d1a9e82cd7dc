"""The line a user types: editing, history, several lines, completion.

Owns everything of prompt_toolkit (imported nowhere else) and the history file. Leaves what a line means to
`commands.py` and to the chat.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.filters import completion_is_selected
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import create_output

from . import attachments, commands

QUOTES = '"""'


def history_path() -> Path:
    """$XDG_STATE_HOME/mlx-gemma4/history, by default under ~/.local/state."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "mlx-gemma4" / "history"


def open_history(path: Path) -> tuple[History, str | None]:
    """(history, why it will not outlive this session or None). The file is readable by its owner only."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))
    except OSError as e:
        return InMemoryHistory(), f"history is not kept: {path} cannot be written ({e.strerror})"
    return FileHistory(str(path)), None


def is_open(text: str) -> bool:
    """Whether a block begun with three quotes still lacks its end, so that Enter adds a line."""
    text = text.strip()
    return text.startswith(QUOTES) and (len(text) < 2 * len(QUOTES) or not text.endswith(QUOTES))


def is_block(text: str) -> bool:
    """Whether the text is a block in three quotes, to be sent as it is."""
    return text.strip().startswith(QUOTES)


def message_of(text: str) -> str:
    """What to send for the text typed: a `\"\"\"` block without its quotes, anything else as it is."""
    block = text.strip()
    if is_block(text) and not is_open(text):
        return block[len(QUOTES) : -len(QUOTES)].strip("\n")
    return text


class _Completer(Completer):
    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        typed = document.text_before_cursor
        if "\n" in document.text:
            return
        for line in commands.completions(typed):
            yield Completion(line, start_position=-len(typed))


def _bindings() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter", filter=~completion_is_selected)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("enter", filter=completion_is_selected)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.complete_state = None

    @keys.add("escape", "enter")
    @keys.add("escape", "c-j")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-g")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.open_in_editor()

    @keys.add(Keys.BracketedPaste)
    def _(event: KeyPressEvent) -> None:
        text = event.data.replace("\r\n", "\n").replace("\r", "\n")
        buffer = event.current_buffer
        buffer.insert_text(attachments.apart(text, buffer.document.text_before_cursor))

    return keys


class Prompt:
    """`ask` returns a line or block, or raises KeyboardInterrupt (what was typed: `dropped`) or EOFError."""

    def __init__(self) -> None:
        history, self.warning = open_history(history_path())
        self._session: PromptSession[str] = PromptSession(
            history=history,
            completer=_Completer(),
            complete_while_typing=True,
            key_bindings=_bindings(),
            multiline=True,
            prompt_continuation="  ",
            # The prompt belongs on the terminal also when the answers go into a file.
            output=create_output(stdout=sys.stderr if not sys.stdout.isatty() else sys.stdout),
        )
        self.dropped = ""

    def ask(self, attached: int = 0, begun: str = "") -> str:
        """attached: how many files go with what is typed; the prompt says so. begun: what the line begins with."""
        waiting = [("", f"{attached} attached ")] if attached else []
        try:
            return self._session.prompt(FormattedText([*waiting, ("bold", "> ")]), default=begun)
        except KeyboardInterrupt:
            self.dropped = self._session.default_buffer.text
            raise
