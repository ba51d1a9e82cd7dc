"""Pictures of coloured shapes, with what is where in them.

Owns: shapes, colours, backgrounds, the drawing of a scene, the pairs of colour and shape that no training picture
shows, and the labels of soft tokens that the vision tower is taught first. Leaves questions to `seeing.py`.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
# Several shades each, pure ones of common drawing programs among them.
COLOURS = {
    "red": ((255, 0, 0), (215, 35, 35), (190, 20, 40), (235, 60, 50)),
    "green": ((0, 128, 0), (40, 160, 60), (0, 255, 0), (60, 190, 80), (20, 110, 40)),
    "blue": ((0, 0, 255), (40, 80, 215), (30, 110, 230), (20, 40, 160)),
    "yellow": ((255, 255, 0), (245, 220, 40), (250, 230, 90)),
    "orange": ((255, 165, 0), (245, 140, 30), (255, 127, 20)),
    "purple": ((128, 0, 128), (140, 50, 175), (110, 30, 160), (160, 60, 200)),
    "black": ((0, 0, 0), (20, 20, 20), (35, 35, 40)),
    "white": ((255, 255, 255), (245, 245, 245), (250, 250, 240)),
}
# Never drawn for the training.
HELD_PAIRS = frozenset({("purple", "star"), ("orange", "cross"), ("yellow", "ring"), ("white", "triangle")})
STEP = 20  # of the numbers of boxes
SUPER = 2  # drawn so many times larger and reduced, for smooth edges
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Thing:
    """A shape in a picture."""

    colour: str
    shape: str
    box: Box

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it, from left to right."""

    image: Image.Image | None  # None once it has been looked at
    things: tuple[Thing, ...]
    size: tuple[int, int]

    def grid(self, thing: Thing) -> tuple[int, int, int, int]:
        """(y1, x1, y2, x2) of a thing on Gemma's grid of 1000 x 1000, in steps of 20: finer is not taught."""
        w, h = self.size
        left, top, right, bottom = thing.box
        y1, x1, y2, x2 = (
            min(980, max(0, STEP * round(1000 / STEP * v))) for v in (top / h, left / w, bottom / h, right / w)
        )
        return y1, x1, y2, x2


def _shade(rng: random.Random, name: str) -> tuple[int, int, int]:
    base = rng.choice(COLOURS[name])
    spread = rng.choice((0, 0, 8, 16))
    return tuple(min(255, max(0, v + rng.randint(-spread, spread))) for v in base)  # type: ignore[return-value]


def _far(a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) > 110**2


