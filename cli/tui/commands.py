"""The slash commands of `gemma4 chat`: names, help, completion and what each does to the conversation.

Owns the table of commands and the wording of their answers. Leaves reading lines to `prompt.py`, the
conversation to `mlx_gemma4.chat.Chat`, and allowed ranges to `mlx_gemma4.sampling.Sampling`, which refuses a
bad value itself.
"""

from __future__ import annotations

import dataclasses
import difflib
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, get_args, get_type_hints

from mlx_gemma4.errors import UsageError
from mlx_gemma4.kv_bits import BITS, number

from .. import options
from . import attachments, status
from .pending import describe

if TYPE_CHECKING:
    from mlx_gemma4.chat import Chat

    from .pending import Pending
    from .toolbox import Toolbox


class Session(Protocol):
    """What a command may touch."""

    chat: Chat

    pending: Pending

    toolbox: Toolbox

    file: str | None  # where the conversation was saved or came from

    next_line: str  # what the next prompt begins with

    @property
    def title(self) -> list[str]: ...

    def attach(self, kind: str, source: str) -> None: ...

    def say(self, text: str) -> None: ...

    def load(self, path: str) -> None: ...


@dataclasses.dataclass(frozen=True)
class Command:
    """`run(session, argument)` returns True to leave the chat."""

    name: str
    usage: str
    help: str
    run: Callable[[Session, str], bool | None]
    aliases: tuple[str, ...] = ()


def is_command(line: str) -> bool:
    """Whether a line is a command: `/word`. A path (`/usr/bin`) or a line starting with a space is not."""
    word = line.split(maxsplit=1)[0] if line.strip() else ""
    return line.startswith("/") and "/" not in word[1:]


def run(session: Session, line: str) -> bool:
    """Runs one slash command and returns whether the chat ends. Raises UsageError for a bad name or value."""
    word, _, argument = line.strip().partition(" ")
    command = _BY_NAME.get(word)
    if command is None:
        close = difflib.get_close_matches(word, _BY_NAME, n=1)
        hint = f"did you mean {close[0]}?" if close else "/help lists the commands"
        raise UsageError(f"unknown command {word}; {hint} (a space before the slash sends the line to the model)")
    return bool(command.run(session, argument.strip()))


def completions(text: str) -> list[str]:
    """Whole lines that may follow from the line typed so far."""
    word, space, argument = text.partition(" ")
    if not space:
        return [name for name in _BY_NAME if name.startswith(word)] if word.startswith("/") else []
    if word[1:] in attachments.KINDS:
        return [f"{word} {path}" for path in attachments.completions(argument, word[1:])]
    choices = {
        "/set": setting_names,
        "/think": lambda: ["on", "off", "low", "medium", "high"],
        "/kv": lambda: [f"{b:g}" for b in BITS],
    }.get(word)
    return [f"{word} {c}" for c in choices() if c.startswith(argument)] if choices else []


def setting_names() -> list[str]:
    from mlx_gemma4.sampling import Sampling

    return _names(Sampling)


def _names(sampling: Any) -> list[str]:
    # Token ids to suppress belong to the checkpoint, not to a conversation.
    return [f.name for f in dataclasses.fields(sampling) if f.name != "suppress_tokens"]


