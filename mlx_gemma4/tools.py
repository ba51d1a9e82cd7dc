"""Tools: Python functions and JSON declarations as a model is told of them, and their calls carried out.

Owns `Tool`, how a function becomes one, how a call is run (arguments checked, time limited, errors told to the model
as results), and the turn that goes on until the model has stopped calling. Leaves the declaration's text to the
checkpoint's template, schemas to `tool_schemas.py`, results to `tool_results.py`, calls to `turns.py`, their place in a
conversation to `chat.py`, and servers of tools to `mcp_tools.py`.

    def weather(city: str, days: int = 1) -> str:
        \"""The forecast.

        Args:
            city: Its name.
            days: How many days ahead.
        \"""

    for event in run_turn(chat, "Do I need an umbrella in Paris?", [weather]):
        match event:
            case Text(text): print(text, end="")
            case ToolResult(call, result): print(f"[{call.name}: {result}]")
"""

import asyncio
import inspect
import re
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from .errors import ContextError, UsageError
from .events import ChatEvent, Done, Malformed, ToolCall
from .tool_calls import as_call, result_message
from .tool_results import error, in_words, told
from .tool_schemas import ArgumentError, fit, plain_schema

TIMEOUT = 60.0  # seconds a call may take
ROUNDS = 40  # times a turn may call tools
_STEP = 0.05  # seconds between two looks at whether a call is still wanted
# What the published templates write and the parser reads.
_NAME = re.compile(r"[A-Za-z_][\w.:/-]*", re.ASCII)
# Gemma 4's control tokens, spelled out: a description must not end its declaration, nor a server's begin a turn.
_MARK = re.compile(r"<(?=\|[^<>\s]{1,20}>|[^<>\s|]{1,20}\|>|(?:bos|eos)>)")
_ARGS = re.compile(r"(?m)^(?:Args|Arguments|Parameters):\s*$")
_OTHER_SECTIONS = re.compile(r"(?m)^(?:Returns?|Raises|Yields|Examples?|Notes?):")

Going = Callable[[], bool]


