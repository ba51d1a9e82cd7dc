"""Tools of a Model Context Protocol server, which runs as a child process and talks over its stdin and stdout.

Owns one server: starting it, its list of tools, calls and their results, its end. Leaves the protocol to the official
`mcp` package (`pip install 'mlx-gemma4[mcp]'`), and running calls in a conversation to `tools.py`.

    with McpServer("uvx mcp-server-time") as server:
        for event in run_turn(chat, "What time is it in Oslo?", server.tools): ...

The package is asynchronous; here each server has an event loop on a thread of its own, and everything else waits.
"""

import asyncio
import base64
import json
import logging
import os
import re
import shlex
import tempfile
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from .errors import Gemma4Error, UsageError
from .tools import TIMEOUT, Tool

START = 60.0  # seconds until a server must have listed its tools; npx and uvx may download it first
_CLOSE = 10.0  # seconds until a server that does not end is left to itself; the package kills it after some four
_GRACE = 2.0  # seconds the server's own timeout may come after its tools'
_MOST_PAGES = 100  # of a list of tools
_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)


class McpServer:
    """A running server; its tools are in `tools`, ready for `run_turn`.

    command: as a shell reads it, but no shell runs it; `NAME=VALUE` before the program is its environment, and `$NAME`
    in such a value is looked up in ours. Or a list of program and arguments. env: more of its environment; of ours it
    sees HOME, PATH and the like, nothing else. start_timeout, timeout: seconds until it must have listed its tools, and
    answered a call.

    Raises UsageError for a command that makes no sense or without the `mcp` package, Gemma4Error when the server does
    not start. `close` ends it; so does the end of this process. What it writes to stderr is kept for error messages.
    """

    def __init__(
        self,
        command: str | Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        start_timeout: float = START,
        timeout: float = TIMEOUT,
    ):
        _mcp()  # in this thread: imports of two threads at once may meet
        given, words = _read_command(command)
        # The package tells its log of every line that is no message; nobody reads it here.
        logging.getLogger("mcp").addHandler(logging.NullHandler())
        self.name = Path(words[0]).stem  # until it says its own
        self._words, self._env, self._cwd = words, {**given, **(env or {})}, cwd
        self._timeout = timeout
        self._client: Any = None
        self._closed = False
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"MCP {self.name}", daemon=True)
        self._thread.start()
        ready: Future[list[Any]] = Future()
        self._life = asyncio.run_coroutine_threadsafe(self._live(ready), self._loop)
        try:
            found = ready.result(start_timeout)
        except (FutureTimeout, CancelledError):
            self.close()
            raise Gemma4Error(self._said(f"did not list its tools within {start_timeout:g} seconds")) from None
        except Exception as e:
            self.close()
            raise Gemma4Error(self._said(f"did not start: {_words(e)}; try the command in a shell")) from None
        except BaseException:  # Ctrl-C while it downloads
            self.close()
            raise
        self.tools = [self._tool(t) for t in found]

    def __enter__(self) -> "McpServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the server. Calls that still run fail. Again is allowed."""
        if self._loop.is_closed():
            return
        self._closed = True
        self._loop.call_soon_threadsafe(self._life.cancel)
        with suppress(FutureTimeout, CancelledError, Exception):
            asyncio.run_coroutine_threadsafe(_ended(self._loop), self._loop).result(_CLOSE)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE)
        if not self._thread.is_alive():
            self._loop.close()

    # The server's life, on the loop

    async def _live(self, ready: "Future[list[Any]]") -> None:
        """Starts the server, says what its tools are, and keeps it until it is cancelled.

        All in one task: the package wants its parts left by the task that entered them.
        """
        mcp = _mcp()
        parameters = mcp.StdioServerParameters(
            command=self._words[0], args=self._words[1:], env=self._env, cwd=os.fspath(self._cwd) if self._cwd else None
        )
        try:
            async with mcp.Client(mcp.stdio_client(parameters, errlog=self._errors)) as client:
                found = await _all_tools(client)
                self._client = client
                if client.server_info is not None:
                    self.name = client.server_info.name
                ready.set_result(found)
                await asyncio.Event().wait()
        except Exception as e:
            if not ready.done():
                ready.set_exception(e)
        finally:
            self._client = None
            ready.cancel()

    # Calls, from any thread

    def _tool(self, listed: Any) -> Tool:
        try:
            tool = Tool.from_declaration(
                {"name": listed.name, "description": listed.description, "parameters": listed.input_schema},
                partial(self._call, listed.name),
            )
        except UsageError as e:
            raise Gemma4Error(f"the tool {listed.name!r} of {self.name} cannot be declared: {e}") from None
        # The server checks arguments, by a schema that may say more than ours.
        return Tool(tool.name, tool.description, tool.parameters, tool.run, dict, self._timeout + _GRACE)

    def _call(self, name: str, /, **arguments: Any) -> Any:
        """What the server answers, as `tool_results.told` takes it. Raises Gemma4Error with what went wrong."""
        if self._client is None or self._loop.is_closed():
            raise Gemma4Error(self._said("was closed" if self._closed else "has ended"))
        mcp = _mcp()
        late = f"{name} did not answer within {self._timeout:g} seconds"
        call = self._client.call_tool(name, arguments, read_timeout_seconds=self._timeout)
        try:
            result = self._wait(call, self._timeout + _GRACE)
        except (FutureTimeout, CancelledError):
            raise Gemma4Error(late) from None
        except mcp.MCPError as e:
            if e.code == mcp.types.CONNECTION_CLOSED:
                self._client = None
                raise Gemma4Error(self._said("has ended")) from None
            raise Gemma4Error(late if e.code == mcp.types.REQUEST_TIMEOUT else _words(e)) from None
        content = _parts(result.content)
        if result.is_error:
            raise Gemma4Error(content if isinstance(content, str) else "the tool failed without saying why")
        # Beside structured results servers repeat them as text, for clients that know text only.
        if result.structured_content is not None and isinstance(content, str):
            value = _unwrapped(result.structured_content)
            # As text: a server's JSON must not pass for a part of a message that names a file of ours.
            return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value
        return content

    def _wait(self, work: Coroutine[Any, Any, Any], seconds: float) -> Any:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(seconds)
        finally:
            future.cancel()

    def _said(self, what: str) -> str:
        """`what` about this server, with the last line it wrote to stderr."""
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read()[-4000:].splitlines() if line.strip()]
        return f"the MCP server {self.name} {what}" + (f" ({lines[-1][:300]})" if lines else "")


