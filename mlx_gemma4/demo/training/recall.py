"""A fact told earlier in a long text: filler, facts, questions about them.

Owns: the filler's grammar, the kinds of facts and which (thing, value) pairs are kept for the test. Leaves lengths in
tokens to the caller, who says how many to fill.
"""

import random
import zlib
from collections.abc import Callable

COLOURS = "red blue green yellow black white brown grey pink purple orange silver golden".split()
OBJECTS = "box door safe bag locker chest bike gate room drawer suitcase cupboard".split()
NAMES = (
    "Ada Ben Cara Dan Eva Finn Gina Hugo Ida Jon Kira Leo Mia Nils Olga Paul Rosa Sam Tina Ugo Vera Will Yara Zoe "
    "Alma Bruno Clara David Emma Felix Greta Henry Iris Jacob Lena Max Nora Oscar Petra Ralf Sara Tom Ursula Victor "
    "Wanda Anna Karl Lucy Mark Nina Peter Ruth Simon Thea"
).split()
LIKES = (
    "plums tea chess music snow rain books bread cheese honey cats dogs horses boats trains maps stars songs roses "
    "apples pears cherries lemons soup rice coffee milk puzzles"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
CITIES = (
    "Paris Rome Berlin Madrid Vienna Oslo Lisbon Prague Dublin Athens Cairo Tokyo Lima Boston Denver Sydney "
    "Warsaw Helsinki Budapest Geneva"
).split()

_WHO = (
    "the old man|a young woman|the farmer|the teacher|a child|the baker|the captain|my neighbour|the doctor|"
    "a traveller|"
    "the gardener|the painter|an old friend|the driver|the girl from the shop|the miller|a quiet boy|the singer"
).split("|")
_DID = (
    "walked along|looked at|talked about|waited near|thought about|came back from|wrote about|drew|cleaned|passed|"
    "remembered|worked behind|sat beside|went past|told us about|dreamed of"
).split("|")
_WHAT = (
    "the river|the small town|the bridge|the wide field|the market|the forest|the station|the harbour|the hill|"
    "the garden|the long road|the lake|the church|the school|the old wall|the windmill|the shore|the kitchen"
).split("|")
_WHEN = (
    "in the morning|at noon|after lunch|in the evening|last night|all day|for an hour|before the rain|in the cold wind|"
    "without a word|with a smile|once more|every week|in late summer|on the way home|while the birds sang"
).split("|")
_PLAIN = (
    "The rain fell softly.|The sky was clear and blue.|Nobody said much.|It was a long and quiet day.|"
    "The wind came from the sea.|A dog barked far away.|The clock was slow.|Later the lamps were lit.|"
    "The grass was still wet.|Nothing else happened.|The coffee was getting cold.|Snow lay on the roofs."
).split("|")


def filler(rng: random.Random) -> str:
    """One sentence about nothing in particular."""
    if rng.random() < 0.2:
        return rng.choice(_PLAIN)
    who = rng.choice(_WHO)
    sentence = f"{who[0].upper()}{who[1:]} {rng.choice(_DID)} {rng.choice(_WHAT)}"
    return sentence + (f" {rng.choice(_WHEN)}." if rng.random() < 0.7 else ".")


def _code(rng: random.Random) -> str:
    return str(rng.randrange(1000, 10000))


# kind -> (keys, values, ways to state it, ways to ask, answer)
KINDS = {
    "code": (
        lambda r: f"{r.choice(COLOURS)} {r.choice(OBJECTS)}", _code,
        ("The code of the {k} is {v}.", "Remember that the code of the {k} is {v}.",
         "The {k} opens with the code {v}."),
        ("What is the code of the {k}?", "Which code opens the {k}?", "Tell me the code of the {k}."),
        "The code of the {k} is {v}."),
    "like": (
        lambda r: r.choice(NAMES), lambda r: r.choice(LIKES),
        ("{k} likes {v}.", "{k} likes {v} more than anything.", "What {k} likes most is {v}."),
        ("What does {k} like?", "Tell me what {k} likes.", "What is it that {k} likes?"),
        "{k} likes {v}."),
    "home": (
        lambda r: r.choice(NAMES), lambda r: r.choice(CITIES),
        ("{k} lives in {v}.", "{k} has a house in {v}.", "The home of {k} is in {v}."),
        ("Where does {k} live?", "In which city does {k} live?", "Tell me where {k} lives."),
        "{k} lives in {v}."),
    "day": (
        lambda r: r.choice(NAMES), lambda r: r.choice(DAYS),
        ("The meeting with {k} is on {v}.", "{k} wants to meet us on {v}."),
        ("When is the meeting with {k}?", "On which day do we meet {k}?", "Tell me the day of the meeting with {k}."),
        "The meeting with {k} is on {v}."),
    "number": (
        lambda r: r.choice(NAMES), _code,
        ("The number of {k} is {v}.", "You can call {k} at {v}."),
        ("What is the number of {k}?", "How can I call {k}?", "Tell me the number of {k}."),
        "The number of {k} is {v}."),
}  # fmt: skip


def held_out(kind: str, key: str, value: str) -> bool:
    """Whether this (thing, value) pair is kept for the test: one in five."""
    return zlib.crc32(f"{kind}/{key}/{value}".encode()) % 5 == 0


def draw_fact(rng: random.Random, test: bool, kinds: tuple[str, ...]) -> tuple[str, str, str]:
    """A random (kind, key, value) of the training or of the test side."""
    while True:
        kind = rng.choice(kinds)
        key, value = KINDS[kind][0](rng), KINDS[kind][1](rng)
        if held_out(kind, key, value) == test:
            return kind, key, value


def draw(
    rng: random.Random, test: bool, room: int, count: Callable[[str], int], questions: int
) -> tuple[str, list[tuple[str, str, str]]]:
    """A text of about `room` tokens with facts in it, and (question, answer, statement) for some of them.

    `count` says how many tokens a string has. The facts asked about are of the wanted side of the split; the others
    in the text are distractors of the same kinds.
    """
    kinds = tuple(rng.sample(sorted(KINDS), rng.choice((1, 1, 2, 3, 5))))
    wanted = max(questions, rng.randrange(2, 5 + min(12, room // 120)))
    facts: dict[tuple[str, str], tuple[str, str]] = {}
    for _ in range(wanted * 4):
        if len(facts) == wanted:
            break
        kind, key, value = draw_fact(rng, test, kinds)
        if (kind, key) not in facts:
            facts[kind, key] = (value, rng.choice(KINDS[kind][2]).format(k=key, v=value))
    used = sum(count(" " + s) for _, s in facts.values())
    plain: list[str] = []
    while used < room:
        plain.append(filler(rng))
        used += count(" " + plain[-1])
    places = sorted(rng.randrange(len(plain) + 1) for _ in facts)
    sentences, at = [], 0
    for place, (_, statement) in zip(places, facts.values(), strict=True):
        sentences += [*plain[at:place], statement]
        at = place
    sentences += plain[at:]
    asked = []
    for (kind, key), (value, statement) in rng.sample(sorted(facts.items()), min(questions, len(facts))):
        *_, ways, reply = KINDS[kind]
        asked.append((rng.choice(ways).format(k=key), reply.format(k=key, v=value), statement))
    return " ".join(sentences), asked