@dataclass(frozen=True)
class Tool:
    """Something a model may call.

    parameters: a JSON schema of an object. run: what a call does with its arguments, by name; None for a tool that is
    declared only, whose calls the caller answers. check: arguments as `run` takes them; raises ArgumentError. None: as
    `parameters` say. timeout: seconds a call may take.
    """

    name: str
    description: str
    parameters: dict[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    run: Callable[..., Any] | None = None
    check: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    timeout: float = TIMEOUT

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UsageError(f"a tool cannot be called {self.name!r}; use letters, digits and any of _ . : / -")

    @classmethod
    def from_function(cls, function: Callable[..., Any]) -> "Tool":
        """A function with type hints; its docstring says what it does and, under "Args:", what its parameters are.

        Hints: whatever pydantic understands. An `async` function runs in an event loop of its own. Raises UsageError
        for a parameter without a hint, one that cannot be named in a call, or a missing docstring.
        """
        name = getattr(function, "__name__", None) or type(function).__name__
        doc = inspect.getdoc(function)
        if not doc:
            raise UsageError(f"the tool {name} has no docstring; say in it what the function does")
        description, about = _read_docstring(doc)
        try:
            parameters = inspect.signature(function, eval_str=True).parameters
        except (NameError, SyntaxError, TypeError, ValueError) as e:
            raise UsageError(f"the type hints of the tool {name} cannot be read: {e}") from None
        for parameter in parameters.values():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
                raise UsageError(f"the tool {name} takes {parameter}; a call gives every argument by its name")
            if parameter.annotation is parameter.empty:
                raise UsageError(f"the tool {name} has no type hint for {parameter.name}")
        schema, check = _model_of(name, parameters, about)
        return cls(name, description, schema, function, check)

    @classmethod
    def from_declaration(cls, declaration: Mapping[str, Any], run: Callable[..., Any] | None = None) -> "Tool":
        """OpenAI's form, {"type": "function", "function": {...}}, or the function's object alone. Raises UsageError."""
        function = declaration.get("function", declaration)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UsageError('a tool is declared as {"type": "function", "function": {"name": ..., "parameters": ...}}')
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        if not isinstance(parameters, Mapping):
            raise UsageError(f"the parameters of the tool {function['name']} are no JSON schema; give an object")
        return cls(function["name"], function.get("description") or "", plain_schema(parameters), run)

    @property
    def declaration(self) -> dict[str, Any]:
        """As templates read it; descriptions cannot end it."""
        parameters = _described(self.parameters)
        function = {"name": self.name, "description": _MARK.sub("< ", self.description), "parameters": parameters}
        return {"type": "function", "function": function}

    def arguments(self, call: ToolCall) -> dict[str, Any]:
        """What `run` is given for a call. Raises ArgumentError."""
        return self.check(call.arguments) if self.check else fit(self.parameters, call.arguments)


@dataclass(frozen=True)
class ToolResult:
    """What the model is told of a call: `result` as text, a JSON value or parts with pictures.

    failed: `result` is {"error": words}. seconds: what running it took; 0 where it was not run.
    """

    call: ToolCall | Malformed
    result: Any
    seconds: float = 0.0
    kind: ClassVar[Literal["tool_result"]] = "tool_result"

    @property
    def failed(self) -> bool:
        return isinstance(self.result, dict) and set(self.result) == {"error"}


# Asked before a call is run; False refuses it.
Confirm = Callable[[ToolCall, Tool], bool]


def as_tools(given: Iterable[Any]) -> list[Tool]:
    """Tools, functions and declarations as tools. Raises UsageError, also when two have one name."""
    out: dict[str, Tool] = {}
    for one in given:
        if isinstance(one, Mapping):
            one = Tool.from_declaration(one)
        elif not isinstance(one, Tool):
            if not callable(one):
                raise UsageError(f"a tool is a function or a declaration, not {type(one).__name__}")
            one = Tool.from_function(one)
        if one.name in out:
            raise UsageError(f"two tools are called {one.name}; rename one")
        out[one.name] = one
    return list(out.values())


def declarations(given: Iterable[Any]) -> list[dict[str, Any]]:
    """What a template is told of them. Raises as `as_tools`."""
    return [tool.declaration for tool in as_tools(given)]


def answer(
    call: ToolCall | Malformed,
    tools: Sequence[Tool],
    *,
    confirm: Confirm | None = None,
    going: Going | None = None,
) -> ToolResult:
    """Runs one call. Whatever goes wrong becomes a result that the model can act on; only KeyboardInterrupt, and what
    `confirm` raises, comes through.

    going: looked at many times a second; False gives the call up. A tool that takes too long, or is given up, is left
    to itself on its thread.
    """
    if isinstance(call, Malformed):
        return ToolResult(call, error(call.error))
    tool = next((t for t in tools if t.name == call.name), None)
    if tool is None or tool.run is None:
        known = ", ".join(t.name for t in tools if t.run) or "none"
        return ToolResult(call, error(f"there is no tool {call.name}; the tools are: {known}"))
    try:
        arguments = tool.arguments(call)
    except ArgumentError as e:
        return ToolResult(call, error(f"{call.name} was not run, its arguments are wrong: {e}"))
    if confirm is not None and not confirm(call, tool):
        return ToolResult(call, error(f"the user does not want {call.name} to be run"))
    return _timed(call, tool, arguments, going or (lambda: True))


def run_turn(
    chat: Any,
    message: Any,
    tools: Sequence[Any] | None = None,
    *,
    confirm: Confirm | None = None,
    max_rounds: int = ROUNDS,
    going: Going | None = None,
    progress: Callable[[int, int], Any] | None = None,
    **options: Any,
) -> Generator[ChatEvent | ToolResult, None, None]:
    """Answers `message`, running the calls the model makes until it makes no more.

    Yields what `chat.stream` does, then a `ToolResult` for each call, then the events of what the model says to them,
    and so on: there is a `Done` for every round, and the last event is the last one.

    chat: a `Chat` or `EngineChat`. tools: functions, declarations or `Tool`s; None takes the chat's own. confirm: asked
    before each call. max_rounds: after so many rounds of calls the model is told to answer without. going: False stops
    the answer or the tool that runs, as Ctrl-C does in a terminal. options: those of `stream`, for every round.

    However it ends, every call in the history is answered. Raises what `stream` raises; results that the model cannot
    take, too long or pictures for one that does not see, are told as errors first.
    """
    known = as_tools(chat.tools if tools is None else tools)
    wanted = going or (lambda: True)

    def watched(done: int, total: int) -> bool:
        return wanted() and (progress is None or progress(done, total) is not False)

    options |= {"tools": known, "progress": watched}
    calls: list[ToolCall | Malformed] = []
    results: list[tuple[ToolCall | Malformed, Any]] = []
    events = chat.stream(message, **options)
    try:
        for rounds in range(max_rounds + 2):
            calls, results, done = [], [], None
            with closing(events):
                for event in events:
                    if isinstance(event, ToolCall | Malformed):
                        calls.append(event)
                    done = event if isinstance(event, Done) else None
                    yield event
            if done is None or done.reason != "tool_calls" or rounds > max_rounds:
                return
            for call in calls:
                if not wanted():
                    break
                if rounds < max_rounds:
                    found = answer(call, known, confirm=confirm, going=wanted)
                else:
                    found = ToolResult(call, error("no more calls are possible; answer with what you know"))
                results.append((call, found.result))
                yield found
            if not wanted():
                yield Done(replace(done.stats, finish_reason="cancelled"), "cancelled")
                return
            events = _told_results(chat, results, options)
    finally:
        _settle(chat, calls, results)


def _told_results(
    chat: Any, results: list[tuple[ToolCall | Malformed, Any]], options: dict[str, Any]
) -> Generator[ChatEvent, None, None]:
    """Goes on after the results. Where the model cannot take them, it is told so instead."""
    from .media.sources import MediaError

    begun = False
    try:
        with closing(chat.stream_results(results, **options)) as events:
            for event in events:
                begun = True
                yield event
        return
    except (ContextError, MediaError, UsageError) as e:
        if begun:
            raise
        why = "the results are too long to be read; ask for less" if isinstance(e, ContextError) else str(e)
    results[:] = [(call, error(why)) for call, _ in results]
    yield from chat.stream_results(results, **options)


def _settle(chat: Any, calls: Sequence[ToolCall | Malformed], results: Sequence[tuple[Any, Any]]) -> None:
    """Answers what is not: a template takes a call without a result for one that is still running."""
    messages = chat.messages
    if not calls or not messages or not messages[-1].get("tool_calls"):
        return
    rest = [(call, error("not run: the answer was stopped")) for call in calls[len(results) :]]
    new = [result_message(as_call(call), result) for call, result in (*results, *rest)]
    if hasattr(chat, "call"):  # an EngineChat, whose messages are a copy
        chat.call(lambda inner: inner.messages.extend(new))
    else:
        messages.extend(new)


def _timed(call: ToolCall, tool: Tool, arguments: dict[str, Any], going: Going) -> ToolResult:
    done: dict[str, Any] = {}

    def work() -> None:
        try:
            result = tool.run(**arguments) if tool.run else None
            if inspect.isawaitable(result):
                result = asyncio.run(_awaited(result))
            done["result"] = told(result)
        except BaseException as e:  # a tool is a stranger's program; SystemExit must not end the conversation
            done["result"] = error(in_words(e))

    started = time.perf_counter()
    thread = threading.Thread(target=work, name=f"tool {call.name}", daemon=True)
    thread.start()
    while thread.is_alive():
        left = tool.timeout - (time.perf_counter() - started)
        thread.join(max(0.0, min(_STEP, left)))
        if "result" in done:
            break
        if left <= 0:
            done["result"] = error(f"{call.name} did not answer within {tool.timeout:g} seconds")
        elif not going():
            done["result"] = error(f"the user stopped {call.name}")
    return ToolResult(call, done["result"], time.perf_counter() - started)


async def _awaited(result: Any) -> Any:
    return await result


# Functions


def _model_of(
    name: str, parameters: Mapping[str, inspect.Parameter], about: Mapping[str, str]
) -> tuple[dict[str, Any], Callable[[Mapping[str, Any]], dict[str, Any]]]:
    """(schema, check) of a signature."""
    from pydantic import ConfigDict, Field, PydanticUserError, ValidationError, create_model
    from pydantic.errors import PydanticSchemaGenerationError

    fields: dict[str, Any] = {}
    for i, parameter in enumerate(parameters.values()):
        told: dict[str, Any] = {"description": about[parameter.name]} if parameter.name in about else {}
        default = ... if parameter.default is parameter.empty else parameter.default
        # By an alias, because a model has attributes of its own, "json" and "copy" among them.
        fields[f"p{i}"] = (parameter.annotation, Field(default, alias=parameter.name, **told))
    # A number for a name is meant as text; a name that is not declared is a mistake the model should hear of.
    config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)
    try:
        model = create_model(name, __config__=config, **fields)
        schema = plain_schema(model.model_json_schema())
    except (PydanticUserError, PydanticSchemaGenerationError) as e:
        why = str(e).splitlines()[0]
        raise UsageError(f"the tool {name} has a type hint that JSON cannot express: {why}") from None

    def check(arguments: Mapping[str, Any]) -> dict[str, Any]:
        try:
            made = model.model_validate(dict(arguments))
        except ValidationError as e:
            raise ArgumentError("; ".join(_problem(p) for p in e.errors(include_url=False))) from None
        # What was not given keeps the function's own default, mutable or not.
        return {
            field.alias: getattr(made, key)
            for key, field in model.model_fields.items()
            if key in made.model_fields_set and field.alias
        }

    schema.pop("additionalProperties", None)
    return schema, check


