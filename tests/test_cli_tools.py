"""Tools, thinking, forms of answers and saved conversations on the command line."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_cli_app import Ran, gemma4, one_line  # noqa: F401
from test_cli_terminal import CTRL_C, CTRL_D, Terminal, start  # noqa: F401
from test_tool_turns import CallingModel
from tiny import make_tiny

from mlx_gemma4.cli import loader
from mlx_gemma4.cli.tui.toolbox import Toolbox, from_file, open_toolbox, shown_call, shown_result
from mlx_gemma4.errors import UsageError
from mlx_gemma4.events import ToolCall
from mlx_gemma4.tokenizer import Tokenizer
from mlx_gemma4.tool_results import told
from mlx_gemma4.tools import ToolResult, answer

Run = Callable[..., Ran]
Start = Callable[..., Terminal]
HERE = Path(__file__).parent
TOOLS = str(HERE / "fixtures" / "tools_example.py")
TEMPLATE = HERE / "fixtures" / "chat_template" / "chat_template.12B-26B-31B.jinja"
PROGRAM = ("-m", "mlx_gemma4.cli.app")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint with a published template."""
    folder = make_tiny(tmp_path_factory.mktemp("cli") / "tiny", "26b-a4b")
    (folder / "chat_template.jinja").write_text(TEMPLATE.read_text())
    return str(folder)


