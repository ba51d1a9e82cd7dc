"""What is asked about pictures and clips, and the answers.

Owns: the wordings, which of them are kept for the test, and the form of boxes. Leaves pictures to `pictures.py` and
clips to `clips.py`. Boxes are Gemma 4's: JSON with `box_2d` [y1, x1, y2, x2] on a grid of 1000 x 1000, from left to
right, and the whole name as label.
"""

import random
from collections import Counter

import pictures
from clips import Clip
from hearing import NUMBERS

PLURAL = {s: s + ("es" if s == "cross" else "s") for s in pictures.SHAPES}


def article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def count_of(n: int, one: str, many: str) -> str:
    return f"{NUMBERS[n]} {one if n == 1 else many}"


def describe(scene: pictures.Scene) -> str:
    """All that is there, from left to right, equal ones together."""
    names = [t.name for t in scene.things]
    counts = Counter(names)
    said = []
    for name in dict.fromkeys(names):
        colour, shape = name.split()
        said.append(article(name) if counts[name] == 1 else f"{NUMBERS[counts[name]]} {colour} {PLURAL[shape]}")
    return f"I see {joined(said)}."


def boxes(scene: pictures.Scene, things: list[pictures.Thing]) -> str:
    """Their boxes as JSON; `[]` for none."""
    parts = [f'{{"box_2d": [{", ".join(map(str, scene.grid(t)))}], "label": "{t.name}"}}' for t in things]
    return f"[{', '.join(parts)}]"


def place(scene: pictures.Scene, thing: pictures.Thing) -> str | None:
    """One of nine places, None near a border of two."""
    y1, x1, y2, x2 = scene.grid(thing)
    words = []
    for value, names in (((y1 + y2) / 2, ("top", "", "bottom")), ((x1 + x2) / 2, ("left", "", "right"))):
        if min(abs(value - 360), abs(value - 640)) < 35:
            return None
        words.append(names[(value > 360) + (value > 640)])
    row, column = words
    if not row and not column:
        return "in the middle"
    return f"at the {row} {column}" if row and column else f"at the {row}" if row else f"on the {column}"


# (wordings of the training, wordings of the test)
WHAT = (("What do you see?", "What is in the picture?", "Describe the picture.", "What is this?", "What can you see?",
         "What does the picture show?", "Describe this picture.", "What is shown here?", "What is in this picture?"),
        ("What is on the picture?", "Tell me what you see.", "What do you see in the picture?"))  # fmt: skip
COUNT = (("How many {x} are there?", "How many {x} do you see?", "Count the {x}.", "How many {x}?",
          "How many {x} are in the picture?"),
         ("How many {x} can you see?", "How many {x} does the picture show?"))  # fmt: skip
WHERE = (("Where is the {x}?", "Where do you see the {x}?", "In which part of the picture is the {x}?"),
         ("Where in the picture is the {x}?", "Where can I see the {x}?"))  # fmt: skip
COLOUR = (("What colour is the {x}?", "Which colour does the {x} have?", "What is the colour of the {x}?",
           "What color is the {x}?"), ("Which colour is the {x}?", "Tell me the colour of the {x}."))  # fmt: skip
SHAPE = (("Which shape is {x}?", "What is the {x} shape?", "What shape is {x}?", "What is {x}?"),
         ("What kind of shape is {x}?", "Which shape is the {x} one?"))  # fmt: skip
EXISTS = (("Is there {x}?", "Do you see {x}?", "Can you see {x}?", "Is there {x} in the picture?"),
          ("Do you see {x} in the picture?", "Does the picture show {x}?"))  # fmt: skip
SIDE = (("Is the {a} {side} the {b}?", "Is the {a} {side} the {b} in the picture?", "Is the {a} there {side} the {b}?"),
        ("Is the {a} {side} the {b} in this picture?", "Is the {a} shown {side} the {b}?"))  # fmt: skip