def _problem(problem: Any) -> str:
    """One complaint of pydantic's in words: `days: Input should be a valid integer, not "soon"`."""
    where = ".".join(str(step) for step in problem["loc"])
    if problem["type"] == "missing":
        return f"{where} is missing"
    if problem["type"] == "extra_forbidden":
        return f"there is no {where}"
    given = repr(problem["input"])
    return f"{where}: {problem['msg']}, not {given if len(given) <= 80 else given[:77] + '...'}"


def _read_docstring(doc: str) -> tuple[str, dict[str, str]]:
    """(what the function does, what each parameter is) of a docstring with an "Args:" section."""
    told, rest = [*_ARGS.split(doc, maxsplit=1), ""][:2]
    about: dict[str, str] = {}
    name = None
    for line in rest.splitlines():
        if line and not line[0].isspace():
            break  # the next section
        if found := re.match(r"\s{1,8}\*{0,2}(\w+)\s*(?:\([^)]*\))?:\s*(.*)", line):
            name = found[1]
            about[name] = found[2]
        elif name and line.strip():
            about[name] += " " + line.strip()
    return _OTHER_SECTIONS.split(told)[0].strip(), {k: v for k, v in about.items() if v}


def _described(node: Any) -> Any:
    """A schema whose descriptions hold no control tokens."""
    if isinstance(node, list):
        return [_described(v) for v in node]
    if not isinstance(node, dict):
        return node
    return {
        k: _MARK.sub("< ", v) if k == "description" and isinstance(v, str) else _described(v) for k, v in node.items()
    }
