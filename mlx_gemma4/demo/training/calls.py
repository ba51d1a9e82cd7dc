"""Tools and JSON: calls from a declaration, answers from a result, and facts of a sentence under named keys.

Owns: conversations of these kinds, in the words of `model/chat_template.jinja` and as messages that templates take, and
their rows. Leaves tools to `toolbox.py`, sentences and JSON to `forms.py`, both with what is kept for the test,
questions that no tool serves to `world.py`, and asking a model to `evaluate_calls.py`.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import general
import world
from forms import task
from toolbox import POOL, Tool, asked, declaration, made_up, named, result

QUOTE, CALL, CALLED, RESPONSE, RESPONDED = (
    '<|"|>',
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    "<tool_response|>",
)
KINDS = ("call", "call-answer", "no-call", "json")
_SYSTEMS = ("You are an assistant with tools.", "Be brief.", "Use the tools.", "You help the user.")


@dataclass
class Example:
    """One conversation. messages: as templates take them. notes: the tool's name and side, for JSON what is wanted."""

    kind: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = field(default_factory=list)
    thinking: bool = False
    notes: dict = field(default_factory=dict)

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]


def _round(tool: Tool, rng: random.Random, test: bool, thinking: bool, number: int) -> list[dict[str, Any]]:
    """A question, the call, its result and the answer; the result as the package or as a native caller gives it."""
    question, given = asked(tool, rng, test)
    found, answer = result(tool, rng, test)
    call = {"id": f"call_{number}", "type": "function", "function": {"name": tool.name, "arguments": given}}
    calling: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [call]}
    told: dict[str, Any] = {"role": "assistant", "content": answer}
    if thinking:
        calling["reasoning_content"] = f"The tool {tool.name} knows this."
        told["reasoning_content"] = "The tool has answered."
    if isinstance(found, dict) and rng.random() < 0.15 and not test:
        calling["tool_responses"] = [{"name": tool.name, "response": found}]
        return [{"role": "user", "content": question}, calling, told]
    content = json.dumps(found, ensure_ascii=False) if isinstance(found, dict) else found
    answered = {"role": "tool", "name": tool.name, "content": content, "tool_call_id": call["id"]}
    return [{"role": "user", "content": question}, calling, answered, told]


def _drawn(rng: random.Random, test: bool) -> Tool:
    roll = rng.random()
    if roll < 0.7:
        return made_up(rng, test) if roll < 0.4 else named(rng, test)
    return rng.choice([t for t in POOL if t.side == "known" or test])


def _set(rng: random.Random, test: bool, first: list[Tool], but: str = "") -> list[Tool]:
    """One to three tools with different names, `first` among them."""
    out = {t.name: t for t in first}
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2))):
        other = _drawn(rng, test)
        if other.name != but:
            out.setdefault(other.name, other)
    chosen = list(out.values())
    rng.shuffle(chosen)
    return chosen


def _call(rng: random.Random, test: bool, thinking: bool, kind: str) -> Example:
    tool = _drawn(rng, test)
    used = [tool]
    if kind == "call-answer" and not test and rng.random() < 0.15:
        used.append(rng.choice((tool, _drawn(rng, test))))
    messages = [m for i, t in enumerate(used) for m in _round(t, rng, test, thinking, i)]
    tools = [declaration(t, rng) for t in _set(rng, test, used)]
    if kind == "call":
        messages = messages[:2]
        messages[1].pop("tool_responses", None)
    if len({t.name: t for t in used}) < len({id(t) for t in used}):  # two made-up tools of one name
        return _call(rng, test, thinking, kind)
    notes = {"tool": tool.name, "side": tool.side}
    if not test and rng.random() < 0.1:
        messages.insert(0, {"role": "system", "content": rng.choice(_SYSTEMS)})
    return Example(kind, messages, tools, thinking, notes)


def _no_call(rng: random.Random, test: bool, thinking: bool) -> Example:
    roll, name = rng.random(), ""
    if roll < 0.35:  # another tool's question; sums it would work out itself
        tool = rng.choice([t for t in POOL if t.name not in ("add", "times") and (t.side == "known" or test)])
        tool = rng.choice((tool, tool, made_up(rng, test), named(rng, test)))
        name = tool.name
        (question, _), answer, thought = asked(tool, rng, test), general.DONT_KNOW, "No tool knows this."
    else:
        draw = world.fact if roll < 0.65 else world.unknown if roll < 0.75 else world.sum_example
        old = draw(rng, test, thinking or (draw is world.sum_example and not test and rng.random() < 0.5))
        question, answer, thought = old.messages[0]["content"], old.answer, old.thought
        thinking, name = old.thinking, "add" if draw is world.sum_example else ""
    used = [t for t in _set(rng, test, [_drawn(rng, test)], name) if t.name not in (name, "times", "lookup")]
    if not used:
        return _no_call(rng, test, thinking)
    said = {"role": "assistant", "content": answer} | ({"reasoning_content": thought} if thinking else {})
    tools = [declaration(t, rng) for t in used]
    return Example("no-call", [{"role": "user", "content": question}, said], tools, thinking, {"side": "none"})


