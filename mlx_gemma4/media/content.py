"""The content of messages: what a caller writes, what a conversation keeps, what a template reads.

Owns which spellings of a part there are. Leaves loading to `items.py` and rendering to `turns.py`.

A caller writes text, or a list of parts; OpenAI's spellings are understood:

    {"type": "text", "text": "What is this?"}
    {"type": "image", "image": SOURCE}          {"type": "image_url", "image_url": {"url": "data:..."}}
    {"type": "audio", "audio": SOURCE}          {"type": "input_audio", "input_audio": {"data": "UklG...", ...}}
    {"type": "video", "video": SOURCE}          with "rate" beside samples or frames in an array

A conversation keeps an `Item` in the place of each source, so that a file may change or go; a template is shown the
part's type alone.
"""

import base64
import binascii
from collections.abc import Callable, Collection, Sequence
from typing import Any

from ..errors import UsageError
from .items import KINDS, Item, Rated
from .sources import MediaError

Content = str | list[dict[str, Any]]
# (kind, source) -> the items it becomes
Loader = Callable[[str, Any], list[Item]]


def load_content(content: Content | Sequence[dict[str, Any]], load: Loader) -> Content:
    """`content` with its sources loaded; text stays as it is.

    Raises MediaError for a source that cannot be read, UsageError for a part that is none.
    """
    if isinstance(content, str):
        return content
    out: list[dict[str, Any]] = []
    for part in content:
        kind, source = _read(part)
        if kind == "text":
            out.append({"type": "text", "text": source})
        else:
            out += ({"type": item.kind, item.kind: item} for item in load(kind, source))
    return out


def with_media(
    content: Content | Sequence[dict[str, Any]], images: Sequence[Any], audio: Sequence[Any], videos: Sequence[Any]
) -> Content | Sequence[dict[str, Any]]:
    """`content` with these sources in front, in this order."""
    given = [("image", x) for x in images] + [("video", x) for x in videos] + [("audio", x) for x in audio]
    if not given:
        return content
    text = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    return [{"type": kind, kind: source} for kind, source in given] + text


def items_of(messages: Sequence[dict[str, Any]]) -> list[Item]:
    """The items of loaded messages in the order in which templates write them."""
    return [part[part["type"]] for m in messages for part in _parts(m) if part["type"] in KINDS]


def for_template(
    messages: Sequence[dict[str, Any]], marks: Collection[str] = (), control: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Loaded messages as a chat template reads them: media parts have their type and nothing else.

    marks: the texts of media tokens. A model may write one; read again it would ask for a picture that nobody gave, so
    it is taken apart there. control: the texts of all control tokens. What a tool returns is a stranger's text, and may
    not end its own block or begin a turn, so there all of them are.
    """
    out = []
    for message in messages:
        apart = {"assistant": marks, "model": marks, "tool": control}.get(message.get("role", ""), ())
        content = message.get("content")
        if isinstance(content, str):
            content = _apart(content, apart)
        elif isinstance(content, list):
            content = [_shown(part, apart) for part in content]
        out.append(message if content is message.get("content") else message | {"content": content})
    return out


def _shown(part: dict[str, Any], apart: Collection[str]) -> dict[str, Any]:
    if part["type"] in KINDS:
        return {"type": part["type"]}
    return part | {"text": _apart(part["text"], apart)} if apart and "text" in part else part


def _apart(text: str, marks: Collection[str]) -> str:
    for mark in marks:
        text = text.replace(mark, f"{mark[0]} {mark[1:]}")
    return text


def text_of(content: Content) -> str:
    """The text of a message, its media named in brackets."""
    if isinstance(content, str):
        return content
    return " ".join(p["text"] if p["type"] == "text" else f"[{p[p['type']].name}]" for p in content)


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    return content if isinstance(content, list) else []


def _read(part: Any) -> tuple[str, Any]:
    """(kind, source or text) of a part as a caller writes it."""
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise UsageError('a part of a message is a dictionary with a "type": text, image, audio or video')
    kind = part["type"]
    try:
        if kind == "image_url":
            where = part["image_url"]
            return "image", where["url"] if isinstance(where, dict) else where
        if kind == "input_audio":
            return "audio", base64.b64decode(part["input_audio"]["data"], validate=True)
        source = part[kind]
    except (KeyError, TypeError):
        raise UsageError(f"a part of type {kind!r} lacks what it should hold") from None
    except (binascii.Error, ValueError):
        raise MediaError("the sound of an input_audio part is not base64; encode it again") from None
    if kind == "text":
        if not isinstance(source, str):
            raise UsageError(f"a part of type 'text' holds {type(source).__name__}, not text")
    elif kind not in KINDS:
        raise UsageError(f"a part of type {kind!r} is not known; there are text, {', '.join(KINDS)}")
    elif "rate" in part:
        source = Rated(source, part["rate"])
    return kind, source
