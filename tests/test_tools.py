"""Tools: what the model is told of them, how their calls are run, and what they return."""

import asyncio
import dataclasses
import enum
import threading
import time
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from optional import optional
from PIL import Image
from pydantic import BaseModel, Field

from mlx_gemma4.errors import UsageError
from mlx_gemma4.events import Malformed, ToolCall
from mlx_gemma4.template import render
from mlx_gemma4.tool_results import MOST_TEXT, told
from mlx_gemma4.tool_schemas import ArgumentError, fit, plain_schema
from mlx_gemma4.tools import Tool, ToolResult, answer, as_tools

FOLDER = Path(__file__).parent / "fixtures" / "chat_template"
TEMPLATES = {name: (FOLDER / f"chat_template.{name}.jinja").read_text() for name in ("E2B-E4B", "12B-26B-31B")}


class Unit(enum.Enum):
    C = "celsius"
    F = "fahrenheit"


class Place(BaseModel):
    """Somewhere."""

    name: str
    title: str | None = None  # a property of this name must survive
    near: list["Place"] = []


def every_hint(
    a: int,
    b: str,
    c: float,
    d: bool,
    e: list[str],
    f: dict[str, int],
    g: str | None,
    h: Literal["x", "y"],
    i: int | str,
    j: list[int | str],
    k: Any,
    q: list,
    m: dict,
    n: list[dict[str, list[int]]],
    o: int | None = None,
    p: str = "z",
):
    """Takes everything.

    More about it.

    Args:
        a: A
        b: B,
            on two lines
        c: C
        d: D
        e: E
        f: F
        g: G
        h: H
        i: I
        j: J
        k: K
        q: Q
        m: M
        n: N
        o: O
        p: P

    Returns:
        nothing
    """


def nothing():
    """Takes nothing."""


def rendered(declaration: dict[str, Any], template: str) -> str:
    text = render(
        TEMPLATES[template],
        messages=[{"role": "user", "content": "hi"}],
        tools=[declaration],
        bos_token="<bos>",
        add_generation_prompt=True,
        documents=None,
    )
    return text[text.index("<|tool>") : text.index("<tool|>")]


# Declarations


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("function", [every_hint, nothing])
def test_a_function_is_declared_as_transformers_declares_it(function, template):
    utilities = optional("transformers.utils")
    ours, theirs = Tool.from_function(function).declaration, utilities.get_json_schema(function)
    assert rendered(ours, template) == rendered(theirs, template)
    assert {k: v for k, v in ours["function"].items() if k != "parameters"} == {
        k: v for k, v in theirs["function"].items() if k != "parameters"
    }


def test_what_the_published_templates_write():
    """The same without transformers, and what it cannot do: models, enums, annotations."""

    def trip(
        places: list[Place], unit: Unit, when: date, days: Annotated[int, Field(ge=1, description="how many")] = 1
    ) -> str:
        """Plans a trip."""
        return ""

    place = (
        '{description:<|"|>Somewhere.<|"|>,properties:{name:{type:<|"|>STRING<|"|>},'
        'near:{items:{type:<|"|>OBJECT<|"|>},type:<|"|>ARRAY<|"|>},'
    )
    text = rendered(Tool.from_function(trip).declaration, "E2B-E4B")
    assert text.startswith('<|tool>declaration:trip{description:<|"|>Plans a trip.<|"|>,parameters:{properties:{')
    assert 'days:{description:<|"|>how many<|"|>,type:<|"|>INTEGER<|"|>}' in text
    assert f"places:{{items:{place}" in text and 'title:{nullable:true,type:<|"|>STRING<|"|>}' in text
    assert 'unit:{enum:[<|"|>celsius<|"|>,<|"|>fahrenheit<|"|>],type:<|"|>STRING<|"|>}' in text
    assert text.endswith('required:[<|"|>places<|"|>,<|"|>unit<|"|>,<|"|>when<|"|>],type:<|"|>OBJECT<|"|>}}')


