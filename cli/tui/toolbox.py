"""The tools of a chat: where they come from, who may run them, and how calls look.

Owns files of functions, the servers started for this chat, what was allowed, and the lines about calls. Leaves running
them to `mlx_gemma4.tools`, servers to `mlx_gemma4.mcp_tools`, and the key that allows a call to `ask.py`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_gemma4.errors import UsageError

from . import status
from .ask import ask, can_ask
from .stream import DIM, RESET, printable, wants_style

if TYPE_CHECKING:
    from mlx_gemma4.events import Malformed, ToolCall
    from mlx_gemma4.mcp_tools import McpServer
    from mlx_gemma4.tools import Tool, ToolResult

_ANSWERS = {"y": "yes", "a": "always", "n": "no"}
_LINE = 160  # characters of a call or result that nobody has to decide on
_MOST_ASKED = 4_000  # of a call that somebody does


class Toolbox:
    """tools: what the model may call. yes: nobody is asked."""

    def __init__(self, tools: Sequence[Tool] = (), servers: Sequence[McpServer] = (), yes: bool = False):
        self.tools = list(tools)
        self.servers = list(servers)
        self.yes = yes
        self.allowed: set[str] = set()  # for the rest of the chat
        self.going: Callable[[], bool] = lambda: True  # set by the turn that runs

    def __enter__(self) -> Toolbox:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            server.close()

    def confirm(self, call: ToolCall, tool: Tool) -> bool:
        """Shows a call, and asks where nobody has answered for all calls of this tool yet."""
        if self.yes or call.name in self.allowed:
            status.dim(shown_call(call))
            return True
        status.dim(shown_call(call, _MOST_ASKED))
        if not can_ask():  # the terminal has gone since the chat began
            return False
        key = ask(f"run {call.name}?", _ANSWERS, self.going)
        if key == "a":
            self.allowed.add(call.name)
        return key in ("y", "a")

    def describe(self) -> list[str]:
        """One line for each tool, and which server it is of."""
        lines = []
        for tool in self.tools:
            asked = "" if not self.yes and tool.name not in self.allowed else " (runs without asking)"
            said = printable(tool.description).split("\n")[0]
            lines.append(shortened(f"{tool.name}({', '.join(_parameters(tool))}){asked}: {said}", _LINE))
        return lines


def open_toolbox(files: Sequence[str] | None, commands: Sequence[str] | None, yes: bool) -> Toolbox:
    """The functions of files and the tools of MCP servers, which are started.

    Raises UsageError for a file that cannot be used, for two tools of one name, and where calls could not be asked for;
    Gemma4Error for a server that does not start.
    """
    if not files and not commands:
        return Toolbox()
    if not yes and not can_ask():
        raise UsageError("tools are run only when somebody says yes, and there is no terminal to ask on; add --yes")
    from mlx_gemma4.tools import as_tools

    tools = as_tools([tool for file in files or () for tool in from_file(file)])
    box = Toolbox(tools, yes=yes)
    try:
        for command in commands or ():
            from mlx_gemma4.mcp_tools import McpServer

            with status.busy(f"starting {printable(command)}"):
                server = McpServer(command)
            box.servers.append(server)
            taken = {tool.name for tool in box.tools}
            for tool in server.tools:
                name = f"{server.name}.{tool.name}" if tool.name in taken else tool.name
                box.tools.append(dataclasses.replace(tool, name=name))
        as_tools(box.tools)
    except BaseException:
        box.__exit__()
        raise
    return box


def from_file(path: str) -> list[Tool]:
    """The public functions that a Python file defines. Raises UsageError, in one line, naming the line at fault."""
    from mlx_gemma4.tools import Tool

    file = Path(path).expanduser()
    if not file.is_file():
        raise UsageError(f"--tools: there is no file {path}")
    name = f"gemma4_tools_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UsageError(f"--tools takes a Python file, not {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and type hints of the file are looked up
    # What lies beside the file can be imported from it, now and when it is called; at the end, to hide nothing of ours.
    sys.path.append(str(file.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:
        raise UsageError(f"--tools {path}: {_where(e, file)}{_words(e)}") from e
    functions = [f for n, f in vars(module).items() if not n.startswith("_") and inspect.isfunction(f)]
    tools = []
    for function in functions:
        if function.__module__ != name:
            continue  # imported
        try:
            tools.append(Tool.from_function(function))
        except UsageError as e:
            line = function.__code__.co_firstlineno
            raise UsageError(f"--tools {path}, line {line}: {e} (or begin its name with _: then it is no tool)") from e
    if not tools:
        raise UsageError(f"--tools {path}: the file defines no function; see docs/tools.md for an example")
    return tools


def declared_in(path: str) -> list[Tool]:
    """The tools of a Python file, or of a JSON list of declarations. Raises UsageError."""
    from mlx_gemma4.tools import as_tools

    if not path.endswith(".json"):
        return from_file(path)
    try:
        found = json.loads(Path(path).expanduser().read_bytes())
    except OSError as e:
        raise UsageError(f"--tools {path} cannot be read: {e.strerror}") from None
    except ValueError as e:
        raise UsageError(f"--tools {path} is no JSON: {e}") from None
    return as_tools(found if isinstance(found, list) else [found])


def _where(error: BaseException, file: Path) -> str:
    """Which line of the file an error came from."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f"line {error.lineno}: "
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == file]
    return f"line {lines[-1]}: " if lines else ""


