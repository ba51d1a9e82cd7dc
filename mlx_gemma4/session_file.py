"""A conversation in one file: its messages, and the cache that spares it being read again.

Owns the format: `cache/files.py`'s, with the latest way back and the media of the messages beside the layers. Leaves
what a conversation is to `chat.py`.

Tensors beside `layers.*`: `mark.{i}.{j}`, array j of layer i's snapshot; `media.{n}.{p}`, part p of the n-th item.
Notes: `ids`, what the cache holds; `mark`; `items`; `messages`, media parts naming their item; `chat`, whatever the
caller keeps.
"""

import json
import os
from typing import Any

import mlx.core as mx
import numpy as np

from . import cache as kv
from .errors import Gemma4Error
from .media.audio import ProcessedClip
from .media.images import ProcessedImage
from .media.items import KINDS, Item
from .reuse import PromptMemory


def save(
    path: str | os.PathLike[str],
    model: Any,
    memory: PromptMemory,
    messages: list[dict[str, Any]],
    chat: dict[str, Any],
) -> None:
    """Writes a conversation to `path` (.safetensors), replacing it only when all is written.

    Raises UsageError for another name, Gemma4Error when it cannot be written.
    """
    items: list[Item] = []
    extra: dict[str, mx.array] = {}
    shown = [m | {"content": _without_items(m.get("content"), items)} for m in messages]
    for n, item in enumerate(items):
        for p, part in enumerate(item.parts):
            extra[f"media.{n}.{p}"] = mx.array(part.patches if isinstance(part, ProcessedImage) else part.mel)
    mark = memory.marks[-1] if memory.marks else None
    for i, snapshot in enumerate(mark.snapshots if mark else ()):
        extra |= {f"mark.{i}.{j}": a for j, a in enumerate(snapshot.arrays)}
    notes = {
        "ids": memory.ids,
        "mark": None if mark is None else {"length": mark.length, "layers": [_place(s) for s in mark.snapshots]},
        "items": [_describe(item) for item in items],
        "messages": shown,
        "chat": chat,
    }
    kv.save(path, memory.cache, model.weights_identity, notes, extra)


def load(
    path: str | os.PathLike[str], model: Any, memory: PromptMemory | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Fills `memory` with what `save` wrote; returns the messages and what the caller kept.

    memory: None reads what the caller kept only, without touching the cache.
    Raises Gemma4Error when the file is none of these, or of other weights or cache settings.
    """
    saved = kv.open_saved(path)
    notes = json.loads(saved[1].get("notes", "{}"))
    if "messages" not in notes:
        raise Gemma4Error(f"{path} holds a cache without a conversation; save one with Chat.save")
    if memory is None:
        return [], notes["chat"]
    caches = memory.new_cache()
    notes, extra = kv.fill(path, saved, caches, model.weights_identity)
    items = [_item(n, about, extra) for n, about in enumerate(notes["items"])]
    marks = []
    if notes["mark"] is not None:
        snapshots = [_snapshot(i, place, extra) for i, place in enumerate(notes["mark"]["layers"])]
        marks.append((notes["mark"]["length"], snapshots))
    memory.settle(caches, notes["ids"], marks)
    return [m | {"content": _with_items(m.get("content"), items)} for m in notes["messages"]], notes["chat"]


def _place(snapshot: kv.Snapshot) -> dict[str, Any]:
    coded = {"coded": snapshot.coded} if isinstance(snapshot, kv.BlockSnapshot) else {}
    return {"offset": snapshot.offset, "arrays": len(snapshot.arrays), **coded}


def _snapshot(layer: int, place: dict[str, Any], extra: dict[str, mx.array]) -> kv.Snapshot:
    arrays = tuple(extra[f"mark.{layer}.{j}"] for j in range(place["arrays"]))
    if "coded" in place:
        return kv.BlockSnapshot(place["offset"], 0, arrays, place["coded"])
    return kv.Snapshot(place["offset"], 0, arrays)


def _describe(item: Item) -> dict[str, Any]:
    shapes = [
        [p.rows, p.columns, p.width, p.height] if isinstance(p, ProcessedImage) else [p.start, p.stop, p.name]
        for p in item.parts
    ]
    return {"kind": item.kind, "name": item.name, "stamps": item.stamps, "notes": item.notes, "parts": shapes}


def _item(n: int, about: dict[str, Any], extra: dict[str, mx.array]) -> Item:
    arrays = [np.array(extra[f"media.{n}.{p}"]) for p in range(len(about["parts"]))]
    kind = ProcessedClip if about["kind"] == "audio" else ProcessedImage
    parts = tuple(kind(a, *shape) for a, shape in zip(arrays, about["parts"], strict=True))
    return Item(about["kind"], about["name"], parts, tuple(about["stamps"]), tuple(about["notes"]))


def _without_items(content: Any, items: list[Item]) -> Any:
    """Content with each item replaced by its number; the items are added to `items`."""
    if not isinstance(content, list):
        return content
    out = []
    for part in content:
        if part["type"] in KINDS:
            items.append(part[part["type"]])
            part = {"type": part["type"], "item": len(items) - 1}
        out.append(part)
    return out


def _with_items(content: Any, items: list[Item]) -> Any:
    if not isinstance(content, list):
        return content
    return [{"type": p["type"], p["type"]: items[p["item"]]} if "item" in p else p for p in content]