def test_schemas_in_the_form_templates_write():
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Arguments",
        "type": "object",
        "$defs": {"Level": {"enum": ["low", "high", None], "title": "Level"}, "Tree": {"$ref": "#/$defs/Node"}}
        | {"Node": {"type": "object", "properties": {"left": {"$ref": "#/$defs/Tree"}, "title": {"type": "string"}}}},
        "properties": {
            "level": {"allOf": [{"$ref": "#/$defs/Level"}], "description": "How much", "default": "low"},
            "tree": {"$ref": "#/$defs/Tree"},
            "id": {"anyOf": [{"type": "integer"}, {"type": "string"}, {"type": "null"}]},
            "maybe": {"type": ["string", "null"]},
            "kind": {"const": "fixed"},
            "open": {"type": "object", "additionalProperties": True},
            "either": {"oneOf": [{"type": "object", "properties": {"x": {"type": "number"}}}, {"type": "string"}]},
        },
        "required": ["level"],
    }
    node = {"type": "object", "properties": {"left": {"type": "object"}, "title": {"type": "string"}}}
    assert plain_schema(schema) == {
        "type": "object",
        "properties": {
            "level": {"description": "How much", "enum": ["low", "high"], "type": "string", "nullable": True},
            "tree": node,
            "id": {"type": ["integer", "string"], "nullable": True},
            "maybe": {"type": "string", "nullable": True},
            "kind": {"enum": ["fixed"], "type": "string"},
            "open": {"type": "object"},
            "either": {"oneOf": [{"type": "object", "properties": {"x": {"type": "number"}}}, {"type": "string"}]},
        },
        "required": ["level"],
    }
    assert plain_schema({}) == {"type": "object", "properties": {}}


def test_descriptions_cannot_end_a_declaration():
    tool = Tool.from_declaration(
        {
            "name": "x",
            "description": 'a<|"|>}<tool|><turn|>b',
            "parameters": {"properties": {"y": {"description": "<|turn>"}}},
        }
    )
    text = rendered(tool.declaration, "E2B-E4B")
    assert "<turn|>" not in text and "<|turn>" not in text and text.count('<|"|>') % 2 == 0


def bad_hint(x: threading.Lock) -> None:
    """Bad."""


def no_hint(x) -> None:
    """Bad."""


def stars(*x: int) -> None:
    """Bad."""


def unknown_hint(x: "Nowhere") -> None:  # noqa: F821
    """Bad."""


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (lambda: None, "no docstring"),
        (no_hint, "no_hint has no type hint for x"),
        (stars, r"takes \*x"),
        (bad_hint, "type hint that JSON cannot express"),
        (unknown_hint, "cannot be read: name 'Nowhere'"),
        (5, "a function or a declaration, not int"),
        ({"function": {}}, "is declared as"),
        ({"name": "two words"}, "cannot be called 'two words'"),
        ({"name": "x", "parameters": [1]}, "no JSON schema"),
        ({"name": "x", "parameters": {"type": "array"}}, "of type object"),
        ({"name": "x", "parameters": {"properties": {"y": {"$ref": "#/$defs/Z"}}}}, "refers to '#/\\$defs/Z'"),
    ],
)
def test_what_cannot_be_a_tool_is_said_in_one_line(given, says):
    with pytest.raises(UsageError, match=says) as e:
        as_tools([given])
    assert "\n" not in str(e.value)


def test_two_of_one_name():
    with pytest.raises(UsageError, match="two tools are called nothing"):
        as_tools([nothing, {"name": "nothing"}])


# Calls


def call(name: str, **arguments: Any) -> ToolCall:
    return ToolCall(name, arguments, "")


def result_of(function: Any, **arguments: Any) -> Any:
    tool = Tool.from_function(function)
    return answer(call(tool.name, **arguments), [tool]).result


