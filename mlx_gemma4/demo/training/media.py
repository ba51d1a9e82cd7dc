"""Conversations about pictures, sounds and clips, as rows of tokens with places for the towers' features.

Owns: what such a conversation is, how it becomes ids (the prompt's form is that of `mlx_gemma4/media/prompt.py`), the
rows of the training and the unseen questions of the test. Pixels and mel features are those of `mlx_gemma4/media`.
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import clips
import hearing
import numpy as np
import pictures
import seeing
import sounds
import world
from grow import MARKS as IDS

from mlx_gemma4.media.images import ProcessedImage, process_image
from mlx_gemma4.media.mel import log_mel

Encode = Callable[[str], list[int]]
BOX = re.compile(r'"box_2d": \[(\d+), (\d+), (\d+), (\d+)\], "label": "([a-z ]+)"')
MARKS = re.compile(r"(<\|image\|>|<\|audio\|>|<\|video\|>)")
DECIDES = 3.0
DIGITS = (1.0, 0.7, 0.1)  # loss weights of a box's hundreds, tens and ones
LOOK = ("I look at the picture.", "I listen to the sound.", "I look at the frames.")


class Aim(NamedTuple):
    """What the model should know before a token: `media.aims` says when.

    sides: y1, x1, y2, x2 of a box as shares of the picture, -1 where there is none or it is written already. count: of
    boxes in the answer, -1 where not asked. things, run: which things of which picture in the row, one for each head
    that is shown where to look; empty for none. asked: the colour and the shape that the question names, -1 where it
    names none or several.
    """

    sides: tuple[float, ...]
    count: int
    things: tuple[int, ...]
    run: int
    asked: tuple[int, int]


@dataclass
class Seen:
    """What a tower made of a picture, a frame or a sound, before the projector: a tensor [tokens, 128].

    rows, columns: of a picture in tokens.
    """

    features: Any
    rows: int = 0
    columns: int = 0

    @property
    def tokens(self) -> int:
        return len(self.features)


@dataclass
class Item:
    """One picture, sound or clip: its parts, processed or seen, what it was drawn from, the times of frames."""

    kind: str
    parts: list
    source: object
    stamps: tuple[str, ...] = ()


@dataclass
class Dialog:
    """A conversation, its media in order, and what kind each of its questions is."""

    example: world.Example
    items: list[Item]
    kinds: list[str]


@dataclass
class Row:
    """Ids with loss weights, (where, which item, which part) of every run of soft tokens, `aims` of positions, and of
    `copying.copies` the places to copy from.
    """

    ids: list[int] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    runs: list[tuple[int, Item, int]] = field(default_factory=list)
    aimed: dict[int, Aim] = field(default_factory=dict)
    copied: dict[int, list[int]] = field(default_factory=dict)

    def say(self, question: str, text: str, ids: list[int], encode: "Encode", scene: pictures.Scene | None) -> None:
        """Adds what the model says to a question about a picture of this scene."""
        if scene is not None:
            begin, run = len(self.ids) - 1, len(self.runs) - 1
            new = aims(question, text, ids, encode, scene, run)
            self.aimed |= {begin + i: aim for i, aim in enumerate(new)}
        self.ids += ids
        self.own += weights(text, ids, encode)


def picture_item(scene: pictures.Scene, budget: int) -> Item:
    return Item("image", [process_image(scene.image, budget)], scene)


def sound_item(sound: sounds.Sound) -> Item:
    return Item("audio", [log_mel(sound.samples)], sound)


def stamps(clip: clips.Clip) -> tuple[str, ...]:
    """The time of each frame, as in the prompt."""
    return tuple(f"{int(s // 60):02d}:{int(s % 60):02d}" for s in clip.seconds)


def clip_items(clip: clips.Clip) -> list[Item]:
    frames = Item("video", [process_image(f, 70) for f in clip.frames], clip, stamps(clip))
    return [frames] if clip.sound is None else [frames, sound_item(clip.sound)]


def tokens_of(part: "ProcessedImage | np.ndarray | Seen") -> int:
    """Soft tokens of pixels, of mel features, or of what a tower made of them."""
    return -(-len(part) // 4) if isinstance(part, np.ndarray) else part.tokens


def dialog(items: list[Item], asked: list[seeing.Asked], thought: str = "") -> Dialog:
    """The media stand before the first question."""
    marks = "".join(f"<|{item.kind}|>" for item in items)
    messages = world._turns([(q, a) for _, q, a in asked])
    messages[0]["content"] = marks + messages[0]["content"]
    example = world.Example("media", messages, bool(thought), None, thought)
    return Dialog(example, items, [kind for kind, _, _ in asked])


def _item_ids(row: Row, item: Item, encode: Encode) -> None:
    begin, end = ("<|audio>", "<audio|>") if item.kind == "audio" else ("<|image>", "<image|>")
    for i, part in enumerate(item.parts):
        lead = encode(("" if i == 0 else " ") + item.stamps[i] + " ") if item.stamps else []
        row.runs.append((len(row.ids) + len(lead) + 1, item, i))
        new = [*lead, IDS[begin], *[IDS[f"<|{item.kind}|>"]] * tokens_of(part), IDS[end]]
        row.ids += new
        row.own += [-1.0] * len(new)  # no loss at all


def add(row: Row, talk: Dialog, encode: Encode) -> None:
    """Writes a conversation at the end of a row."""
    question, items, scene = "", iter(talk.items), talk.items[0].source if talk.items[0].kind == "image" else None
    for text, mine in world.segments(talk.example):
        for piece in MARKS.split(text):
            if MARKS.fullmatch(piece):
                _item_ids(row, next(items), encode)
                continue
            ids = encode(piece)
            if mine:
                row.say(question, piece, ids, encode, scene)
            else:
                question = piece
                row.ids += ids
                row.own += [0.0] * len(ids)


def weights(text: str, ids: list[int], encode: Encode) -> list[float]:
    """1 for each token, more where one says whether there is something, or one more; less for the digits of a box."""
    out = [1.0] * len(ids)
    if text.startswith(("Yes", "No", "[")):
        out[text[0] == "["] = DECIDES  # the token behind the bracket says whether the list is empty
    if "box_2d" in text:
        digits = {encode(d)[0] for d in "0123456789"}
        for i in range(2, len(ids)):
            if {ids[i - 2], ids[i - 1], ids[i]} <= digits:
                out[i - 2 : i + 1] = DIGITS
        ends = {encode(mark)[0] for mark in ('"}]', '"}, ')}
        out = [DECIDES if i in ends else w for i, w in zip(ids, out, strict=True)]
    return out


def asked_for(question: str) -> tuple[int, int]:
    """(number of the colour, number of the shape) that a question names, -1 where it names none or several."""
    words = re.findall("[a-z]+", question)
    shapes = {plural: shape for shape, plural in seeing.PLURAL.items()}
    colours = {w for w in words if w in pictures.COLOURS}
    named = {shapes.get(w, w) for w in words} & set(pictures.SHAPES)
    return (
        list(pictures.COLOURS).index(*colours) if len(colours) == 1 else -1,
        pictures.SHAPES.index(*named) if len(named) == 1 else -1,
    )


def aims(question: str, text: str, ids: list[int], encode: Encode, scene: pictures.Scene, run: int) -> list[Aim]:
    """What the model should know before each token of an answer: the box it writes or is about to write, how many
    boxes there will be, the one thing that an answer in words is about or the two it compares, and what the question
    named.
    """
    found = BOX.findall(text)
    boxes = [tuple(int(n) for n in box[:4]) for box in found]
    if text[0] == "[":
        count = len(boxes)
        things = [
            next(i for i, t in enumerate(scene.things) if t.name == label and scene.grid(t) == box)
            for box, (*_, label) in zip(boxes, found, strict=True)
        ]
    else:
        words = set(re.findall("[a-z]+", text))
        named = [i for i, t in enumerate(scene.things) if {t.colour, t.shape} <= words]
        count = int(text[0] == "Y") if text.startswith(("Yes, I see", "No, I see")) else -1
        things = named if len(named) == 1 else []
    compared = _compared(question, scene) if text.startswith(("Yes, it is", "No, it is")) else ()
    digits, another = {encode(d)[0] for d in "0123456789"}, encode('"}, ')[0]
    at, seen, out, named = 0, 0, [], asked_for(question)
    for i in range(len(ids)):
        if boxes and i and ids[i - 1] == another:
            at, seen = at + 1, 0
        elif boxes and i and ids[i - 1] in digits:
            seen += 1
        sides = boxes[at] if at < len(boxes) else (-1000,) * 4
        left = tuple(-1.0 if seen >= 3 * (n + 1) else side / 1000 for n, side in enumerate(sides))
        out.append(Aim(left, count, compared or (things[at],) * 2 if at < len(things) or compared else (), run, named))
    return out


def _compared(question: str, scene: pictures.Scene) -> tuple[int, ...]:
    """The two things of the picture that a question names, in its order; none where it names more or fewer."""
    found = sorted((question.find(t.name), i) for i, t in enumerate(scene.things) if t.name in question)
    return tuple(i for _, i in found) if len(found) == 2 else ()


def cut(row: Row, length: int) -> Row:
    """Exactly `length` tokens. A run must not be cut."""
    row.ids, row.own = row.ids[:length], row.own[:length]
    row.ids += [0] * (length - len(row.ids))
    row.own += [-1.0] * (length - len(row.own))
    row.aimed = {at: aim for at, aim in row.aimed.items() if at < length}
    assert all(at + tokens_of(item.parts[i]) <= length for at, item, i in row.runs)
    return row


def _thought(rng: random.Random, kind: int) -> str:
    return LOOK[kind] if rng.random() < 0.06 else ""


def _asked(rng: random.Random, scene: pictures.Scene) -> list[seeing.Asked]:
    """Boxes twice as often as they come by themselves: they are the hardest."""
    out = [q for _ in range(2) for q in seeing.detections(rng, scene, False)] + seeing.questions(rng, scene, False)
    rng.shuffle(out)
    return out


def picture_row(rng: random.Random, encode: Encode, length: int, items: list[Item]) -> Row:
    """Pictures with questions about each, in conversations of their own or all in one."""
    row = Row()
    for n, item in enumerate(items):
        until = length * (n + 1) // len(items)
        asked = _asked(rng, item.source)
        talk = dialog([item], asked[: rng.randrange(1, len(asked) + 1)], _thought(rng, 0))
        same = n > 0 and rng.random() < 0.3 and not talk.example.thinking
        before = len(row.ids)
        add(row, talk, encode)
        if same:  # goes on in the conversation before: no <bos>
            del row.ids[before], row.own[before]
            row.runs = [(at - 1 if i == n else at, it, part) for i, (at, it, part) in enumerate(row.runs)]
            row.aimed = {at - (at > before): aim for at, aim in row.aimed.items()}
        while len(row.ids) < until - 12:
            for _, q, a in _asked(rng, item.source):
                _more(row, q, a, encode, item.source)
                if len(row.ids) >= until - 12:
                    break
        if n < len(items) - 1 and len(row.ids) > until + 24:  # keep room for the next picture
            row.ids, row.own = row.ids[:until], row.own[:until]
            row.aimed = {at: aim for at, aim in row.aimed.items() if at < until}
    return cut(row, length)


def _more(row: Row, question: str, answer: str, encode: Encode, scene: pictures.Scene | None = None) -> None:
    """Another turn about the same."""
    head = encode(f"{world.TURN}user\n{question}{world.END}\n{world.TURN}model\n")
    said = encode(answer + world.END)
    row.ids += head
    row.own += [0.0] * len(head)
    row.say(question, answer, said, encode, scene)
    row.ids += encode("\n")
    row.own += [0.0]


def sound_row(rng: random.Random, encode: Encode, length: int, take: Callable[[], Item]) -> Row:
    """As many sounds as fit, each in a conversation of its own."""
    row = Row()
    while len(row.ids) < length - 60:
        item = take()
        if len(row.ids) + tokens_of(item.parts[0]) + 40 > length:
            if row.ids:
                break
            continue
        asked = hearing.questions(rng, item.source, False)
        rng.shuffle(asked)
        add(row, dialog([item], asked, _thought(rng, 1)), encode)
    return cut(row, length)


def clip_row(rng: random.Random, encode: Encode, length: int, items: list[Item]) -> Row:
    """One clip, asked about until the row is full."""
    row, clip = Row(), items[0].source
    asked = seeing.watched(rng, clip, False)
    rng.shuffle(asked)
    add(row, dialog(items, asked, _thought(rng, 2)), encode)
    while len(row.ids) < length - 12:
        rng.shuffle(asked := seeing.watched(rng, clip, False))
        for _, q, a in asked:
            _more(row, q, a, encode)
    return cut(row, length)


def text_row(pair: tuple[list[int], list[int]]) -> Row:
    """A row of `world.rows`."""
    ids, own = pair
    return Row(list(ids), [float(o) if i else -1.0 for i, o in zip(ids, own, strict=True)])


SEE = ("see-what", "see-count", "see-colour", "see-shape", "see-where", "see-exists", "see-side", "detect",
       "detect-shape", "detect-all", "detect-none")  # fmt: skip
HEAR = ("hear-what", "hear-count", "hear-pitch", "hear-glide", "hear-kind")
WATCH = ("watch-way", "watch-what", "watch-beep")
KINDS = (*SEE, *HEAR, *WATCH)


def test_set(
    kind: str, count: int, seed: int, budget: int = 70, held: bool = False, frames: int = 0
) -> Iterator[Dialog]:
    """Conversations of one unseen question about an unseen picture, sound or clip each.

    held: pictures and clips that show a pair of colour and shape that the training never had. frames: of clips; 0 is
    two to six.
    """
    rng = random.Random(f"media/{seed}/{kind}/{held}")
    made = 0
    while made < count:
        if kind in HEAR:
            sound = sounds.draw(rng, rng.choice((2.0, 3.0, 5.0)))
            items, asked = [sound_item(sound)], hearing.questions(rng, sound, True)
        elif kind in WATCH:
            clip = clips.draw(rng, frames or rng.randrange(2, 7), held)
            items, asked = clip_items(clip), seeing.watched(rng, clip, True)
        else:
            scene = pictures.draw(rng, held)
            items = [picture_item(scene, budget)]
            asked = seeing.detections(rng, scene, True) + seeing.questions(rng, scene, True)
            if held:
                names = [t.name for t in scene.things if (t.colour, t.shape) in pictures.HELD_PAIRS]
                asked = [a for a in asked if kind in ("see-what", "detect-all") or any(
                    word in a[1] + a[2] for word in names)]  # fmt: skip
        chosen = [a for a in asked if a[0] == kind]
        if chosen:
            made += 1
            yield dialog(items, chosen[:1])