def change_setting(sampling: Any, name: str, text: str) -> Any:
    """A copy of `sampling` with one field set from what the user typed. Raises UsageError."""
    field = name.replace("-", "_").lower()
    names = _names(sampling)
    if field not in names:
        close = difflib.get_close_matches(field, names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
        raise UsageError(f"no setting {name!r}; {hint}")
    kinds = get_type_hints(type(sampling))[field]
    kinds = get_args(kinds) or (kinds,)
    value: Any
    if text.lower() in ("none", "off") and type(None) in kinds:
        value = None
    else:
        number = float if float in kinds else int
        try:
            value = number(text)
        except ValueError:
            kind = "number" if number is float else "whole number"
            raise UsageError(f"{field} takes a {kind}, not {text!r}") from None
    return dataclasses.replace(sampling, **{field: value})


def _help(session: Session, argument: str) -> None:
    width = max(len(c.usage) for c in COMMANDS)
    for command in COMMANDS:
        also = f" (also {', '.join(command.aliases)})" if command.aliases else ""
        session.say(f"  {command.usage:<{width}}  {command.help}{also}")
    session.say('  Enter sends · Alt-Enter, or a line starting with """, for several lines')
    session.say("  Ctrl-C stops an answer · Ctrl-G opens your editor · Ctrl-D leaves")
    session.say("  A picture, sound or clip may also be dragged into the line")


def _attach(kind: str) -> Callable[[Session, str], None]:
    def run(session: Session, argument: str) -> None:
        files = attachments.arguments(argument)
        if not files:
            raise UsageError(f"/{kind} takes a file, for example /{kind} ~/{_EXAMPLES[kind]}")
        for file in files:
            session.attach(kind, file)

    return run


_EXAMPLES = {"image": "picture.png", "audio": "speech.wav", "video": "clip.mp4"}


def _attachments(session: Session, argument: str) -> None:
    for place, item in enumerate(session.pending.items, 1):
        session.say(f"  {place}  {describe(item)}")
    session.say("they go with the next message" if session.pending.items else "nothing is attached")


def _drop(session: Session, argument: str) -> None:
    for item in session.pending.drop(argument):
        session.say(f"taken away: {describe(item)}")


def _clear(session: Session, argument: str) -> None:
    session.chat.clear()
    session.pending.drop_all()
    session.say("a new conversation; the system prompt and the settings stay")


def _system(session: Session, argument: str) -> None:
    if not argument:
        session.say(f"system prompt: {session.chat.system}" if session.chat.system else "no system prompt")
    elif argument.lower() in ("none", "off"):
        session.chat.set_system(None)
        session.say("no system prompt from the next turn on")
    else:
        session.chat.set_system(_unquote(argument))
        session.say("system prompt changed from the next turn on")


def _set(session: Session, argument: str) -> None:
    words = argument.split()
    if words[:1] == ["parameter"]:  # the spelling of other chat tools
        words = words[1:]
    if not words:
        for name in _names(session.chat.sampling):
            session.say(f"  {name:<24} {getattr(session.chat.sampling, name)}")
        return
    if len(words) != 2:
        raise UsageError("/set takes a name and a value, for example /set temperature 0.7; /set alone lists them")
    session.chat.sampling = change_setting(session.chat.sampling, *words)
    name = words[0].replace("-", "_").lower()
    session.say(f"{name} is {getattr(session.chat.sampling, name)} from the next turn on")


def _stats(session: Session, argument: str) -> None:
    stats = session.chat.stats
    if stats is None:
        session.say("no turn yet")
        return
    for line in status.long_stats(stats, session.chat.cache_status):
        session.say(f"  {line}")


def _kv(session: Session, argument: str) -> None:
    from mlx_gemma4.kernels import backend

    if argument:
        bits = number(argument, "/kv")
        session.chat.set_kv(kv_bits=bits)
        session.say(f"{bits:g} bits from the next turn on, which reads the conversation again")
    for line in session.chat.cache_status:
        session.say(f"  {line}")
    for operation, path in sorted(backend.status().items()):
        session.say(f"  {operation.replace('_', ' ')}: {path}")


def _think(session: Session, argument: str) -> None:
    if argument:
        session.chat.thinking = options.thinking(argument, "/think") or False
    session.say(f"thinking is {_thinking(session.chat.thinking)}")


def _thinking(how: Any) -> str:
    from mlx_gemma4.guides import thinking_budget

    on, tokens = thinking_budget(how)
    if not on or tokens is None:
        return "on" if on else "off"
    return f"{how}, at most {tokens:,} tokens" if isinstance(how, str) else f"on, at most {tokens:,} tokens"


def _tools(session: Session, argument: str) -> None:
    lines = session.toolbox.describe()
    for line in lines:
        session.say(f"  {line}")
    if not lines:
        session.say("no tools; start with gemma4 chat --tools FILE or --mcp COMMAND")


def _save(session: Session, argument: str) -> None:
    path = _unquote(argument) or session.file
    if not path:
        raise UsageError("/save takes a file, for example /save ~/talk.safetensors")
    file = Path(path).expanduser()
    file = file if file.suffix else file.with_suffix(".safetensors")
    if file.exists() and str(file) != session.file:
        raise UsageError(f"{file} is there already; choose another name, or delete it first")
    session.chat.save(file)
    session.file = str(file)
    again = f"gemma4 chat --resume {shlex.quote(str(file))}"
    session.say(f"saved to {file}, {status.size(file.stat().st_size)}; {again} goes on")


def _load(session: Session, argument: str) -> None:
    if not argument:
        raise UsageError("/load takes a file that /save wrote")
    session.load(str(Path(_unquote(argument)).expanduser()))


def _edit(session: Session, argument: str) -> None:
    turns = [i for i, message in enumerate(session.chat.messages) if message["role"] == "user"]
    if not turns:
        raise UsageError("nothing was asked yet")
    if argument and not (argument.isdecimal() and 1 <= int(argument) <= len(turns)):
        raise UsageError(f"/edit takes how many questions to go back, from 1 to {len(turns)}, not {argument!r}")
    at = turns[-int(argument or 1)]
    content = session.chat.messages[at]["content"]
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    session.pending.drop_all()
    session.pending.items += [part[part["type"]] for part in parts if part["type"] != "text"]
    session.next_line = "".join(part["text"] for part in parts if part["type"] == "text")
    session.chat.messages[at:] = []
    session.say("taken back, with what came after it; change it and send it again")


def _model(session: Session, argument: str) -> None:
    if argument:
        raise UsageError("the model cannot change during a conversation; leave and start with gemma4 chat --model NAME")
    for line in session.title:
        session.say(line)


def _exit(session: Session, argument: str) -> bool:
    return True


COMMANDS = (
    Command("/help", "/help", "this list", _help, ("/?",)),
    Command("/clear", "/clear", "forget the conversation", _clear, ("/reset",)),
    Command("/image", "/image FILE", "show a picture with the next message", _attach("image")),
    Command("/audio", "/audio FILE", "the same with a sound", _attach("audio")),
    Command("/video", "/video FILE", "the same with a clip", _attach("video")),
    Command("/attachments", "/attachments", "what waits for the next message", _attachments),
    Command("/drop", "/drop [NUMBER]", "take away what waits, or one of it", _drop),
    Command("/system", "/system [TEXT|off]", "show, change or drop the system prompt", _system),
    Command("/set", "/set [NAME VALUE]", "show or change how answers are sampled", _set),
    Command("/think", "/think [HOW]", "think first: off, on, low, medium, high or N tokens", _think),
    Command("/tools", "/tools", "what the model may call", _tools),
    Command("/edit", "/edit [N]", "take back the last question, or N", _edit, ("/undo",)),
    Command("/save", "/save [FILE]", "keep the conversation, for --resume", _save),
    Command("/load", "/load FILE", "go on with one that was kept", _load),
    Command("/stats", "/stats", "what the last turn cost", _stats),
    Command("/kv", "/kv [BITS]", "what the cache keeps; or change it, as --kv-bits", _kv),
    Command("/model", "/model", "what runs here", _model),
    Command("/exit", "/exit", "leave", _exit, ("/bye", "/quit")),
)
_BY_NAME = {name: command for command in COMMANDS for name in (command.name, *command.aliases)}


def _unquote(text: str) -> str:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1] if quoted else text