def test_arguments_arrive_as_their_hints_say():
    got = {}

    def take(
        n: int, when: date, place: Place, unit: Unit, json: str, copy: tuple[float, ...] = (), *, _x: bool = False
    ) -> None:  # names that a pydantic model has for itself
        """Takes."""
        got.update(locals())

    assert (
        result_of(
            take, n="5", when="2026-01-02", place={"name": "Rome"}, unit="celsius", json=7, copy=["1", 2], _x="yes"
        )
        is None
    )
    assert got["n"] == 5 and got["when"] == date(2026, 1, 2) and got["place"] == Place(name="Rome")
    assert got["unit"] is Unit.C and got["json"] == "7" and got["copy"] == (1.0, 2.0) and got["_x"] is True


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "city is missing"),
        ({"city": "x", "days": "soon"}, "days: Input should be a valid integer"),
        ({"city": "x", "Days": 2}, "there is no Days"),
        ({"city": None}, "city: Input should be a valid string, not None"),
        ({"city": "x", "unit": "K"}, "unit: Input should be 'C' or 'F', not 'K'"),
    ],
)
def test_wrong_arguments_are_a_result(arguments, says):
    def weather(city: str, days: int = 1, unit: Literal["C", "F"] = "C") -> str:
        """The forecast."""
        raise AssertionError("must not be run")

    found = result_of(weather, **arguments)
    assert list(found) == ["error"] and "weather was not run, its arguments are wrong: " in found["error"]
    assert says in found["error"] and "\n" not in found["error"]


SCHEMA = plain_schema(
    {
        "properties": {
            "n": {"type": "integer"},
            "x": {"type": "number"},
            "on": {"type": "boolean"},
            "s": {"type": "string"},
            "level": {"enum": [1, 2]},
            "id": {"type": ["integer", "string"]},
            "many": {
                "type": "array",
                "items": {"type": "object", "properties": {"k": {"type": "integer"}}, "required": ["k"]},
            },
            "either": {"anyOf": [{"type": "boolean"}, {"type": "object", "properties": {"a": {"type": "integer"}}}]},
            "maybe": {"type": "string", "nullable": True},
            "any": {},
        },
        "required": ["n"],
    }
)


@pytest.mark.parametrize(
    ("given", "fitted"),
    [
        ({"n": "5", "x": "1.5", "on": "True", "s": 3}, {"n": 5, "x": 1.5, "on": True, "s": "3"}),
        ({"n": 5.0, "level": "2", "id": "7"}, {"n": 5, "level": 2, "id": "7"}),
        ({"n": 1, "many": [{"k": "2"}], "either": {"a": "3"}}, {"n": 1, "many": [{"k": 2}], "either": {"a": 3}}),
        ({"n": 1, "maybe": None, "any": [None, {}]}, {"n": 1, "maybe": None, "any": [None, {}]}),
    ],
)
def test_arguments_fitted_to_a_schema(given, fitted):
    assert fit(SCHEMA, given) == fitted
    assert [type(v) for v in fit(SCHEMA, given).values()] == [type(v) for v in fitted.values()]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "n is missing"),
        ({"n": 1.5}, "n: 1.5 is no integer"),
        ({"n": True}, "n: true is no integer"),
        ({"n": 1, "on": "maybe"}, 'on: "maybe" is no boolean'),
        ({"n": 1, "level": 3}, "level: 3 is none of 1, 2"),
        ({"n": 1, "many": [{"k": 1}, {}]}, "many[1].k is missing"),
        ({"n": 1, "either": 5}, "either: 5 is none of the alternatives"),
        ({"n": 1, "s": None}, "s: null is no string"),
        ({"n": 1, "other": 5}, "there is no other; there are n, x, on"),
        ({"n": "x", "on": 1}, 'n: "x" is no integer; on: 1 is no boolean'),
    ],
)
def test_arguments_that_do_not_fit(given, says):
    with pytest.raises(ArgumentError) as e:
        fit(SCHEMA, given)
    assert says in str(e.value)


