"""Things in a picture and where they are: Gemma 4's detection answers, as boxes in pixels.

Owns the prompt, what an answer may look like, the way from Gemma's grid to pixels, and the drawing. Leaves the picture
to `media/images.py` and the answer to `chat.py`.

    found = detect(model, tokenizer, "street.jpg", "person and bicycle")
    for box in found.boxes:
        print(box.label, box.x1, box.y1, box.x2, box.y2)
    draw(found.picture, found.boxes).save("street-detected.png")

Asked to detect something, Gemma 4 writes JSON, in a fence or not: a list of {"box_2d": [y1, x1, y2, x2], "label":
"person"} on a grid of 1000 x 1000 over the upright picture, y first.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import Gemma4Error, UsageError

if TYPE_CHECKING:
    from PIL import Image, ImageFont

    from .chat import Progress
    from .media.images import Source
    from .tokenizer import Tokenizer

GRID = 1000
MAX_TOKENS = 4096  # of an answer; some hundred boxes

# Where a JSON value that could hold boxes begins: not at "[1]" or "[sic]" of a sentence.
_BEGIN = re.compile(r'\[\s*[\[{\]]|\{\s*"')
_SHOWN = 80  # characters of an answer in a message

# Apart from each other also for most people who confuse red and green; the order is that of first use.
_COLOURS = (
    *((230, 30, 60), (0, 110, 220), (255, 200, 0), (150, 50, 190), (0, 160, 90), (255, 120, 0)),
    *((0, 190, 220), (240, 80, 200), (120, 70, 20), (150, 220, 30)),
)
_NO_LABELS = 64  # pixels of a side below which a label would hide the picture
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)


@dataclass(frozen=True)
class Box:
    """Where something is, in pixels of the upright picture from its upper left corner; x2 and y2 are past the end."""

    label: str
    x1: int
    y1: int
    x2: int
    y2: int


@dataclass(frozen=True)
class Detection:
    """What was found in a picture, in the model's order."""

    boxes: tuple[Box, ...]
    width: int  # of the upright picture
    height: int
    answer: str  # as the model wrote it
    picture: "Image.Image" = field(repr=False, compare=False)  # upright RGB


def prompt(what: str) -> str:
    """The text after the picture. Raises UsageError when `what` says nothing."""
    what = " ".join(what.split())
    if not what:
        raise UsageError("nothing to detect: say what to look for, for example 'person and bicycle'")
    return f"detect {what}"


def detect(
    model: Any,
    tokenizer: "Tokenizer",
    source: "Source",
    what: str,
    *,
    image_tokens: Any = None,
    max_tokens: int = MAX_TOKENS,
    allow_urls: bool = False,
    progress: "Progress | None" = None,
) -> Detection:
    """Asks the model where `what` is in a picture; the likeliest answer, so the same each time.

    source: see `media.images.open_image`, as `allow_urls`. image_tokens: 70, 140, 280, 560, 1120, "auto", or None for
    the model's own; more find smaller things. progress: see `Chat.stream`.

    Raises MediaError for the picture, UsageError for a model that does not see, and Gemma4Error, which shows how the
    answer begins, when it holds no boxes.
    """
    import numpy as np

    from .chat import Chat
    from .media.images import open_image
    from .media.items import MediaSettings
    from .sampling import Sampling

    text = prompt(what)
    picture = open_image(source, allow_urls=allow_urls)
    greedy = Sampling.from_defaults(tokenizer.generation_defaults, temperature=0.0, max_tokens=max_tokens)
    chat = Chat(model, tokenizer, sampling=greedy, media=MediaSettings(image_tokens=image_tokens))
    # As an array: the picture is upright, whatever its file said.
    answer = chat.send(text, images=[np.asarray(picture)], progress=progress)
    if chat.stats is not None and chat.stats.finish_reason == "length":
        raise Gemma4Error(
            f"the answer was still going on after {chat.stats.generation_tokens} tokens: {_shown(answer)}"
        )
    return Detection(parse(answer, *picture.size), *picture.size, answer, picture)


def parse(answer: str, width: int, height: int) -> tuple[Box, ...]:
    """The boxes in an answer about a picture of this size in pixels.

    An empty list is an answer: nothing was found. Corners may come in either order, several lists or objects one after
    another, and words around them.

    Raises Gemma4Error, showing how the answer begins, for anything else, and rather than leave out one box of several.
    """
    boxes = []
    for entry in _entries(answer):
        if "box_2d" not in entry:
            form = "points, not boxes" if "point" in entry else f"{_some(entry)} instead of box_2d"
            raise Gemma4Error(f"the model answered with {form}: {_shown(answer)}")
        corners, label = entry["box_2d"], entry.get("label", "")
        if not (isinstance(corners, list) and len(corners) == 4 and all(map(_on_grid, corners))):
            raise Gemma4Error(f"box_2d is not four numbers from 0 to {GRID}: {_shown(json.dumps(entry))}")
        y1, x1, y2, x2 = corners
        across = sorted(round(x * width / GRID) for x in (x1, x2))
        down = sorted(round(y * height / GRID) for y in (y1, y2))
        boxes.append(
            Box(label if isinstance(label, str) else json.dumps(label), across[0], down[0], across[1], down[1])
        )
    return tuple(boxes)