def _background(rng: random.Random, size: tuple[int, int]) -> tuple[Image.Image, list[tuple[int, int, int]]]:
    """The empty picture and the colours it is made of."""
    roll = rng.random()
    if roll < 0.3:
        first = (255, 255, 255) if rng.random() < 0.7 else (0, 0, 0)
    elif roll < 0.6:
        grey = rng.randrange(256)
        first = tuple(min(255, max(0, grey + rng.randint(-15, 15))) for _ in range(3))
    else:
        first = tuple(rng.randrange(256) for _ in range(3))
    if rng.random() < 0.6:
        return Image.new("RGB", size, first), [first]
    second = tuple(min(255, max(0, v + rng.randint(-70, 70))) for v in first)
    angle = rng.uniform(0, 2 * math.pi)
    x = np.linspace(-1, 1, 64)[None] * math.cos(angle) + np.linspace(-1, 1, 64)[:, None] * math.sin(angle)
    part = ((x - x.min()) / (x.max() - x.min()))[..., None]
    small = np.asarray(first) * (1 - part) + np.asarray(second) * part
    image = Image.fromarray(small.round().astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    middle = tuple((a + b) // 2 for a, b in zip(first, second, strict=True))
    return image, [first, second, middle]


def _polygon(rng: random.Random, shape: str, w: float, h: float) -> list[tuple[float, float]] | None:
    """Corners of a shape in a box of w x h around (0, 0); None for round ones."""
    if shape == "square":
        return [(-w / 2, -h / 2), (w / 2, -h / 2), (w / 2, h / 2), (-w / 2, h / 2)]
    if shape == "triangle":
        points = [(0, -h / 2), (w / 2, h / 2), (-w / 2, h / 2)]
        if rng.random() < 0.2:
            points = [(x, -y) for x, y in points]
    elif shape == "cross":
        a = rng.uniform(0.13, 0.2)
        points = [(-a, -0.5), (a, -0.5), (a, -a), (0.5, -a), (0.5, a), (a, a), (a, 0.5), (-a, 0.5), (-a, a)]
        points = [(x * w, y * h) for x, y in [*points, (-0.5, a), (-0.5, -a), (-a, -a)]]
    elif shape == "star":
        inner, points = rng.uniform(0.36, 0.46), []
        for i in range(10):
            r, t = (1.0 if i % 2 == 0 else inner), math.pi * i / 5
            points.append((r * math.sin(t) * w / 2, -r * math.cos(t) * h / 2))
    else:
        return None
    if shape != "square" and rng.random() < 0.3:
        t = rng.uniform(-0.2, 0.2)
        points = [(x * math.cos(t) - y * math.sin(t), x * math.sin(t) + y * math.cos(t)) for x, y in points]
    return points


def draw_thing(
    rng: random.Random, image: Image.Image, scale: int, colour: tuple[int, int, int], shape: str, at: Box
) -> Box:
    """Draws a shape inside a box (in pixels of the reduced picture) and returns the box it really fills."""
    left, top, right, bottom = at
    pen = ImageDraw.Draw(image)
    points = _polygon(rng, shape, right - left, bottom - top)
    if points is None:
        outer = [left * scale, top * scale, right * scale - 1, bottom * scale - 1]
        if shape == "circle":
            pen.ellipse(outer, fill=colour)
        else:
            pen.ellipse(outer, outline=colour, width=max(2, round((right - left) * scale * rng.uniform(0.14, 0.24))))
        return at
    cx, cy = (left + right) / 2, (top + bottom) / 2
    points = [(cx + x, cy + y) for x, y in points]
    pen.polygon([(x * scale, y * scale) for x, y in points], fill=colour)
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    return min(xs), min(ys), max(xs), max(ys)


def _place(rng: random.Random, size: tuple[int, int], sides: list[tuple[float, float]]) -> list[Box] | None:
    """Boxes of these sides that lie inside the picture and apart from one another."""
    w, h = size
    gap, found = 0.03 * min(w, h), []
    for bw, bh in sides:
        for _ in range(30):
            x, y = rng.uniform(gap, w - bw - gap), rng.uniform(gap, h - bh - gap)
            box = (x, y, x + bw, y + bh)
            if all(
                box[0] > o[2] + gap or box[2] < o[0] - gap or box[1] > o[3] + gap or box[3] < o[1] - gap for o in found
            ):
                found.append(box)
                break
        else:
            return None
    return found


def pairs(test: bool | None = False) -> list[tuple[str, str]]:
    """(colour, shape) that may be drawn: those of the training, or with test=True only those kept from it."""
    every = [(c, s) for c in COLOURS for s in SHAPES]
    return every if test is None else [p for p in every if (p in HELD_PAIRS) == test]


def draw_size(rng: random.Random) -> tuple[int, int]:
    """(width, height) of a picture: most of them wide, some square, some tall."""
    if rng.random() < 0.15:
        side = rng.randrange(120, 560)
        return side, side
    long = rng.randrange(180, 680)
    ratio = math.exp(rng.uniform(-0.5, 0.6))
    return (long, round(long / ratio)) if ratio > 1 else (round(long * ratio), long)


def draw(rng: random.Random, held: bool = False, most: int = 4) -> Scene:
    """A scene. held: at least one thing in it is of a pair that the training never shows."""
    while True:
        count = min(most, rng.choices((1, 2, 3, 4), (38, 28, 20, 14))[0])
        size = draw_size(rng)
        short = min(size)
        kinds = [rng.choice(pairs()) for _ in range(count)]
        if count > 1 and rng.random() < 0.22:  # something to count
            kinds = [rng.choice(kinds[: rng.randrange(1, 3)]) for _ in kinds]
        if held:
            kinds[rng.randrange(count)] = rng.choice(pairs(True))
        sides = []
        for _, shape in kinds:
            side = short * (rng.uniform(0.22, 0.75) if count == 1 else rng.uniform(0.2, 0.5 - 0.05 * count))
            ratio = 1.0 if shape in ("circle", "ring", "square") else math.exp(rng.uniform(-0.2, 0.2))
            sides.append((side, min(side / ratio, 0.9 * short)))
        boxes = _place(rng, size, sides)
        image, ground = _background(rng, (size[0] * SUPER, size[1] * SUPER))
        shades = [_shade(rng, colour) for colour, _ in kinds]
        if boxes is None or not all(_far(s, g) for s in shades for g in ground):
            continue
        things = []
        for (colour, shape), shade, box in zip(kinds, shades, boxes, strict=True):
            real = draw_thing(rng, image, SUPER, shade, shape, box)
            things.append(Thing(colour, shape, real))
        image = image.reduce(SUPER)
        if rng.random() < 0.15:
            grain = np.random.default_rng(rng.randrange(1 << 30)).normal(0, rng.uniform(1, 7), (size[1], size[0], 1))
            image = Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))
        return Scene(image, tuple(sorted(things, key=lambda t: t.box[0])), size)