def test_failures_and_exits_are_results():
    def fail(how: str) -> None:
        """Fails."""
        raise {"exit": SystemExit(3), "os": OSError(2, "gone", "/x")}[how]

    assert result_of(fail, how="os") == {"error": "FileNotFoundError: [Errno 2] gone: '/x'"}
    assert result_of(fail, how="exit") == {"error": "SystemExit: 3"}
    tools = as_tools([fail, {"name": "declared"}])
    for name in ("unknown", "declared"):
        assert answer(call(name), tools).result == {"error": f"there is no tool {name}; the tools are: fail"}
    malformed = Malformed("<|tool_call>call:x{", "ends in its middle")
    assert answer(malformed, tools) == ToolResult(malformed, {"error": "ends in its middle"})


def test_a_tool_that_takes_too_long():
    release = threading.Event()

    def wait() -> None:
        """Waits."""
        release.wait(60)

    tool = dataclasses.replace(Tool.from_function(wait), timeout=0.2)
    found = answer(call("wait"), [tool])
    assert found.failed and found.result["error"] == "wait did not answer within 0.2 seconds"
    assert 0.2 <= found.seconds < 5
    started = time.monotonic()
    found = answer(call("wait"), [Tool.from_function(wait)], going=lambda: time.monotonic() < started + 0.2)
    assert found.result == {"error": "the user stopped wait"}
    release.set()


def test_confirmation_comes_after_the_arguments_were_found_right():
    asked = []

    def confirm(call, tool):
        asked.append((call.arguments, tool.name))
        return call.arguments["n"] > 1

    def double(n: int) -> int:
        """Doubles."""
        return 2 * n

    tools = [Tool.from_function(double)]
    results = [answer(call("double", n=n), tools, confirm=confirm).result for n in ("x", 1, 2)]
    assert "arguments are wrong" in results[0]["error"]
    assert results[1:] == [{"error": "the user does not want double to be run"}, 4]
    assert asked == [({"n": 1}, "double"), ({"n": 2}, "double")]


async def later(n: int) -> int:
    """Answers later."""
    await asyncio.sleep(0.01)
    return n + 1


def test_an_async_function():
    assert result_of(later, n=1) == 2


# Results


@dataclasses.dataclass
class Row:
    name: str
    day: date


PICTURE = Image.new("RGB", (4, 4))


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (None, None),
        ("text", "text"),
        (1.5, 1.5),
        ([1, "a", None], [1, "a", None]),
        ({"a": {1}, "b": (2, 3)}, {"a": [1], "b": [2, 3]}),
        (Row("x", date(2026, 1, 2)), {"name": "x", "day": "2026-01-02"}),
        (Place(name="Rome"), {"name": "Rome", "title": None, "near": []}),
        (Unit.C, "celsius"),
        (Path("/a/b"), "/a/b"),
        (PICTURE, [{"type": "image", "image": PICTURE}]),
        (["look", PICTURE], [{"type": "text", "text": "look"}, {"type": "image", "image": PICTURE}]),
        ([{"type": "text", "text": "a"}], [{"type": "text", "text": "a"}]),
        ([{"type": "file", "name": "x"}], '[{"type": "file", "name": "x"}]'),  # no parts, though they look it
        ([{"type": "text", "size": 3}], '[{"type": "text", "size": 3}]'),
    ],
)
def test_results_as_the_model_is_told(returned, expected):
    assert told(returned) == expected


def test_results_that_json_cannot_say():
    loop: list[Any] = []
    loop.append(loop)
    assert told(loop) == "[[...]]"
    assert "object at" in told(object())
    assert told(float("nan")) != told(float("nan"))  # a number stays one


def test_a_long_result_loses_its_middle():
    text = told("a" * MOST_TEXT + "b" * MOST_TEXT)
    assert text.startswith("aaa") and text.endswith("bbb") and "40,000 characters left out" in text
    assert len(told(["x" * 100] * 1000)) < MOST_TEXT + 100
