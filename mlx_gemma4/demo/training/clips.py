"""Short clips of one moving shape, with or without beeps.

Owns: the drawing of frames and which way things move. Leaves shapes and grounds to `pictures.py`, beeps to `sounds.py`.
"""

import random
from dataclasses import dataclass

import pictures
import sounds
from PIL import Image

WAYS = {"to the right": (1, 0), "to the left": (-1, 0), "down": (0, 1), "up": (0, -1), "": (0, 0)}
SIZES = ((320, 180), (320, 240), (240, 240), (180, 320), (480, 270), (400, 300), (256, 256), (240, 320))


@dataclass(frozen=True)
class Clip:
    """Frames and when each is shown; `way` is empty for what stands still. sound: None where there is none."""

    frames: tuple[Image.Image, ...]
    seconds: tuple[float, ...]
    thing: str
    way: str
    sound: sounds.Sound | None

    @property
    def beeps(self) -> int:
        return len(self.sound.notes) if self.sound else 0


def draw(
    rng: random.Random, frames: int, held: bool = False, longest_sound: float = 2.4, loud: bool | None = None
) -> Clip:
    """A clip of so many frames. held: its shape and colour are a pair that the training never shows."""
    size = rng.choice(SIZES)
    scale = pictures.SUPER
    while True:
        colour, shape = rng.choice(pictures.pairs(held))
        ground, used = pictures._background(rng, (size[0] * scale, size[1] * scale))
        shade = pictures._shade(rng, colour)
        if all(pictures._far(shade, g) for g in used):
            break
    way = rng.choices(list(WAYS), (22, 22, 22, 22, 12))[0]
    dx, dy = WAYS[way]
    side = min(size) * rng.uniform(0.18, 0.4)
    room = (size[0] - side - 4, size[1] - side - 4)
    reach = rng.uniform(0.35, 1.0)
    at = [2 + rng.random() * room[0], 2 + rng.random() * room[1]]
    axis = 0 if dx else 1
    if way:
        spare = room[axis] * (1 - reach) * rng.random()
        at[axis] = 2 + (spare if dx + dy > 0 else room[axis] - spare)
    look = rng.randrange(1 << 30)  # the same angle and thickness in every frame
    pictures_ = []
    for i in range(frames):
        part = i / max(1, frames - 1) * reach
        x, y = at[0] + dx * part * room[0], at[1] + dy * part * room[1]
        image = ground.copy()
        pictures.draw_thing(random.Random(look), image, scale, shade, shape, (x, y, x + side, y + side))
        pictures_.append(image.reduce(scale))
    length = rng.uniform(1.0, 8.0)
    stamps = tuple(length * i / frames for i in range(frames))
    if loud is None:
        loud = rng.random() < 0.5
    sound = None
    while loud and (sound is None or len(sound.notes) > 4):
        sound = sounds.draw(rng, longest_sound, beeps=True)
    return Clip(tuple(pictures_), stamps, f"{colour} {shape}", way, sound)
