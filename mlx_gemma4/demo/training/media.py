"""Conversations about pictures, sounds and clips, as rows of tokens with places for the towers' features.

Owns: what such a conversation is, how it becomes ids (the prompt's form is that of `mlx_gemma4/media/prompt.py`), the
rows of the training and the unseen questions of the test. Pixels and mel features are those of `mlx_gemma4/media`.
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

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
MARKS = re.compile(r"(<\|image\|>|<\|audio\|>|<\|video\|>)")
DIGITS = (1.0, 0.5, 0.1)  # loss weights of a box's hundreds, tens and ones
LOOK = ("I look at the picture.", "I listen to the sound.", "I look at the frames.")


@dataclass
class Item:
    """One picture, sound or clip: processed parts, what it was drawn from, the times of frames."""

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
    """Ids with loss weights, and (where, which item, which part) of every run of soft tokens."""

    ids: list[int] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    runs: list[tuple[int, Item, int]] = field(default_factory=list)


def picture_item(scene: pictures.Scene, budget: int) -> Item:
    return Item("image", [process_image(scene.image, budget)], scene)


def sound_item(sound: sounds.Sound) -> Item:
    return Item("audio", [log_mel(sound.samples)], sound)


def clip_items(clip: clips.Clip) -> list[Item]:
    stamps = tuple(f"{int(s // 60):02d}:{int(s % 60):02d}" for s in clip.seconds)
    frames = Item("video", [process_image(f, 70) for f in clip.frames], clip, stamps)
    return [frames] if clip.sound is None else [frames, sound_item(clip.sound)]


def tokens_of(part: ProcessedImage | np.ndarray) -> int:
    return part.tokens if isinstance(part, ProcessedImage) else -(-len(part) // 4)


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
    items = iter(talk.items)
    for text, mine in world.segments(talk.example):
        for piece in MARKS.split(text):
            if MARKS.fullmatch(piece):
                _item_ids(row, next(items), encode)
                continue
            ids = encode(piece)
            row.ids += ids
            row.own += weights(piece, ids, encode) if mine else [0.0] * len(ids)


def weights(text: str, ids: list[int], encode: Encode) -> list[float]:
    """1 for each token, less for the last of three digits of a box."""
    out = [1.0] * len(ids)
    if "box_2d" in text:
        digits = {encode(d)[0] for d in "0123456789"}
        for i in range(2, len(ids)):
            if {ids[i - 2], ids[i - 1], ids[i]} <= digits:
                out[i - 2 : i + 1] = DIGITS
    return out


def cut(row: Row, length: int) -> Row:
    """Exactly `length` tokens. A run must not be cut."""
    row.ids, row.own = row.ids[:length], row.own[:length]
    row.ids += [0] * (length - len(row.ids))
    row.own += [-1.0] * (length - len(row.own))
    assert all(at + tokens_of(item.parts[i]) <= length for at, item, i in row.runs)
    return row


def _thought(rng: random.Random, kind: int) -> str:
    return LOOK[kind] if rng.random() < 0.06 else ""


def _asked(rng: random.Random, scene: pictures.Scene) -> list[seeing.Asked]:
    """Boxes twice as often as they come by themselves: they are the hardest."""
    out = [q for _ in range(2) for q in seeing.detections(rng, scene, False)] + seeing.questions(rng, scene, False)
    rng.shuffle(out)
    return out


def picture_row(rng: random.Random, encode: Encode, length: int, budget: int, count: int) -> Row:
    """`count` pictures with questions about each, in conversations of their own or all in one."""
    row = Row()
    for n in range(count):
        scene = pictures.draw(rng)
        items, until = [picture_item(scene, budget)], length * (n + 1) // count
        asked = _asked(rng, scene)
        talk = dialog(items, asked[: rng.randrange(1, len(asked) + 1)], _thought(rng, 0))
        same = n > 0 and rng.random() < 0.3 and not talk.example.thinking
        before = len(row.ids)
        add(row, talk, encode)
        if same:  # goes on in the conversation before: no <bos>
            del row.ids[before], row.own[before]
            row.runs = [(at - 1 if item is items[0] else at, item, i) for at, item, i in row.runs]
        while len(row.ids) < until - 12:
            for _, q, a in _asked(rng, scene):
                _more(row, q, a, encode)
                if len(row.ids) >= until - 12:
                    break
        if n < count - 1 and len(row.ids) > until + 24:  # keep room for the next picture
            row.ids, row.own = row.ids[:until], row.own[:until]
    return cut(row, length)


def _more(row: Row, question: str, answer: str, encode: Encode) -> None:
    """Another turn about the same."""
    head = encode(f"{world.TURN}user\n{question}{world.END}\n{world.TURN}model\n")
    said = encode(answer + world.END)
    row.ids += head + said + encode("\n")
    row.own += [0.0] * len(head) + weights(answer, said, encode) + [0.0]


def sound_row(rng: random.Random, encode: Encode, length: int) -> Row:
    row = Row()
    while len(row.ids) < length - 60:
        sound = sounds.draw(rng, rng.choice((2.0, 3.0, 5.0)))
        item = sound_item(sound)
        if len(row.ids) + tokens_of(item.parts[0]) + 40 > length:
            break
        asked = hearing.questions(rng, sound, False)
        rng.shuffle(asked)
        add(row, dialog([item], asked, _thought(rng, 1)), encode)
    return cut(row, length)


def clip_row(rng: random.Random, encode: Encode, length: int, frames: int) -> Row:
    row = Row()
    clip = clips.draw(rng, frames)
    asked = seeing.watched(rng, clip, False)
    rng.shuffle(asked)
    add(row, dialog(clip_items(clip), asked, _thought(rng, 2)), encode)
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