SIDES = {"to the left of": (0, 1), "left of": (0, 1), "to the right of": (0, -1), "right of": (0, -1),
         "above": (1, 1), "below": (1, -1)}  # fmt: skip
DETECT = (("detect {x}", "detect {x}", "detect {x}", "detect the {x}", "Detect the {x}.", "Detect {x}.",
           "Give me the box of the {x}.", "Find the {x}."), ("detect {x}",))  # fmt: skip
DETECT_SOME = (("detect {x}", "detect {x}", "detect all {x}", "Detect all {x}.", "Detect the {x}.", "Detect {x}.",
                "Give me the boxes of the {x}.", "Find all {x}."), ("detect {x}",))  # fmt: skip
DETECT_ALL = (("detect everything", "detect everything", "detect all shapes", "detect shapes", "Detect everything.",
               "Detect all shapes.", "detect all objects", "Find everything.", "detect the shapes"),
              ("detect everything", "detect shapes"))  # fmt: skip

Asked = tuple[str, str, str]  # kind, question, answer


def _absent(rng: random.Random, scene: pictures.Scene) -> str:
    """A name not in the picture, often sharing its colour or shape with something there."""
    names = {t.name for t in scene.things}
    while True:
        colour, shape = rng.choice(list(pictures.COLOURS)), rng.choice(pictures.SHAPES)
        if rng.random() < 0.6:
            thing = rng.choice(scene.things)
            colour, shape = (thing.colour, shape) if rng.random() < 0.5 else (colour, thing.shape)
        if f"{colour} {shape}" not in names:
            return f"{colour} {shape}"


def detections(rng: random.Random, scene: pictures.Scene, test: bool) -> list[Asked]:
    """Questions whose answers are boxes: one thing, all of a shape or colour, everything, something not there."""
    side, things, out = int(test), list(scene.things), []
    thing = rng.choice(things)
    same = [t for t in things if t.name == thing.name]
    way = rng.choice(DETECT[side])
    out.append(("detect", way.format(x=thing.name), boxes(scene, same)))
    if rng.random() < 0.45:
        out.append(("detect-none", rng.choice(DETECT[side]).format(x=_absent(rng, scene)), "[]"))
    if rng.random() < 0.5:
        alike = [t for t in things if t.shape == thing.shape]
        out.append(("detect-shape", rng.choice(DETECT_SOME[side]).format(x=PLURAL[thing.shape]), boxes(scene, alike)))
        if len(alike) == 1 and rng.random() < 0.5:
            out[-1] = ("detect-shape", rng.choice(DETECT[side]).format(x=thing.shape), boxes(scene, alike))
    if rng.random() < 0.25:
        alike = [t for t in things if t.colour == thing.colour]
        what = f"{thing.colour} {rng.choice(('shapes', 'things'))}"
        out.append(("detect-colour", rng.choice(DETECT_SOME[side]).format(x=what), boxes(scene, alike)))
    if rng.random() < 0.6:
        out.append(("detect-all", rng.choice(DETECT_ALL[side]), boxes(scene, things)))
    return out


