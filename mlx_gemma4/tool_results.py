"""What a tool returned, as a model can be told: text, JSON values, or parts with pictures and sounds.

Owns the way from any Python object to one of these, and an end to texts that have none. Leaves running tools to
`tools.py`, the message of a result to `tool_calls.py`, and control tokens spelled out in it and pictures to `media/`.
"""

import json
from typing import Any

from .errors import Gemma4Error

MOST_TEXT = 40_000  # characters of one result, some 10,000 tokens
_MOST_ERROR = 2_000
_PARTS = {"text": str, "image": object, "audio": object, "video": object}


def error(words: str) -> dict[str, str]:
    """A result that says what went wrong."""
    return {"error": _cut(words, _MOST_ERROR)}


def in_words(problem: BaseException) -> str:
    """An exception as a model reads it: its class and message, without a traceback; our own speak for themselves."""
    text = str(problem).strip()
    if text and isinstance(problem, Gemma4Error):
        return text
    return f"{type(problem).__name__}: {text}" if text else type(problem).__name__


def told(result: Any) -> Any:
    """What the model is told of a result: None, a number, text, a JSON list or object, or a list of parts.

    Pictures: PIL images, alone or in a list with texts; parts ({"type": "image", "image": source}) as in messages.
    Dataclasses, pydantic models, dates and the like become JSON; what cannot, its `str`. A long text loses its middle.
    """
    if isinstance(result, str):
        return _cut(result, MOST_TEXT)
    if result is None or isinstance(result, bool | int | float):
        return result
    if (parts := _parts(result)) is not None:
        return parts
    from pydantic import ConfigDict, TypeAdapter

    try:
        anything = TypeAdapter(Any, config=ConfigDict(ser_json_bytes="base64"))
        value = anything.dump_python(result, mode="json", fallback=str)
        text = json.dumps(value, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError):  # something that refers to itself
        return _cut(str(result), MOST_TEXT)
    # A list of objects that have a "type" would be taken for parts of a message.
    mistaken = isinstance(value, list) and all(isinstance(v, dict) and isinstance(v.get("type"), str) for v in value)
    if len(text) > MOST_TEXT or (mistaken and value):
        return _cut(text, MOST_TEXT)
    return value


def _parts(result: Any) -> list[dict[str, Any]] | None:
    """A picture, or a list of pictures, parts and texts with at least one that is not text; None for anything else."""
    several = result if isinstance(result, list | tuple) else [result]
    out: list[dict[str, Any]] = []
    for one in several:
        if _is_picture(one):
            out.append({"type": "image", "image": one})
        elif isinstance(one, str):
            out.append({"type": "text", "text": _cut(one, MOST_TEXT)})
        elif isinstance(one, dict) and _is_part(one):
            is_text = one["type"] == "text"
            out.append({"type": "text", "text": _cut(one["text"], MOST_TEXT)} if is_text else one)
        else:
            return None
    given_as_parts = bool(several) and all(isinstance(one, dict) for one in several)
    return out if given_as_parts or any(part["type"] != "text" for part in out) else None


def _is_picture(value: Any) -> bool:
    # Without importing PIL: who returns a picture has imported it.
    return any(c.__module__ == "PIL.Image" and c.__name__ == "Image" for c in type(value).__mro__)


def _is_part(value: dict[str, Any]) -> bool:
    kind = value.get("type")
    if not isinstance(kind, str) or kind not in _PARTS:
        return False
    return isinstance(value.get(kind), _PARTS[kind]) and value[kind] is not None


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}\n[... {len(text) - most:,} characters left out ...]\n{text[-(most // 2) :]}"
