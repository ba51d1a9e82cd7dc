"""Tools of an MCP server: a real one, run as a child process over stdio."""

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_gemma4.errors import Gemma4Error, UsageError
from mlx_gemma4.events import ToolCall
from mlx_gemma4.mcp_tools import McpServer, _parts, _read_command
from mlx_gemma4.media.items import MediaSettings, load_items
from mlx_gemma4.tools import ToolResult, answer

SCRIPT = str(Path(__file__).parent / "mcp_server.py")


@pytest.fixture(scope="module")
def server() -> Iterator[McpServer]:
    with McpServer([sys.executable, SCRIPT]) as server:
        yield server


def call(server: McpServer, name: str, /, **arguments: Any) -> ToolResult:
    return answer(ToolCall(name, arguments, ""), server.tools)


def test_its_tools_are_declared(server):
    by_name = {tool.name: tool for tool in server.tools}
    assert server.name == "shelf" and set(by_name) >= {"add", "say", "picture", "slow"}
    assert by_name["add"].declaration["function"] == {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a"],
        },
    }


def test_calls_and_their_results(server):
    assert call(server, "add", a=1).result == 2
    assert call(server, "say", text="hi").result == "you said hi"
    assert json.loads(call(server, "book", title="Emma").result) == {"title": "Emma", "pages": 4}
    text, picture = call(server, "picture").result
    assert text == {"type": "text", "text": "here"}
    [item] = load_items("image", picture["image"], MediaSettings(), image_tokens=70, hears=False)
    assert item.tokens > 0


def test_errors_are_results(server):
    wrong = call(server, "add", a="x")
    assert wrong.failed and "valid integer" in wrong.result["error"]
    assert call(server, "fail").failed


def test_several_threads_call_at_once(server):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda n: call(server, "add", a=n, b=n).result, range(20)))
    assert results == [2 * n for n in range(20)]


def test_its_environment_is_what_it_is_given(monkeypatch):
    monkeypatch.setenv("SECRET", "ours")
    monkeypatch.setenv("TOKEN", "for the server")
    with McpServer(f"GIVEN=$TOKEN {sys.executable} {SCRIPT}", env={"MORE": "1"}) as server:
        found = [call(server, "environment", name=n).result for n in ("GIVEN", "MORE", "SECRET")]
    assert found == ["for the server", "1", "not set"]


def test_a_slow_tool_and_a_server_that_dies(caplog):
    with McpServer([sys.executable, SCRIPT], timeout=1.0) as server:
        assert call(server, "slow", seconds=60).result == {"error": "slow did not answer within 1 seconds"}
    with McpServer([sys.executable, SCRIPT]) as server:
        for name in ("die", "add"):
            assert call(server, name, a=1).result == {"error": "the MCP server shelf has ended (the roof fell in)"}


def test_closing_ends_the_process(tmp_path):
    pid = tmp_path / "pid"
    script = tmp_path / "server.py"
    script.write_text(
        f"import os, runpy\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\n"
        f"runpy.run_path({SCRIPT!r}, run_name='__main__')"
    )
    server = McpServer([sys.executable, str(script)])
    process = int(pid.read_text())
    os.kill(process, 0)
    server.close()
    server.close()
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("the server still runs")
    assert "was closed" in call(server, "add", a=1).result["error"]


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import sys; sys.exit('no key given')", r"did not start: .*\(no key given\)"),
        ("print('hello')", "did not start"),
        ("import time; time.sleep(600)", "did not list its tools within 1 seconds"),
    ],
)
def test_a_server_that_does_not_start_is_one_line(code, says, capfd):
    with pytest.raises(Gemma4Error, match=says) as e:
        McpServer([sys.executable, "-c", code], start_timeout=1.0 if "sleep" in code else 60.0)
    assert "\n" not in str(e.value)
    assert capfd.readouterr() == ("", ""), "and nothing else is printed"
    assert logging.getLogger("mcp").handlers


def test_commands():
    with pytest.raises(Gemma4Error, match="No such file"):
        McpServer("no-such-program-anywhere")
    for command in ("", "A=1", 'x "y'):
        with pytest.raises(UsageError):
            McpServer(command)
    assert _read_command("A=b c 'd e' F=g") == ({"A": "b"}, ["c", "d e", "F=g"])


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(UsageError, match=r"pip install 'mlx-gemma4\[mcp\]'"):
        McpServer("anything")


def test_contents_that_a_conversation_does_not_hold():
    from mcp.types import AudioContent, EmbeddedResource, ResourceLink, TextContent, TextResourceContents

    sound = AudioContent(type="audio", data="UklGRg==", mime_type="audio/wav")
    assert _parts([sound]) == [{"type": "audio", "audio": b"RIFF"}]
    page = EmbeddedResource(type="resource", resource=TextResourceContents(uri="file:///a.txt", text="hello"))
    link = ResourceLink(type="resource_link", name="b", uri="file:///b.txt")
    said = [TextContent(type="text", text="see"), page, link]
    assert _parts(said) == "see\nfile:///a.txt\nhello\n[resource_link file:///b.txt]"
    assert _parts([]) == ""
