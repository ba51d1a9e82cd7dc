"""Turns with tools: calls are run until nothing is called, and the history stays whole however it ends."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from scripted import ScriptedModel
from tiny import write_tokenizer

from mlx_gemma4.chat import Chat
from mlx_gemma4.errors import ContextError
from mlx_gemma4.events import Done, Text, ToolCall
from mlx_gemma4.sampling import Sampling
from mlx_gemma4.tokenizer import Tokenizer
from mlx_gemma4.tools import ToolResult, run_turn

FOLDER = Path(__file__).parent / "fixtures" / "chat_template"
TEMPLATES = {name: (FOLDER / f"chat_template.{name}.jinja").read_text() for name in ("E2B-E4B", "12B-26B-31B")}
PICTURE = Image.new("RGB", (4, 4))


def look(what: str) -> str:
    """Looks something up.

    Args:
        what: It.
    """
    if what == "trouble":
        raise ValueError("found it")
    return f"{what} is on the shelf"


def called(what: str, name: str = "look") -> str:
    return f'<|tool_call>call:{name}{{what:<|"|>{what}<|"|>}}<tool_call|>'


class CallingModel(ScriptedModel):
    """Says `replies[n]` where n tool results and turns of its own lie behind it. Has no towers."""

    config = SimpleNamespace(vision=None, audio=None)

    def __contains__(self, part):
        return False

    def _next(self, ids):
        encode = lambda text: self.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
        result, opened = encode("<tool_response|>"), encode("<|turn>model\n")
        begins = [i + len(part) for part in (result, opened) for i in range(len(ids)) if ids[i : i + len(part)] == part]
        reply = self.replies[len(begins) - 1] if begins else ""
        said, empty = ids[max(begins, default=0) :], encode("<|channel>thought\n<channel|>")
        said = said[len(empty) :] if said[: len(empty)] == empty else said
        tokens = [*encode(reply), 50 if "call:" in reply else 106]
        return tokens[len(said)] if len(said) < len(tokens) else 0


@pytest.fixture(params=["E2B-E4B", "12B-26B-31B"])
def chat_of(tmp_path, request):
    """Makes chats that say `replies`, one after the other."""
    write_tokenizer(tmp_path)
    source = (tmp_path / "tokenizer.json").read_text()
    tokenizer = Tokenizer(source, chat_template=TEMPLATES[request.param], eos_token_ids=[1, 106, 50])

    def make(*replies: str, context: int = 100_000, **options: Any) -> Chat:
        model = CallingModel(tokenizer, list(replies), 8, context)
        return Chat(model, tokenizer, sampling=Sampling(temperature=0.0), **options)

    return make


def kinds(events: list[Any]) -> list[str]:
    return [e.kind for e in events if e.kind != "text"]


def test_a_turn_goes_on_until_nothing_is_called(chat_of):
    chat = chat_of(called("a pen"), called("trouble"), called("x", "find"), "done", tools=[look])
    events = list(run_turn(chat, "find them"))
    assert kinds(events) == [k for c in ("tool_call", "tool_call", "malformed") for k in (c, "done", "tool_result")] + [
        "done"
    ]
    results = [e.result for e in events if isinstance(e, ToolResult)]
    assert results[:2] == ["a pen is on the shelf", {"error": "ValueError: found it"}]
    assert "find" in results[2]["error"], "not declared"
    assert "".join(e.text for e in events if isinstance(e, Text)) == "done" and events[-1].reason == "stop"
    assert [m["role"] for m in chat.messages] == ["user"] + ["assistant", "tool"] * 3 + ["assistant"]


def test_a_call_that_cannot_be_read_is_answered(chat_of):
    chat = chat_of('<|tool_call>call:look{what:<|"|>x', called("a pen"), "done")
    # The stop token inside the string ends it.
    events = list(run_turn(chat, "find", [look]))
    assert kinds(events)[:3] == ["malformed", "done", "tool_result"] and events[-1].reason == "stop"
    assert chat.messages[2]["role"] == "tool" and "error" in chat.messages[2]["content"]


def test_rounds_are_limited(chat_of):
    chat = chat_of(*[called(f"thing {i}") for i in range(9)], "done", tools=[look])
    events = list(run_turn(chat, "find", max_rounds=2))
    results = [e.result for e in events if isinstance(e, ToolResult)]
    assert [r if isinstance(r, str) else r["error"][:21] for r in results] == [
        "thing 0 is on the shelf",
        "thing 1 is on the shelf",
        "no more calls are pos",
    ]
    assert events[-1].reason == "tool_calls"
    assert chat.messages[-1]["role"] == "tool", "the last call is answered, too"


def test_a_result_that_does_not_fit_is_told_as_an_error(chat_of):
    def read() -> str:
        """Reads a lot."""
        return "word " * 2000

    chat = chat_of("<|tool_call>call:read{}<tool_call|>", "too long", context=600, tools=[read])
    events = list(run_turn(chat, "read it"))
    assert events[-1].reason == "stop" and chat.messages[-1]["content"] == "too long"
    assert json.loads(chat.messages[2]["content"]) == {"error": "the results are too long to be read; ask for less"}
    with pytest.raises(ContextError):
        list(run_turn(chat, "word " * 1000))


def test_a_picture_for_a_model_that_does_not_see(chat_of):
    def show() -> Image.Image:
        """Shows."""
        return PICTURE

    chat = chat_of("<|tool_call>call:show{}<tool_call|>", "a pity", tools=[show])
    events = list(run_turn(chat, "show it"))
    assert events[-1].reason == "stop"
    assert "error" in chat.messages[2]["content"]


@pytest.mark.parametrize("where", ["call", "tool", "after"])
def test_a_turn_that_is_stopped_leaves_a_usable_history(chat_of, where):
    chat = chat_of(called("a pen") + called("a cup"), "all right", "all right", "all right", tools=[look])
    seen: list[Any] = []
    going = lambda: not (where == "tool" and any(isinstance(e, ToolResult) for e in seen))  # noqa: E731
    turn = run_turn(chat, "find", going=going)
    for event in turn:
        seen.append(event)
        if (where == "call" and isinstance(event, ToolCall)) or (where == "after" and isinstance(event, ToolResult)):
            turn.close()
            break
    if where == "tool":
        assert seen[-1].reason == "cancelled"
    calls = [c for m in chat.messages for c in m.get("tool_calls", ())]
    results = [m for m in chat.messages if m["role"] == "tool"]
    assert len(calls) == len(results) == (1 if where == "call" else 2)
    events = list(run_turn(chat, "go on"))
    assert events[-1].reason == "stop" and chat.messages[-1]["content"] == "all right"


def test_a_chat_without_tools_is_an_ordinary_turn(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    chat = Chat(ScriptedModel(tokenizer, ["hello"]), tokenizer, sampling=Sampling(temperature=0.0))
    events = list(run_turn(chat, "hi"))
    assert [e.text for e in events if isinstance(e, Text)] and isinstance(events[-1], Done)


def test_an_engine_answers_calls_too(tmp_path):
    from engine_cases import checkpoint

    from mlx_gemma4.engine import Engine

    def double(n: int) -> int:
        """Doubles."""
        return 2 * n

    with Engine(checkpoint(tmp_path)) as engine:
        chat = engine.chat(sampling=Sampling(temperature=0.0))
        form = {"type": "tool_call", "name": "double"}
        events = list(run_turn(chat, "double it", [double], max_rounds=1, response_format=form))
        found = [e for e in events if isinstance(e, ToolResult)]
        assert found[0].result == 2 * found[0].call.arguments["n"]
        assert [e.failed for e in found] == [False, True] and events[-1].reason == "tool_calls"
        calls = [c for m in chat.messages for c in m.get("tool_calls", ())]
        assert len(calls) == sum(m["role"] == "tool" for m in chat.messages) == 3, "also the one nobody wanted"