# What each soft token is asked for while the tower is taught alone: name -> number of classes.
COORDINATES = ("y1", "x1", "y2", "x2")
LABELS = {"shape": 7, "colour": 9, "rank": 6, "centre": 2, "count": 6}
LABELS |= {f"{c}a": 10 for c in COORDINATES} | {f"{c}f": 1000 // STEP for c in COORDINATES}
WEIGHT = {"shape": 3.0, "colour": 1.5, "rank": 0.7, "centre": 1.0, "count": 0.1, "a": 0.2, "f": 0.4}
SIDES = 8  # numbers asked besides: a thing's edges as shares of the picture, and in tokens from the token's middle


def owners(scene: Scene, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """(which thing each soft token belongs to, -1 for the ground; 1 where the middle of a thing is) [rows * columns].

    A token belongs to the thing whose box covers most of it.
    """
    w, h = scene.size
    x0, y0 = np.arange(columns) * w / columns, np.arange(rows) * h / rows
    cover, n = [], rows * columns
    centre = np.zeros(n, np.int64)
    for left, top, right, bottom in (t.box for t in scene.things):
        across = np.clip(np.minimum(right, x0 + w / columns) - np.maximum(left, x0), 0, None)
        down = np.clip(np.minimum(bottom, y0 + h / rows) - np.maximum(top, y0), 0, None)
        cover.append((down[:, None] * across[None]).reshape(-1) / (w * h / n))
        at = int((top + bottom) / 2 / h * rows) * columns + int((left + right) / 2 / w * columns)
        centre[at] = 1
        cover[-1][at] += 1
    cover = np.stack(cover)
    return np.where(cover.max(0) > 0.12, cover.argmax(0), -1), centre


def labels(scene: Scene, rows: int, columns: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Classes of each soft token [rows * columns], -100 where nothing is asked, and numbers float [.., SIDES].

    rows, columns: of the picture in tokens.
    rank: the how-manieth from the left, from 1.
    """
    owner, centre = owners(scene, rows, columns)
    w, h = scene.size
    shapes = np.array([*(SHAPES.index(t.shape) + 1 for t in scene.things), 0])
    colours = np.array([*(list(COLOURS).index(t.colour) + 1 for t in scene.things), 0])
    ranks = np.array([*range(1, len(scene.things) + 1), 0])
    out = {"shape": shapes[owner], "colour": colours[owner], "rank": ranks[owner], "centre": centre}
    out["count"] = np.full(rows * columns, len(scene.things))
    for i, name in enumerate(COORDINATES):
        value = np.array([*(scene.grid(t)[i] for t in scene.things), 0])
        for suffix, unit in (("a", 100), ("f", STEP)):
            out[name + suffix] = np.where(owner < 0, -100, (value // unit)[owner])
    edges = np.array([*((t.box[1] / h, t.box[0] / w, t.box[3] / h, t.box[2] / w) for t in scene.things), (0, 0, 0, 0)])
    y, x = (np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns
    middle = np.stack([y.repeat(columns), np.tile(x, rows)] * 2, axis=-1)
    shares = edges[owner]
    return out, np.concatenate([shares, (shares - middle) * np.array([rows, columns] * 2)], axis=-1)