def draw(picture: "Image.Image", boxes: Sequence[Box]) -> "Image.Image":
    """A copy of an RGB picture with the boxes and their labels; one colour per label, sizes by the picture's."""
    from PIL import ImageDraw

    out = picture.copy()
    canvas = ImageDraw.Draw(out)
    scale = math.sqrt(out.width * out.height)
    line = max(2, round(scale / 250))
    edge = max(1, line // 3)
    labels = list(dict.fromkeys(box.label for box in boxes))
    colours = {label: _COLOURS[i % len(_COLOURS)] for i, label in enumerate(labels)}
    for box in boxes:
        # An edge around the line: it shows also where the picture has the line's own colour.
        colour = colours[box.label]
        for inset, shade, thick in ((0, _against(colour), line + 2 * edge), (edge, colour, line)):
            x1, y1 = box.x1 + inset, box.y1 + inset
            right, bottom = max(x1, box.x2 - 1 - inset), max(y1, box.y2 - 1 - inset)
            canvas.rectangle((x1, y1, right, bottom), outline=shade, width=thick)
    taken: list[tuple[int, int, int, int]] = []
    for box in boxes if min(out.size) >= _NO_LABELS else ():
        if not (words := " ".join(box.label.split())):
            continue
        words, font, across, down = _fitted(words, max(10.0, scale / 30), out.size)
        place = _place(box, across, down, out.size, taken)
        taken.append(place)
        canvas.rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=colours[box.label])
        middle = ((place[0] + place[2]) / 2, (place[1] + place[3]) / 2)
        canvas.text(middle, words, fill=_against(colours[box.label]), font=font, anchor="mm")
    return out


def _entries(answer: str) -> Iterator[dict[str, Any]]:
    """Every object of every JSON value in the answer. Raises Gemma4Error for JSON that is broken, or none at all."""
    at, found = 0, False
    while begin := _BEGIN.search(answer, at):
        try:
            value, at = json.JSONDecoder().raw_decode(answer, begin.start())
        except (ValueError, RecursionError):
            raise Gemma4Error(f"the model's answer is not whole JSON: {_shown(answer)}") from None
        found = True
        for entry in value if isinstance(value, list) else [value]:
            if not isinstance(entry, dict):
                raise Gemma4Error(f"the model's answer is no list of boxes: {_shown(answer)}")
            yield entry
    if not found:
        raise Gemma4Error(f"the model answered without boxes: {_shown(answer)}")


def _on_grid(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= GRID


def _some(entry: dict[str, Any]) -> str:
    return " and ".join(list(entry)[:3])[:_SHOWN] or "{}"


def _shown(answer: str) -> str:
    text = "".join(c if c.isprintable() else " " for c in answer)
    text = " ".join(text.split())
    return f"{text[:_SHOWN]} ..." if len(text) > _SHOWN else text or "(nothing)"


def _against(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever is read better on this colour."""
    red, green, blue = colour
    return _BLACK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else _WHITE


def _fitted(words: str, size: float, picture: tuple[int, int]) -> "tuple[str, ImageFont.FreeTypeFont, int, int]":
    """(words, font, width, height) of a label that fits into the picture: smaller, and at last cut, if need be."""
    from PIL import ImageFont

    def measured() -> "tuple[Any, int, int]":
        font = ImageFont.load_default(size)
        left, _, right, _ = font.getbbox(words, anchor="lm")
        return font, math.ceil(right - left + size / 2), math.ceil(size * 1.3)

    font, across, down = measured()
    if across > picture[0] and size > 10:
        size = max(10.0, size * picture[0] / across)
        font, across, down = measured()
    while across > picture[0] and len(words) > 1:
        words = words.rstrip("…")[:-1] + "…" if len(words) > 2 else words[:1]
        font, across, down = measured()
    return words, font, min(across, picture[0]), min(down, picture[1])


def _place(
    box: Box, across: int, down: int, picture: tuple[int, int], taken: list[tuple[int, int, int, int]]
) -> tuple[int, int, int, int]:
    """Where a label goes: above its box, or inside or below where that is free, always within the picture."""
    x = max(0, min(box.x1, picture[0] - across))
    places = []
    for y in (box.y1 - down, box.y1, box.y2, box.y2 - down):
        y = max(0, min(y, picture[1] - down))
        places.append((x, y, x + across, y + down))

    def is_free(a: tuple[int, int, int, int]) -> bool:
        return all(a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1] for b in taken)

    return next(filter(is_free, places), places[0])
