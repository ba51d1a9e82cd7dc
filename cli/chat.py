"""`gemma4 chat`: a conversation in the terminal.

Owns the order of things: load, introduce, answer the prompt given, then lines until Ctrl-D. Leaves the
conversation to `mlx_gemma4.chat.Chat`, slash commands to `tui/commands.py`, files in a line to `tui/attachments.py`,
editing to `tui/prompt.py`, drawing to `tui/stream.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_gemma4.errors import ContextError, Gemma4Error, UsageError

from . import failures, options
from .tui import attachments, commands, status
from .tui.pending import Pending, attached
from .tui.stream import AnswerView, open_view, terminal_size
from .tui.turn import between_prompts, interruptible, show_turn

if TYPE_CHECKING:
    from mlx_gemma4.chat import Chat

# (kind, source) of files to attach.
Files = Sequence[tuple[str, str]]


def command(
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="Answered first; without a terminal the command then ends."),
    ] = None,
    model: options.Model = options.DEMO,
    revision: options.Revision = None,
    dtype: options.Dtype = None,
    check: options.Check = False,
    system: options.System = None,
    think: options.Think = False,
    image: options.Images = None,
    audio: options.Audio = None,
    video: options.Videos = None,
    image_tokens: options.ImageTokens = None,
    video_tokens: options.VideoTokens = None,
    fps: options.Fps = None,
    max_frames: options.MaxFrames = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    context: options.Context = None,
    kv_bits: options.KvBits = None,
    kv_key_bits: options.KvKeyBits = None,
    kv_value_bits: options.KvValueBits = None,
    kv_bits_sliding: options.KvBitsSliding = None,
    kv_mode: options.KvMode = None,
    ple: options.Ple = "memory",
    prefill_step_size: options.PrefillStepSize = 2048,
    hide_thinking: options.HideThinking = False,
    no_markdown: options.NoMarkdown = False,
    stats: Annotated[
        bool,
        typer.Option("--stats", help="The long figures after each turn.", rich_help_panel="Screen"),
    ] = False,
) -> int:
    """Talk to a model. /help inside lists what you can do there; files may be dragged into the line.

    Without a terminal on stdin there is one turn: the prompt given, or else all of stdin.
    """
    kv = options.kv_options(kv_bits, kv_key_bits, kv_value_bits, kv_bits_sliding, kv_mode)
    changes = options.sampling_changes(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    files = options.media_files(image, audio, video)
    settings = options.media_settings(image_tokens, video_tokens, fps, max_frames)
    interactive = sys.stdin is not None and sys.stdin.isatty()
    if prompt is None and not interactive:
        prompt = options.piped_input()
    if prompt is not None:
        prompt = options.checked_text(prompt, "the prompt").strip()
    if not prompt and not interactive:
        raise UsageError("nothing to answer: give a prompt, pipe one in, or start gemma4 chat in a terminal")
    if system is not None:
        system = options.checked_text(system, "--system")

    from mlx_gemma4.chat import Chat
    from mlx_gemma4.sampling import Sampling

    from . import loader

    loaded, tokenizer = loader.open_model(
        model,
        revision=revision,
        dtype=dtype,
        check=check,
        context=context,
        ple=ple,
        towers=interactive or bool(files),
    )
    conversation = Chat(
        loaded,
        tokenizer,
        system,
        think,
        Sampling.from_defaults(tokenizer.generation_defaults, **changes),
        prefill_step_size=prefill_step_size,
        media=settings,
        **kv,
    )
    session = ChatSession(
        conversation,
        loader.introduction(model, loaded, kv) if interactive else [],
        markdown=not no_markdown,
        show_thoughts=not hide_thinking,
        long_stats=stats,
    )
    if interactive:
        return session.talk(prompt, files)
    if model == options.DEMO:
        session.say(loader.demo_notice())
    return session.once(prompt or "", files)


class ChatSession:
    """One conversation on one terminal. `title`: the lines that introduce the model."""

    def __init__(
        self,
        chat: Chat,
        title: list[str],
        *,
        markdown: bool = True,
        show_thoughts: bool = True,
        long_stats: bool = False,
    ):
        self.chat = chat
        self.title = title
        self.pending = Pending()
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
        from .tui.prompt import Prompt, is_block, message_of

        prompt = Prompt()
        for line in [*self.title, *([prompt.warning] if prompt.warning else [])]:
            self.say(line)
        self.say("/help shows the commands, Ctrl-D leaves")
        if first:
            print(f"> {first}", file=sys.stderr)
        if first or files:
            self._handle(first or "", files)
        while True:
            try:
                typed = prompt.ask(len(self.pending.items))
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
        before = len(self.chat.messages)
        try:
            done = show_turn(self.chat, self.pending.message(text), self._view(), patient=patient)
        finally:
            if len(self.chat.messages) > before:  # else nothing was said, and the message was taken back
                self.pending.drop_all()
        if self._long_stats:
            for line in status.long_stats(done.stats, self.chat.cache_status):
                self.say(line)
        else:
            columns = terminal_size(sys.stderr)[0] if sys.stderr.isatty() else None
            self.say(status.turn_line(done.stats, columns))
        return done