@pytest.fixture
def says(tiny: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """says(*replies): the model that is loaded says these, one after the other."""

    def says(*replies: str) -> None:
        tokenizer = Tokenizer.from_folder(tiny)
        scripted = (CallingModel(tokenizer, [*replies]), tokenizer)
        monkeypatch.setattr(loader, "open_model", lambda *_, **__: scripted)

    return says


WEATHER = '<|tool_call>call:weather{city:<|"|>Oslo<|"|>}<tool_call|>'
GREEDY = ("--temperature", "0", "-m", "scripted")


# Files of tools


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def f(\n", "line 1: SyntaxError: '(' was never closed"),
        ("x = 1\nimport no_such_module_here\n", "line 2: ModuleNotFoundError: No module named 'no_such_module_here'"),
        ("raise SystemExit(3)\n", "line 1: SystemExit: 3"),
        ("def f(x: int): ...\n", "line 1: the tool f has no docstring"),
        ("\n\ndef f(x):\n    'F.'\n", "line 3: the tool f has no type hint for x (or begin its name with _"),
        ("x = 1\n", "defines no function"),
        ("from os.path import join\n", "defines no function"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(tmp_path: Path, source: str, says: str):
    file = tmp_path / "mine.py"
    file.write_text(source)
    with pytest.raises(UsageError) as e:
        from_file(str(file))
    text = str(e.value)
    assert says in text and "\n" not in text and str(file) in text


def test_a_file_may_import_what_lies_beside_it(tmp_path: Path):
    (tmp_path / "beside_it.py").write_text("def help_out(): return 'helped'\n")
    file = tmp_path / "mine.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom beside_it import help_out\n"
        "@dataclass\nclass Point:\n    x: int\n"
        "def f(at: Point) -> str:\n    'Finds.'\n    return help_out() + str(at.x)\ndef _not_this(x): ...\n"
    )
    [tool] = from_file(str(file))
    assert tool.run(**tool.arguments(ToolCall("f", {"at": {"x": "3"}}, ""))) == "helped3"


def test_tools_need_somebody_to_ask(gemma4: Run):  # noqa: F811
    ran = gemma4("chat", "hi", "--tools", TOOLS)
    assert ran.code == 2 and "no terminal to ask on; add --yes" in one_line(ran)
    for option, value, message in (
        ("--tools", "/no/such.py", "there is no file /no/such.py"),
        ("--mcp", "no-such-program-anywhere", "did not start"),
    ):
        assert message in one_line(gemma4("chat", "hi", "--yes", option, value))


def test_two_files_with_one_name():
    with pytest.raises(UsageError, match="two tools are called weather"):
        open_toolbox([TOOLS, TOOLS], None, True)


# How calls look


def test_calls_and_results_are_one_line():
    call = ToolCall("weather", {"city": "Oslo\n\x1b[2J", "list": [1, {"a": None}]}, "")
    assert shown_call(call) == 'weather(city="Oslo\\n\\u001b[2J", list=[1, {"a": null}])'
    long = shown_call(ToolCall("write", {"text": "x" * 500}, ""))
    assert len(long) < 170 and long.endswith("more characters")
    for result, said in (
        ("two\nlines", "-> two lines"),
        ({"error": "it broke"}, "-> failed: it broke"),
        ({"a": 1}, '-> {"a": 1}'),
        ([{"type": "text", "text": "see"}, {"type": "image", "image": b""}], "-> see [image]"),
        ("a\x1b]0;owned\x07b", "-> a]0;ownedb"),
    ):
        assert shown_result(ToolResult(call, result)) == said
    assert shown_result(ToolResult(call, "x", 1.25)) == "-> x (1.2 s)"


# A conversation with tools


def test_calls_are_asked_for_once(start: Start):  # noqa: F811
    chat = start(TOOLS=TOOLS)
    chat.wait("4 tools; /tools lists them")
    chat.send("weather\r")
    chat.wait('weather(city="Paris", days=2)')
    chat.wait("run weather?")
    for key in ("\r", "\x1b[A"):  # are no answers, although the arrow up ends in an A
        chat.send(key)
        time.sleep(0.5)
    chat.send("n")
    chat.wait("the user does not want weather to be run")
    chat.send("weather\r")
    chat.wait("run weather?")
    chat.send("y")
    chat.wait("-> 23 C in Paris")
    chat.wait("you said 'told \"23 C in Paris\"'")
    chat.send("weather\r")
    chat.wait("run weather?")
    chat.send("a")
    chat.wait("-> 23 C in Paris")
    chat.send("twice\r")
    chat.wait('weather(city="Oslo\\u001b[2J")')
    chat.wait("-> failed: weather was not run, its arguments are wrong: days")
    chat.send("oops\r")
    chat.wait("run oops?")
    chat.send("y")
    chat.wait("-> failed: OSError: the disk is gone")
    chat.send("broken call\r")
    chat.wait("a call that cannot be read: the call of weather ends in its middle")
    chat.wait("told {")
    chat.send(CTRL_D)
    assert chat.exit_code() == 0
    assert chat.output.count("run weather?") >= 3 and "Traceback" not in chat.output


def test_keys_typed_before_the_question_are_no_answer(start: Start):  # noqa: F811
    chat = start(TOOLS=TOOLS)
    chat.wait("Ctrl-D leaves")
    chat.send("weather\ryyyy")
    chat.wait("run weather?")
    with pytest.raises(AssertionError, match="no '-> '"):
        chat.wait("-> ", seconds=1.5)
    chat.send("n")
    chat.wait("-> failed")


def test_ctrl_c_stops_a_tool_and_a_question(start: Start):  # noqa: F811
    chat = start(TOOLS=TOOLS)
    chat.wait("Ctrl-D leaves")
    chat.send("nap\r")
    chat.wait("run nap?")
    chat.send("a")
    chat.wait("nap runs: 1 s")
    chat.send(CTRL_C)
    chat.wait("-> failed: the user stopped nap")
    chat.wait("stopped · ")
    chat.send("weather\r")
    chat.wait("run weather?")
    chat.send(CTRL_C)
    chat.wait("stopped · ")
    chat.send("count\r")
    # Two questions with calls and results, and this one.
    chat.wait("7 messages")


def test_yes_asks_nothing_and_rounds_end(start: Start):  # noqa: F811
    chat = start("again and again", TOOLS=TOOLS, YES="1")
    chat.wait("-> failed: no more calls are possible")
    chat.wait("31.2")
    assert "run again?" not in chat.output and chat.output.count("-> 1") == 40


def test_a_full_context_offers_room(start: Start):  # noqa: F811
    chat = start("hello")
    chat.wait("you said 'hello'")
    chat.send("it is full\r")
    chat.wait("make room?")
    chat.send("s")
    chat.wait("the oldest 2 messages were summed up")
    chat.wait("you said 'it is full'")
    chat.send("loop\r")
    chat.wait("stopped, it only repeated itself · ")


def test_edit_brings_the_question_back(start: Start):  # noqa: F811
    chat = start("hello")
    chat.wait("you said 'hello'")
    chat.send("/edit\r")
    chat.wait("> hello")
    chat.send(" there\r")
    chat.wait("you said 'hello there'")
    chat.send("count\r")
    chat.wait("3 messages")


def test_the_command_runs_tools_without_a_terminal(gemma4: Run, says: Callable):  # noqa: F811
    says(WEATHER, "It is warm.")
    ran = gemma4("chat", "weather?", "--tools", TOOLS, "--yes", *GREEDY)
    assert ran.code == 0 and ran.out == "It is warm.\n"
    call, result, figures = ran.err.splitlines()
    assert call == 'weather(city="Oslo")' and result.startswith("-> 22 C in Oslo") and "context" in figures


def test_tools_of_a_server(gemma4: Run, says: Callable):  # noqa: F811
    import sys

    says("<|tool_call>call:add{a:4,b:5}<tool_call|>", "Nine.")
    ran = gemma4("chat", "4 + 5?", "--mcp", f"{sys.executable} {HERE / 'mcp_server.py'}", "--yes", *GREEDY)
    assert ran.code == 0 and ran.out == "Nine.\n"
    assert ran.err.splitlines()[0] == "add(a=4, b=5)" and ran.err.splitlines()[1].startswith("-> 9")


# generate


def test_json_has_the_calls(gemma4: Run, says: Callable, tmp_path: Path):  # noqa: F811
    declared = tmp_path / "tools.json"
    declared.write_text(json.dumps([{"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}]))
    for file in (TOOLS, str(declared)):
        says(f"Let me look.{WEATHER}")
        ran = gemma4("generate", "weather?", "--tools", file, "--json", *GREEDY)
        record = json.loads(ran.out)
        assert record["text"] == "Let me look." and record["finish_reason"] == "tool_calls"
        assert record["tool_calls"] == [{"name": "weather", "arguments": {"city": "Oslo"}, "id": "call_0"}]
    says("<|tool_call>call:weather{city:<tool_call|>")
    record = json.loads(gemma4("generate", "weather?", "--tools", TOOLS, "--json", *GREEDY).out)
    assert list(record["tool_calls"][0]) == ["error"]
    says("hello")
    assert json.loads(gemma4("generate", "hi", "--json", *GREEDY).out)["tool_calls"] == []
    assert "with --json only" in one_line(gemma4("generate", "hi", "--tools", TOOLS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--think", "perhaps"], "--think takes off, on, low, medium, high or a number of tokens, not 'perhaps'"),
        (["--schema", "/no/such.json"], "--schema /no/such.json cannot be read"),
        (["--schema", "{nonsense"], "--schema is no JSON"),
        (["--schema", TOOLS], "is no JSON"),
        (["--schema", "{}", "--regex", "x"], "leave one out"),
        (["--raw", "--schema", "{}"], "--raw has no turns, so --schema mean"),
    ],
)
def test_bad_options_are_one_line(gemma4: Run, arguments: list[str], message: str):  # noqa: F811
    ran = gemma4("generate", "hi", *arguments)
    assert ran.code == 2 and message in one_line(ran)


def test_how_to_make_room_is_checked(gemma4: Run):  # noqa: F811
    assert "--on-full takes stop, drop, summarize" in one_line(gemma4("chat", "hi", "--on-full", "panic"))


SCHEMA = {"type": "object", "properties": {"level": {"enum": ["low", "high"]}}, "required": ["level"]}


def test_answers_of_a_form(gemma4: Run, tiny: str, tmp_path: Path):  # noqa: F811
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    for given in (str(file), json.dumps(SCHEMA)):
        ran = gemma4("generate", "how much?", "-m", tiny, "--schema", given, "--seed", "1")
        assert ran.code == 0 and json.loads(ran.out)["level"] in ("low", "high")
    ran = gemma4("generate", "when?", "-m", tiny, "--regex", "[0-9]{4}-[0-9]{2}", "--seed", "1")
    assert re.fullmatch(r"[0-9]{4}-[0-9]{2}\n", ran.out)
    assert "the response format cannot be used" in one_line(gemma4("generate", "x", "-m", tiny, "--regex", "("))


def test_a_form_that_is_cut_off_is_an_error(gemma4: Run, says: Callable):  # noqa: F811
    says("a" * 2000)
    ran = gemma4("generate", "say a", "--regex", "a{2000}b", *GREEDY)
    assert ran.code == 1 and set(ran.out.strip()) == {"a"}
    assert ran.err == "gemma4: error: the answer was cut off (repetition) before its form was complete\n"


# Sessions


def test_a_conversation_is_kept_and_resumed(start: Start, tiny: str, tmp_path: Path):  # noqa: F811
    file = tmp_path / "talk.safetensors"
    few = ("--max-tokens", "4", "--temperature", "0", "-m", tiny)
    chat = start("chat", "hello", "--system", "Be brief.", "--think", "low", *few, program=PROGRAM)
    chat.wait("context")
    chat.wait("4 out")
    chat.send(f"/save {file}\r")
    chat.wait("goes on")
    chat.send(CTRL_D)
    assert chat.exit_code() == 0
    again = start("chat", "--resume", str(file), *few, program=PROGRAM)
    again.wait("goes on after 1 question; ")
    again.wait("> hello")
    again.send("/system\r")
    again.wait("Be brief.")
    again.send("/think\r")
    again.wait("thinking is low, at most 256 tokens")
    again.send("more\r")
    again.wait("re-used")
    again.send("/clear\r")
    again.wait("a new conversation")
    again.send(f"/load {file}\r")
    again.wait("goes on after 1 question;")
    again.send("/load /no/such/file.safetensors\r")
    again.wait("gemma4: error: ")


def test_resuming_what_is_not_there(gemma4: Run, tiny: str):  # noqa: F811
    ran = gemma4("chat", "hi", "-m", tiny, "--resume", "/no/such.safetensors")
    assert ran.code == 1 and "/no/such.safetensors" in one_line(ran)


def test_the_page_is_true(tmp_path: Path):
    """The file of functions in docs/tools.md becomes tools."""
    page = (HERE.parent / "docs" / "tools.md").read_text(encoding="utf-8")
    source = re.search(r"```python\n# mytools\.py\n(.*?)```", page, re.DOTALL)
    assert source
    (tmp_path / "mytools.py").write_text(source[1])
    tools = {tool.name: tool for tool in from_file(str(tmp_path / "mytools.py"))}
    assert list(tools) == ["weather", "chart"]
    call = ToolCall("weather", {"city": "Oslo", "days": "2"}, "")
    assert answer(call, list(tools.values())).result == {"city": "Oslo", "celsius": [21.5, 21.5]}
    assert told(tools["chart"].run(values=[1, 2]))[0]["type"] == "image"
    for option in re.findall(r"`(--[a-z-]+)", page):
        assert option in (HERE.parent / "cli" / "options.py").read_text() or option in ("--json", "--model")


def test_a_toolbox_without_tools_costs_nothing():
    with open_toolbox(None, None, False) as box:
        assert box.tools == [] and isinstance(box, Toolbox)
