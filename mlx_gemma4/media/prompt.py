"""Prompts with pictures, sound and video: a rendered template to ids, with a place for every embedding.

Owns what a placeholder becomes and where its run of soft tokens lies. Leaves files to `items.py`, the template to
`turns.py`, and features to `models/merging.py`.

    <|image|>   <|image> <|image|> x n <image|>
    <|audio|>   <|audio> <|audio|> x n <audio|>, once per window of a long sound
    <|video|>   00:00 <|image> <|video|> x n <image|> 00:01 <|image> ..., once per frame, single spaces between

Source: transformers 5.23 `processing_gemma4.py: replace_image_token, replace_video_token, replace_audio_token`.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import Gemma4Error, UsageError
from .items import Item, Part

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

_NAMES = {"image": "picture", "audio": "sound", "video": "video"}


@dataclass(frozen=True)
class Marks:
    """The ids of a checkpoint's media tokens, as config.json names them."""

    image: int | None
    audio: int | None
    video: int | None
    boi: int | None  # before and after the run of a picture or frame
    eoi: int | None
    boa: int | None  # before and after that of a sound
    eoa: int | None

    @classmethod
    def from_config(cls, raw: dict[str, Any]) -> "Marks":
        ids = {name: raw.get(f"{name}_token_id") for name in cls.__dataclass_fields__}
        if ids["eoa"] is None:
            ids["eoa"] = raw.get("eoa_token_index")  # as the first files spelled it
        return cls(**ids)

    def texts(self, tokenizer: "Tokenizer") -> dict[str, str]:
        """How each is written, by its name here."""
        return {name: tokenizer.convert_ids_to_tokens(i) for name, i in vars(self).items() if i is not None}


@dataclass(frozen=True)
class Run:
    """A picture, a frame or a window of sound, and the positions it fills."""

    start: int
    part: Part
    key: int  # of its content; negative, so that it is no token id

    @property
    def stop(self) -> int:
        return self.start + self.part.tokens

    @property
    def is_picture(self) -> bool:
        return hasattr(self.part, "patches")


@dataclass(frozen=True)
class Prompt:
    """Ids of a prompt, and what stands at the positions that are no tokens."""

    ids: list[int]
    runs: tuple[Run, ...] = ()

    @cached_property
    def keys(self) -> list[int]:
        """The ids with each run's key in its places: equal where two prompts are equal, pictures included."""
        out = list(self.ids)
        for run in self.runs:
            out[run.start : run.stop] = [run.key] * run.part.tokens
        return out

    def __len__(self) -> int:
        return len(self.ids)


def expand(text: str, items: Sequence[Item], tokenizer: "Tokenizer", marks: Marks) -> Prompt:
    """The prompt of a rendered conversation, its placeholders filled with `items` in order.

    Raises UsageError when placeholders and items do not agree, which also happens when a message spells one out.
    """
    token = marks.texts(tokenizer)
    kinds = {token[kind]: kind for kind in _NAMES if kind in token}
    pieces = re.split("|".join(f"({re.escape(mark)})" for mark in kinds), text) if kinds else [text]
    pieces = [piece for piece in pieces if piece]
    found = [kinds[piece] for piece in pieces if piece in kinds]
    given = [item.kind for item in items]
    if found != given:
        raise _mismatch(found, given, {kind: mark for mark, kind in kinds.items()})
    rest = iter(items)
    ids = tokenizer.encode("".join(_filled(next(rest), token) if p in kinds else p for p in pieces), False)
    return Prompt(ids, tuple(_locate(ids, items, marks)))


def _filled(item: Item, token: dict[str, str]) -> str:
    """What stands in the text for an item."""
    begin, end = ("boa", "eoa") if item.kind == "audio" else ("boi", "eoi")
    missing = next((name for name in (begin, end) if name not in token), None)
    if missing:
        raise UsageError(f"config.json names no {missing}_token_id, so this checkpoint cannot be given media")
    runs = [f"{token[begin]}{token[item.kind] * part.tokens}{token[end]}" for part in item.parts]
    if item.stamps:
        return " ".join(f"{stamp} {run}" for stamp, run in zip(item.stamps, runs, strict=True))
    return "".join(runs)


def _locate(ids: Sequence[int], items: Sequence[Item], marks: Marks) -> Iterator[Run]:
    at = 0
    for item in items:
        mark = getattr(marks, item.kind)
        for part, key in zip(item.parts, item.keys, strict=True):
            at = next((i for i in range(at, len(ids)) if ids[i] == mark), len(ids))
            if list(ids[at : at + part.tokens]) != [mark] * part.tokens:
                raise Gemma4Error(f"the tokenizer does not keep {item.kind} tokens apart; its files are damaged")
            yield Run(at, part, key)
            at += part.tokens


def _mismatch(found: list[str], given: list[str], marks: dict[str, str]) -> UsageError:
    for kind, name in _NAMES.items():
        have, got = found.count(kind), given.count(kind)
        if have > got:
            return UsageError(
                f"the prompt has {have} {marks[kind]} for {got} {name}(s); a message may not contain that mark as text"
            )
        if have < got:
            return UsageError(f"the chat template left out {got - have} {name}(s): this checkpoint does not take them")
    return UsageError("the chat template writes pictures, sound and video in another order than they were given")
