"""The dialogue of `gemma4 chat`: one conversation on one terminal.

Owns the order of prompts, commands and turns, what is said about failures, and the offer of room in a full context.
Leaves slash commands to `commands.py`, files in a line to `attachments.py`, editing to `prompt.py`, a turn to
`turn.py`, drawing to `stream.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mlx_gemma4.errors import ContextError, Gemma4Error, UsageError

from .. import failures
from . import attachments, commands, status
from .ask import ask, can_ask
from .pending import Pending, attached
from .stream import AnswerView, open_view, printable, terminal_size
from .toolbox import Toolbox, shortened
from .turn import between_prompts, interruptible, show_turn

if TYPE_CHECKING:
    from mlx_gemma4.chat import Chat

# (kind, source) of files to attach.
Files = Sequence[tuple[str, str]]


class ChatSession:
    """One conversation on one terminal.

    title: the lines that introduce the model. open_file: reads a saved conversation. file: where this one is kept.
    offer_room: ask what to do when the context is full.
    """

    def __init__(
        self,
        chat: Chat,
        title: list[str],
        *,
        markdown: bool = True,
        show_thoughts: bool = True,
        long_stats: bool = False,
        toolbox: Toolbox | None = None,
        open_file: Callable[[str], Chat] | None = None,
        file: str | None = None,
        offer_room: bool = True,
    ):
        self.chat = chat
        self.title = title
        self.toolbox = toolbox or Toolbox()
        self.file = file
        self.next_line = ""
        self.pending = Pending()
        self._open_file = open_file
        self._offer_room = offer_room
        self._markdown = markdown
        self._show_thoughts = show_thoughts
        self._long_stats = long_stats

    def say(self, text: str) -> None:
        status.dim(text)

    def attach(self, kind: str, source: str) -> None:
        """Reads a file, keeps it for the next message and says what it costs. Raises Gemma4Error."""
        with interruptible():
            items = self.pending.add(self.chat.senses, kind, source)
        for line in attached(items):
            self.say(line)

    def load(self, path: str) -> None:
        """Goes on with a saved conversation in the place of this one. Raises Gemma4Error, and this one goes on."""
        if self._open_file is None:
            raise UsageError("this chat cannot load another conversation")
        with status.busy(f"loading {printable(path)}"):
            self.chat = self._open_file(path)
        self.file = path
        self.pending.drop_all()
        for line in resumed(self.chat):
            self.say(line)

    def once(self, text: str, files: Files = ()) -> int:
        """One turn; returns the exit code. Errors pass through."""
        for kind, source in files:
            self.attach(kind, source)
        done = self._turn(text, patient=False)
        return failures.INTERRUPTED if done.reason == "cancelled" else 0

    def talk(self, first: str | None = None, files: Files = ()) -> int:
        """The dialogue until Ctrl-D or /exit. A failed turn is reported and the conversation goes on."""
        with between_prompts():
            return self._talk(first, files)

    def _talk(self, first: str | None, files: Files) -> int:
        from .prompt import Prompt, is_block, message_of

        prompt = Prompt()
        for line in [*self.title, *([prompt.warning] if prompt.warning else [])]:
            self.say(line)
        for line in resumed(self.chat):
            self.say(line)
        if self.toolbox.tools:
            self.say(f"{len(self.toolbox.tools)} tools; /tools lists them")
        self.say("/help shows the commands, Ctrl-D leaves")
        if first:
            print(f"> {first}", file=sys.stderr)
        if first or files:
            self._handle(first or "", files)
        while True:
            try:
                begun, self.next_line = self.next_line, ""
                typed = prompt.ask(len(self.pending.items), begun)
            except KeyboardInterrupt:
                if not prompt.dropped.strip():
                    self.say("Ctrl-D or /exit leaves")
                continue
            except EOFError:
                return 0
            if commands.is_command(typed) and not attachments.starts_with_file(typed):
                if self._guard(lambda line=typed: commands.run(self, line)):
                    return 0
            elif is_block(typed):  # pasted text: what looks like a file in it is part of it
                self._handle(message_of(typed).strip())
            else:
                found = attachments.split(typed.strip())
                self._handle(found.text, [(file.kind, file.path) for file in found.files])

    def _handle(self, text: str, files: Files = ()) -> None:
        """Attaches the files and sends the text with them; where one cannot be read, or nothing is asked, it waits."""
        read = [self._guard(lambda kind=k, source=s: self.attach(kind, source) or True) for k, s in files]
        if text and all(read):
            self._guard(lambda: self._turn(text, patient=True))
            self.say("")
        elif text:
            self.say("not sent; what was attached waits for the next message" if self.pending.items else "not sent")
        elif any(read):
            self.say("now ask about it; /drop takes it away again")

    def _guard(self, work: Any) -> Any:
        """What `work` returns. An error is reported and gives None: the conversation must outlive it."""
        try:
            return work()
        except KeyboardInterrupt:
            self.say("stopped")
        except UsageError as error:
            self.say(str(error))
        except (BrokenPipeError, EOFError):
            raise
        except ContextError as error:
            failures.report(error)
            drop = "/drop takes away what is attached, " if self.pending.items else ""
            self.say(f"{drop}/clear starts a new conversation")
        except Gemma4Error as error:
            failures.report(error)
        except Exception as error:
            failures.report(error)
            self.say("the conversation up to the last answer is still here")
        return None

    def _view(self) -> AnswerView:
        return open_view(markdown=self._markdown, show_thoughts=self._show_thoughts)

    def _turn(self, text: str, *, patient: bool) -> Any:
        try:
            done = self._answer(text, patient)
        except ContextError as error:
            how = self._how_to_make_room(error) if patient else None
            if how is None:
                raise
            before, self.chat.on_full = self.chat.on_full, how
            try:
                done = self._answer(text, patient)
            finally:
                self.chat.on_full = before
        if self._long_stats:
            for line in status.long_stats(done.stats, self.chat.cache_status):
                self.say(line)
        else:
            columns = terminal_size(sys.stderr)[0] if sys.stderr.isatty() else None
            self.say(status.turn_line(done.stats, columns))
        return done

    def _answer(self, text: str, patient: bool) -> Any:
        before = len(self.chat.messages)
        try:
            message = self.pending.message(text)
            return show_turn(self.chat, message, self._view(), patient=patient, toolbox=self.toolbox)
        finally:
            if len(self.chat.messages) != before:  # else nothing was said, and the message was taken back
                self.pending.drop_all()

    def _how_to_make_room(self, error: ContextError) -> Any:
        """What somebody chose for the oldest turns; None for nothing, and where there are none or nobody to ask."""
        if not self._offer_room or not can_ask() or not self.chat.messages:
            return None
        self.say(f"the context is full: {failures.one_line(error)}")
        with interruptible():
            key = ask("make room?", {"d": "drop the oldest turns", "s": "summarize them", "n": "no"})
        if key == "s":
            self.say("summing up the oldest turns ...")
        return {"d": "drop", "s": "summarize"}.get(key or "")


def resumed(chat: Chat) -> list[str]:
    """What to say about a conversation that is not new: how long it is and how it ended."""
    if not chat.messages:
        return []
    from mlx_gemma4.media.content import text_of

    asked = [m for m in chat.messages if m["role"] == "user"]
    questions = f"{len(asked):,} question{'' if len(asked) == 1 else 's'}"
    lines = [f"goes on after {questions}; {chat.context_used:,} tokens need not be read again"]
    for message in (*asked[-1:], *chat.messages[-1:]):
        if message["role"] in ("user", "assistant") and message.get("content"):
            mark = ">" if message["role"] == "user" else " "
            lines.append(f"{mark} {shortened(text_of(message['content']), 160)}")
    return lines
