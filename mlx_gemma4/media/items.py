"""Pictures, sounds and videos ready for a prompt, whatever they came from.

Owns `Item`, how many tokens one costs, and the settings of a conversation (`MediaSettings`). Leaves decoding to
`images.py`, `audio.py` and `video.py`, messages to `content.py`, and where items stand in a prompt to `prompt.py`.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from ..errors import UsageError
from .audio import ProcessedClip, clips_of, describe, read_sound
from .images import DEFAULT_BUDGET, TOKEN_BUDGETS, ProcessedImage, check_budget, open_image, process_image, target_size
from .sources import name_of

Kind = Literal["image", "audio", "video"]
Part = ProcessedImage | ProcessedClip
KINDS: tuple[Kind, ...] = ("image", "audio", "video")


@dataclass(frozen=True)
class MediaSettings:
    """How media become tokens. None leaves a choice to the model."""

    image_tokens: int | Literal["auto"] | None = None  # at most, of `TOKEN_BUDGETS`; see `auto_budget`
    video_tokens: int | None = None  # at most for each frame, of `TOKEN_BUDGETS`; None is 70
    fps: float | None = None  # frames a second; None spreads them over the clip as the reference does
    max_frames: int | None = None  # None is 32
    video_sound: bool = True  # the soundtrack is heard, too, by models with ears
    allow_urls: bool = False  # whether http(s) sources are fetched

    def __post_init__(self) -> None:
        for budget in (self.image_tokens, self.video_tokens):
            if budget not in (None, "auto"):
                check_budget(budget)  # type: ignore[arg-type]


class Rated(NamedTuple):
    """Samples or frames in an array, so many a second."""

    source: Any
    rate: Any


@dataclass(frozen=True, eq=False)
class Item:
    """One picture, sound or video as the model gets it: `parts` are pictures, windows of sound, or frames."""

    kind: Kind
    name: str
    parts: tuple[Part, ...]
    stamps: tuple[str, ...] = ()  # of frames, "00:07"
    notes: tuple[str, ...] = ()  # lines for the user about what was done to it

    @property
    def tokens(self) -> int:
        """Embeddings of the towers it becomes."""
        return sum(part.tokens for part in self.parts)

    @cached_property
    def keys(self) -> tuple[int, ...]:
        """One number per part that says what is in it; negative, so that it is no token id."""
        return tuple(map(_content_key, self.parts))

    @property
    def cost(self) -> int:
        """Tokens of the prompt, marks included; a frame's stamp is counted as the six it has in Gemma's vocabulary."""
        return self.tokens + len(self.parts) * (2 + (6 if self.stamps else 0))


def image_item(source: Any, budget: int | Literal["auto"] = DEFAULT_BUDGET, *, allow_urls: bool = False) -> Item:
    """source: see `images.open_image`. Raises MediaError, and UsageError for a budget that is none."""
    picture = open_image(source, allow_urls=allow_urls)
    chosen = auto_budget(*picture.size) if budget == "auto" else budget
    return Item("image", name_of(source, "picture"), (process_image(picture, chosen),))


def audio_item(source: Any, rate: int | None = None, *, allow_urls: bool = False) -> Item:
    """source, rate: see `audio.read_sound`. Raises MediaError."""
    sound = read_sound(source, rate=rate, allow_urls=allow_urls)
    clips = clips_of(sound)
    said = describe(clips)
    return Item("audio", name_of(source, "sound"), tuple(clips), notes=(said,) if said else ())


def video_items(source: Any, settings: MediaSettings, hears: bool, rate: float | None = None) -> list[Item]:
    """The frames, and for a model that hears the soundtrack as a sound of its own.

    source, rate: see `video.load_video`. Raises MediaError, UsageError.
    """
    from .video import load_video

    video = load_video(
        source,
        fps=settings.fps,
        max_frames=settings.max_frames,
        max_soft_tokens=settings.video_tokens or 70,
        sound=hears and settings.video_sound,
        rate=rate,
        allow_urls=settings.allow_urls,
    )
    items = [Item("video", video.name, video.frames, video.stamps, (video.note,) if video.note else ())]
    if video.sound is not None:
        clips = clips_of(video.sound)
        said = describe(clips)
        items.append(Item("audio", f"{video.name} (sound)", tuple(clips), notes=(said,) if said else ()))
    return items


def auto_budget(width: int, height: int) -> int:
    """The smallest budget that does not scale a picture of this size down, or the largest there is."""
    for budget in TOKEN_BUDGETS:
        new_height, new_width = target_size(height, width, budget)
        if new_height * new_width >= height * width:
            return budget
    return TOKEN_BUDGETS[-1]


def load_items(kind: str, source: Any, settings: MediaSettings, *, image_tokens: int, hears: bool) -> list[Item]:
    """What a part of a message becomes: one item, for a video with sound two.

    source: a file or the like, for samples or frames in an array with their rate (`Rated`). image_tokens: the model's
    own budget, where the settings name none. hears: whether the model has ears.

    Raises MediaError in one line; UsageError for a kind that is none.
    """
    if isinstance(source, Item):
        if source.kind != kind:
            raise UsageError(f"{source.name} is of kind {source.kind!r} and was given as {kind!r}")
        return [source]
    if kind == "image":
        return [image_item(source, settings.image_tokens or image_tokens, allow_urls=settings.allow_urls)]
    source, rate = source if isinstance(source, Rated) else (source, None)
    if kind == "audio":
        return [audio_item(source, rate, allow_urls=settings.allow_urls)]
    if kind == "video":
        return video_items(source, settings, hears, rate)
    raise UsageError(f"a part of kind {kind!r} is not known; there are text, {', '.join(KINDS)}")


def _content_key(part: Part) -> int:
    picture = isinstance(part, ProcessedImage)
    digest = hashlib.blake2b(str((part.rows, part.columns) if picture else len(part.mel)).encode(), digest_size=8)
    digest.update((part.patches if picture else part.mel).tobytes())
    return -1 - int.from_bytes(digest.digest(), "little") // 2