def _words(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _parameters(tool: Tool) -> list[str]:
    required = tool.parameters.get("required", ())
    return [name if name in required else f"{name}?" for name in tool.parameters["properties"]]


# How calls and results look


def shown_call(call: ToolCall, most: int = _LINE) -> str:
    """`weather(city="Paris", days=2)`; control characters escaped."""
    arguments = ", ".join(f"{name}={_json(value)}" for name, value in call.arguments.items())
    return shortened(f"{call.name}({arguments})", most)


def shown_result(result: ToolResult) -> str:
    """One line: what was told to the model, or what went wrong, and how long it took."""
    told = result.result
    if result.failed:
        text = f"failed: {told['error']}"
    elif isinstance(told, list) and told and all(isinstance(p, dict) and "type" in p for p in told):
        text = " ".join(part["text"] if part["type"] == "text" else f"[{part['type']}]" for part in told)
    else:
        text = told if isinstance(told, str) else _json(told)
    took = f" ({result.seconds:.1f} s)" if result.seconds >= 0.5 else ""
    return f"-> {shortened(text, _LINE)}{took}"


def malformed(event: Malformed) -> str:
    return shortened(f"a call that cannot be read: {event.error}", _LINE)


def shortened(text: str, most: int) -> str:
    """In one line of at most `most` characters."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= most else f"{text[: most - 30]} ... {len(text) - most + 30:,} more characters"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


class ToolMeter:
    """Says on a terminal that a tool is running once it has for over a second; looked at between its steps."""

    def __init__(self, after: float = 1.0, clock: Callable[[], float] = time.monotonic):
        self._enabled = wants_style(sys.stderr)
        self._after, self._clock = after, clock
        self._name, self._start, self._shown = "", 0.0, -1

    def start(self, name: str) -> None:
        self._name, self._start = name, self._clock()

    def tick(self) -> None:
        seconds = int(self._clock() - self._start)
        if self._enabled and self._name and seconds >= self._after and seconds != self._shown:
            sys.stderr.write(f"{status.WIPE}{DIM}{self._name} runs: {seconds} s, Ctrl-C stops it{RESET}")
            sys.stderr.flush()
            self._shown = seconds

    def clear(self) -> None:
        if self._shown >= 0:
            sys.stderr.write(status.WIPE)
            sys.stderr.flush()
        self._name, self._shown = "", -1
