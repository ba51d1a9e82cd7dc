"""Tool calls as messages: what goes back into a conversation, in the form the checkpoint's template takes.

Owns the shape of an assistant's message with calls, of a tool's result, and the decoding of OpenAI's string arguments.
Leaves the text of both to the template, reading calls to `turns.py` and running tools to `tools.py`.

The template writes an assistant's calls first and its text after them, whatever the order in which the model said
them, and sorts keys; so a conversation rendered afresh need not begin with the tokens the model sampled.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .errors import UsageError
from .events import Event, Malformed, ToolCall


def call_message(calls: Sequence[ToolCall], text: str = "", thought: str = "") -> dict[str, Any]:
    """The assistant's message that makes these calls.

    Calls without an id get "call_0", "call_1", .. by position: the template finds a result's name by it, and takes two
    missing ids for equal. thought: rendered as the template decides, which is until the next user message.
    """
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = [
            {
                "id": call.id or f"call_{i}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for i, call in enumerate(calls)
        ]
    return message


def result_message(call: ToolCall, result: Any) -> dict[str, Any]:
    """The message that answers one call; the results of a message's calls follow it in their order.

    result: a string, number, bool or None goes in as it is (`{value:..}`); a list of parts, each a dictionary with a
    "type", as text with pictures and sounds after it; other lists and objects as JSON text, because the template would
    take a list for parts and refuses an object. Raises UsageError for what JSON cannot express.
    """
    message: dict[str, Any] = {"role": "tool", "name": call.name, "content": _content(call.name, result)}
    return message | ({"tool_call_id": call.id} if call.id else {})


def _content(name: str, result: Any) -> Any:
    if result is None or isinstance(result, str | int | float):
        return result
    parts = isinstance(result, list) and bool(result)
    if parts and all(isinstance(part, Mapping) and isinstance(part.get("type"), str) for part in result):
        return result
    try:
        return json.dumps(result, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise UsageError(f"the result of {name} is no JSON value ({e}); return text, numbers, lists or dicts") from None


def unanswered(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Results that say there is none, for the calls a conversation ends with: the template would leave them open."""
    calls = messages[-1].get("tool_calls", ()) if messages and messages[-1].get("role") == "assistant" else ()
    return [
        result_message(ToolCall(call["function"]["name"], {}, "", call.get("id", "")), "no result: the user went on")
        for call in calls
    ]


def as_call(event: ToolCall | Malformed) -> ToolCall:
    """For the history: what cannot be read was a call without arguments, of the tool whose name it begins with."""
    if isinstance(event, ToolCall):
        return event
    name = re.match(r"(?:<\|tool_call>)?\s*(?:call:)?\s*([\w.:/-]+)", event.raw)
    return ToolCall(name[1].rstrip(":.-/") if name else "unknown", {}, event.raw)


def numbered(events: Sequence[Event], numbers: Iterator[int]) -> list[Event]:
    """Calls with ids of their own, by which their results are told apart; other events as they are."""
    return [replace(e, id=f"call_{next(numbers)}") if isinstance(e, ToolCall) else e for e in events]


def decode_arguments(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with every call's arguments as an object: OpenAI's are JSON text, which the template refuses.

    Nothing given is changed. "" counts as no arguments. Raises UsageError naming the call.
    """
    return [
        {**message, "tool_calls": [_decoded(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else dict(message)
        for message in messages
    ]


def _decoded(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str):
        raise UsageError('a tool call has no name; give it as {"function": {"name": .., "arguments": {..}}}')
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as e:
            raise UsageError(f"the arguments of the call of {name} are not JSON ({e}); send an object") from None
    if arguments is not None and not isinstance(arguments, Mapping):
        raise UsageError(f"the arguments of the call of {name} are no object; send a JSON object")
    return {**call, "function": {**function, "arguments": arguments}}