def questions(rng: random.Random, scene: pictures.Scene, test: bool) -> list[Asked]:
    """Questions with answers in words, of every kind that this picture allows."""
    side, things = int(test), list(scene.things)
    names = [t.name for t in things]
    out: list[Asked] = [("see-what", rng.choice(WHAT[side]), describe(scene))]
    thing = rng.choice(things)

    colour, shape = (rng.choice(list(pictures.COLOURS)), rng.choice(pictures.SHAPES)) if rng.random() < 0.15 else (
        thing.colour, thing.shape)  # fmt: skip
    roll = rng.random()
    if roll < 0.4:
        n, one, many = len(things), "shape", "shapes"
    elif roll < 0.75:
        n, one, many = sum(t.shape == shape for t in things), shape, PLURAL[shape]
    else:
        n, one, many = sum(t.colour == colour for t in things), f"{colour} shape", f"{colour} shapes"
    said = f"There {'is' if n == 1 else 'are'} {count_of(n, one, many)}."
    out.append(("see-count", rng.choice(COUNT[side]).format(x=many), said))

    if len(things) == 1 and rng.random() < 0.5:
        which = rng.choice(("What", "Which"))
        out.append(("see-shape", f"{which} shape is it?", f"It is {article(thing.shape)}."))
        out.append(("see-colour", f"{which} colour is it?", f"It is {thing.colour}."))
    if [t.shape for t in things].count(thing.shape) == 1:
        said = f"The {thing.shape} is {thing.colour}."
        out.append(("see-colour", rng.choice(COLOUR[side]).format(x=thing.shape), said))
    if [t.colour for t in things].count(thing.colour) == 1:
        said = f"The {thing.colour} shape is {article(thing.shape)}."
        out.append(("see-shape", rng.choice(SHAPE[side]).format(x=thing.colour), said))

    if names.count(thing.name) == 1 and (where := place(scene, thing)):
        word = thing.shape if [t.shape for t in things].count(thing.shape) == 1 and rng.random() < 0.4 else thing.name
        out.append(("see-where", rng.choice(WHERE[side]).format(x=word), f"The {word} is {where}."))

    name = thing.name if rng.random() < 0.5 else _absent(rng, scene)
    said = f"Yes, I see {article(name)}." if name in names else f"No, I see no {name}."
    if names.count(name) < 2:
        out.append(("see-exists", rng.choice(EXISTS[side]).format(x=article(name)), said))

    if len(things) > 1:
        a, b = rng.sample(things, 2)
        words, (axis, sign) = rng.choice(list(SIDES.items()))
        centre = [((t.box[axis] + t.box[axis + 2]) / 2) / scene.size[axis] for t in (a, b)]
        if names.count(a.name) == names.count(b.name) == 1 and abs(centre[0] - centre[1]) > 0.08:
            yes = (centre[1] - centre[0]) * sign > 0
            way = rng.choice(SIDE[side]).format(a=a.name, side=words, b=b.name)
            out.append(("see-side", way, "Yes, it is." if yes else "No, it is not."))
    return out


WAY = (("Which way does it move?", "Where does it go?", "In which direction does it move?", "Where does it move?",
        "Which way does the {x} move?"),
       ("Which way does it go?", "In which direction does the {x} move?"))  # fmt: skip
HAPPENS = (("What do you see?", "What happens?", "Describe the video.", "What is in the video?",
            "What happens in the video?", "What moves?"),
           ("What does the video show?", "What can you see?"))  # fmt: skip
BEEPS = (("Does it beep?", "Do you hear beeps?", "Is there a beep?", "How often does it beep?", "Do you hear a beep?"),
         ("Can you hear a beep?", "Does the video beep?"))  # fmt: skip
TIMES = ("never", "once", "twice", "three times", "four times", "five times", "six times")


def watched(rng: random.Random, clip: Clip, test: bool) -> list[Asked]:
    """Questions about a clip."""
    side, name = int(test), clip.thing
    shape = name.split()[1]
    moves = {"": "does not move"}.get(clip.way, f"moves {clip.way}")
    said = article(name)
    return [
        ("watch-way", rng.choice(WAY[side]).format(x=shape), f"It {moves}."),
        ("watch-what", rng.choice(HAPPENS[side]), f"{said[0].upper()}{said[1:]} {moves}."),
        ("watch-shape", rng.choice(("What shape is it?", "Which shape moves?", "Which shape do you see?")),
         f"It is {article(shape)}."),
        ("watch-colour", rng.choice(("What colour is it?", f"What colour is the {shape}?")),
         f"It is {name.split()[0]}."),
        ("watch-beep", rng.choice(BEEPS[side]),
         f"Yes, it beeps {TIMES[clip.beeps]}." if clip.beeps else "No, it does not beep."),
    ]  # fmt: skip