def _json(rng: random.Random, test: bool, thinking: bool) -> Example:
    question, wanted = task(rng, test)
    said = {"role": "assistant", "content": json.dumps(wanted)}
    if thinking:
        said["reasoning_content"] = f"The keys are {', '.join(wanted)}."
    notes = {"wanted": wanted, "side": "json"}
    return Example("json", [{"role": "user", "content": question}, said], [], thinking, notes)


def example(rng: random.Random, test: bool, thinking: bool | None = None, kind: str | None = None) -> Example:
    """One conversation of a kind of KINDS, of any of them where none is given; with a thought one in six times."""
    kind = kind or rng.choices(KINDS, (0.25, 0.35, 0.15, 0.25))[0]
    on = rng.random() < 1 / 6 if thinking is None else thinking
    if kind in ("call", "call-answer"):
        return _call(rng, test, on, kind)
    return {"no-call": _no_call, "json": _json}[kind](rng, test, on)


def _text(it: Any) -> str:
    if isinstance(it, str):
        return f"{QUOTE}{it}{QUOTE}"
    if isinstance(it, list):
        return "[" + ",".join(_text(v) for v in it) + "]"
    return json.dumps(it)


def _pairs(given: dict[str, Any]) -> str:
    return ",".join(f"{k}:{_text(v)}" for k, v in sorted(given.items()))


def _declared(tool: dict[str, Any]) -> str:
    function, schema = tool["function"], tool["function"]["parameters"]
    parts = []
    for key, one in sorted(schema["properties"].items()):
        about = f"description:{_text(one['description'])}," if "description" in one else ""
        parts.append(f"{key}:{{{about}type:{_text(one['type'].upper())}}}")
    required = f"required:{_text(schema['required'])}," if schema["required"] else ""
    return (f"<|tool>declaration:{function['name']}{{description:{_text(function['description'])},parameters:"
            f"{{properties:{{{','.join(parts)}}},{required}type:{_text('OBJECT')}}}}}<tool|>")  # fmt: skip


def _results(message: dict[str, Any], after: dict[str, Any] | None) -> str:
    """What stands between the call's <|tool_response> and what the model says next."""
    if "tool_responses" in message:
        [one] = message["tool_responses"]
        return f"response:{one['name']}{{{_pairs(one['response'])}}}{RESPONDED}"
    assert after
    return f"response:{after['name']}{{value:{_text(after['content'])}}}{RESPONDED}"


def segments(talked: Example) -> Iterator[tuple[str, bool]]:
    """The conversation as (text, whether the model writes it), as the chat template has it.

    Thinking, the template opens the thought after a result itself, and earlier turns have lost their thoughts: those
    are then not the model's to learn from.
    """
    yield world.BOS, False
    messages = talked.messages
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    if talked.thinking or system or talked.tools:
        think = f"{world.THINK}\n" if talked.thinking else ""
        tools = "".join(_declared(t) for t in talked.tools)
        yield f"{world.TURN}system\n{think}{system}{tools}{world.END}\n", False
    last = max(i for i, m in enumerate(messages) if m["role"] == "user")
    responded = False
    for i, message in enumerate(messages):
        if message["role"] == "user":
            yield f"{world.TURN}user\n{message['content']}{world.END}\n{world.TURN}model\n", False
        elif message["role"] == "assistant":
            own = i > last or not talked.thinking
            if i > last and message.get("reasoning_content"):
                yield f"{world.OPEN}thought\n", own and not responded
                yield f"{message['reasoning_content']}\n{world.CLOSE}", own
            responded = False
            if calls := message.get("tool_calls"):
                function = calls[0]["function"]
                yield f"{CALL}call:{function['name']}{{{_pairs(function['arguments'])}}}{CALLED}{RESPONSE}", own
                if i + 1 < len(messages):
                    yield _results(message, messages[i + 1]), False
                    responded = True
            else:
                yield f"{message['content']}{world.END}", own
                yield "\n", False


def encode_example(talked: Example, encode: Callable[[str], list[int]]) -> tuple[list[int], list[int]]:
    """Token ids, and 1 for those the model writes."""
    ids: list[int] = []
    own: list[int] = []
    for text, model in segments(talked):
        part = encode(text)
        ids += part
        own += [int(model)] * len(part)
    return ids, own


def rows(seed: str, length: int, encode: Callable[[str], list[int]]) -> Iterator[tuple[list[int], list[int]]]:
    """Endless rows of `length` tokens, conversations of these kinds packed one after the other; a cut one ends it."""
    rng = random.Random(f"calls/{seed}/{length}")
    while True:
        ids: list[int] = []
        own: list[int] = []
        while len(ids) < length:
            part, mine = encode_example(example(rng, False), encode)
            if len(ids) + len(part) > length + 40 and len(ids) > length - 60:
                part, mine = [0] * (length - len(ids)), [0] * (length - len(ids))
            ids += part
            own += mine
        yield ids[:length], own[:length]


def test_set(kind: str, count: int, seed: int = 1) -> list[Example]:
    """`count` different unseen conversations of one kind, without thoughts."""
    rng = random.Random(f"test/{seed}/{kind}")
    found: dict[str, Example] = {}
    while len(found) < count:
        made = example(rng, True, False, kind)
        found.setdefault(str(made.messages[0]["content"]), made)
    return list(found.values())