def _mcp() -> Any:
    """The official package, which is an extra."""
    try:
        return import_module("mcp")
    except ImportError:
        raise UsageError("tools of MCP servers need the mcp package; pip install 'mlx-gemma4[mcp]'") from None


def _read_command(command: str | Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """(environment, program and arguments)."""
    if isinstance(command, str):
        try:
            words = shlex.split(command)
        except ValueError as e:
            raise UsageError(f"the command of an MCP server cannot be read ({e}): {command}") from None
    else:
        words = list(command)
    env: dict[str, str] = {}
    while words and (found := _ASSIGNMENT.fullmatch(words[0])):
        env[found[1]] = os.path.expandvars(found[2])
        words.pop(0)
    if not words:
        raise UsageError(f"the command of an MCP server names no program: {command!r}")
    words[0] = os.path.expanduser(words[0])
    return env, words


async def _all_tools(client: Any) -> list[Any]:
    found, cursor = [], None
    for _ in range(_MOST_PAGES):
        page = await client.list_tools(cursor=cursor)
        found += page.tools
        cursor = page.next_cursor
        if cursor is None:
            break
    return found


async def _ended(loop: asyncio.AbstractEventLoop) -> None:
    """Until no other task is left on the loop."""
    others = asyncio.all_tasks(loop) - {asyncio.current_task()}
    await asyncio.gather(*others, return_exceptions=True)


def _unwrapped(structured: Any) -> Any:
    """Servers of the official package put a result that is no object under "result"."""
    if isinstance(structured, dict) and set(structured) == {"result"}:
        return structured["result"]
    return structured


def _parts(content: Sequence[Any]) -> Any:
    """A result's content: text alone as text, else parts; what a conversation cannot hold, by its name."""
    parts: list[dict[str, Any]] = []
    for block in content:
        if block.type == "text":
            parts.append({"type": "text", "text": block.text})
        elif block.type == "image":
            parts.append({"type": "image", "image": f"data:{block.mime_type};base64,{block.data}"})
        elif block.type == "audio":
            parts.append({"type": "audio", "audio": base64.b64decode(block.data)})
        elif block.type == "resource" and hasattr(block.resource, "text"):
            parts.append({"type": "text", "text": f"{block.resource.uri}\n{block.resource.text}"})
        else:
            where = getattr(block, "uri", None) or getattr(getattr(block, "resource", None), "uri", "")
            parts.append({"type": "text", "text": f"[{block.type} {where}]"})
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return parts


def _words(problem: BaseException) -> str:
    """The innermost of what asynchronous groups wrap, in one line."""
    while isinstance(problem, BaseExceptionGroup) and problem.exceptions:
        problem = problem.exceptions[0]
    return " ".join(str(problem).split()) or type(problem).__name__
