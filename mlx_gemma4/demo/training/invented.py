"""Tools made of plain words: what is asked of a thing, and what is done to one.

Owns: their nouns, verbs, parameters and wordings, drawn afresh for each tool, and which of them are kept for the test.
With them a question leads to a tool by its words, whatever the tool. Leaves the pool and words that mean nothing to
`toolbox.py`.
"""

import random
import zlib
from collections.abc import Sequence

NOUNS = (
    "size weight height speed level rank score number owner maker date order state status depth length width value "
    "tax fee rent pay grade title topic song mood rule plan path road station street floor seat desk table class team "
    "group bus stop ship boat bike dog cat food drink soup meal menu bread fruit flower tree colour sound sign mark "
    "letter note book page word key door window bed lamp clock ring bell coat hat shoe game prize club school teacher "
    "doctor mother father sister brother friend son guest king queen mayor hero job task limit signal power heat wind "
    "rain snow water light air noise smell taste age capital language flag currency code place trip tour flight visit"
).split()
VERBS = (
    "move lock unlock wash sell start stop fetch fill print scan lift push pull turn clean cover check count weigh "
    "test fix break build burn carry catch close cut drop empty find hide hold keep leave load mark pack save show "
    "sort store take throw wrap book rent ship warm cool dry fold hang copy delete"
).split()
# How parameters are called, and by which kind of value.
_KEYS = {
    "city": ("city", "town", "place", "where"), "name": ("name", "person", "who", "user"),
    "object": ("thing", "object", "item"), "like": ("item", "product", "what"), "day": ("day", "date", "when"),
    "colour": ("colour", "color"), "room": ("room", "place"), "int": ("number", "count", "amount", "n", "a", "id"),
    "word": ("word", "text", "key"),
}  # fmt: skip
_ABOUT = {"city": "a city", "name": "a person", "object": "a thing", "like": "an item", "day": "a day",
          "room": "a room", "word": "a word", "int": "a number"}  # fmt: skip
_NAMES = ("{n}", "{n}", "{n}_of", "{n}_for", "get_{n}", "find_{n}", "show_{n}", "{n}_{k}")
_TELLS = ("The {n} of {k}.", "Gives the {n} of {k}.", "Tells the {n}.", "Finds the {n} of {k}.", "The {n} for {k}.",
          "Looks up the {n} of {k}.", "Knows the {n} of {k}.")  # fmt: skip
_ONE = (("What is the {n} of {v}?", "What is the {n} for {v}?", "Tell me the {n} of {v}.", "Which {n} has {v}?",
         "In which {n} is {v}?", "{n} of {v}?", "Show me the {n} of {v}.", "Find the {n} of {v}.",
         "On which {n} is {v}?", "Which {n} does {v} have?", "I need the {n} for {v}.", "What {n} has {v}?"),
        ("Please give me the {n} of {v}.", "What is the {n} that {v} has?", "Look for the {n} of {v}."))  # fmt: skip
_TWO = (("What is the {n} for {v} {and_w}?", "What is the {n} of {v} {and_w}?", "Tell me the {n} of {v} {and_w}.",
         "{n} of {v} {and_w}?", "Which {n} has {v} {and_w}?", "I need the {n} for {v} {and_w}."),
        ("Please give me the {n} of {v} {and_w}.", "How is the {n} of {v} {and_w}?"))  # fmt: skip
_WITH = {"day": "on {w}", "city": "in {w}", "room": "in the {w}", "int": "with {w}", "colour": "in {w}",
         "name": "for {w}"}  # fmt: skip
_DOES = ("Can {n} {k}.", "To {n} {k}.", "Will {n} {k}.")
_DO = (("{n} {v}.", "Please {n} {v}.", "I want to {n} {v}.", "Can you {n} {v}?", "{n} {v}, please."),
       ("Would you {n} {v}?", "You should {n} {v}."))  # fmt: skip
# Ways to name a tool with its parameters: shared with the made-up ones of `toolbox.py`.
USE = (("Use {t} with {p}.", "Call {t} with {p}.", "{t} with {p}, please.", "What does {t} say to {p}?", "{t}: {p}",
        "Try {t} with {p}.", "Please use {t} with {p}.", "I want {t} with {p}."),
       ("Run {t} with {p}.", "I need {t} for {p}."))  # fmt: skip
PARTS = (("{k} {v}", "{k} = {v}", "{k}: {v}", "{v} as {k}", "{v} for {k}", "the {k} {v}"),
         ("{k} is {v}", "{v} as the {k}"))  # fmt: skip
_PAIRS = ("a b", "x y", "n m", "first second", "one two", "left right", "number other", "base top")
_SUMS = ("Takes {b} from {a}.", "Puts {a} and {b} together.", "Shares {a} among {b}.", "Compares {a} with {b}.")


def held(word: str) -> bool:
    """Whether a noun or a verb is kept for the test: one in seven."""
    return zlib.crc32(word.encode()) % 7 == 0


def _key(kind: str, rng: random.Random, taken: str = "") -> str:
    return rng.choice([key for key in _KEYS[kind] if key != taken])


def draw(rng: random.Random, test: bool) -> tuple[str, str, dict[str, str], dict[str, str], tuple[str, ...]]:
    """(name, what it does, kinds of its parameters, kinds of what it gives, its questions) of a tool of one side."""
    if rng.random() < 0.1:
        return _of_numbers(rng, test)
    asks = rng.random() < 0.7
    noun = rng.choice([w for w in (NOUNS if asks else VERBS) if held(w) == test])
    kind = rng.choice(("city", "name", "object", "like", "word", "day", "int") if asks else ("object", "like", "name"))
    key = _key(kind, rng)
    takes, second = {key: kind}, ""
    if rng.random() < 0.4:
        second = rng.choice([k for k in (_WITH if asks else ("room", "city", "day", "int", "colour")) if k != kind])
        takes[_key(second, rng, key)] = second
    keys = list(takes)
    what = "{" + key + "}"
    spoken = f"the {what}" if kind == "object" else f"the number {what}" if kind == "int" else what
    tail = _WITH[second].replace("w", keys[1]) if second else ""
    if asks:
        ways = [w.replace("{n}", noun).replace("{v}", spoken).replace("{and_w}", tail)
                for w in (_TWO if second else _ONE)[test]]  # fmt: skip
        about = rng.choice(_TELLS).format(n=noun, k=_ABOUT[kind])
        name = rng.choice(_NAMES).format(n=noun, k=kind)
        found = rng.choice(("int", "int", "word", "city", "name", "like"))
        gives = {rng.choice((noun, noun, "value", "result")): found}
        if rng.random() < 0.2:
            gives["more"] = "int"
    else:
        ways = [w.replace("{n}", noun).replace("{v}", f"{spoken} {tail}".strip()) for w in _DO[test]]
        about = rng.choice(_DOES).format(n=noun, k=_ABOUT[kind])
        name, gives = rng.choice(("{n}", "{n}", "{n}_it", "do_{n}", "{n}_{k}")).format(n=noun, k=kind), {}
    if rng.random() < 0.3:
        return name, about, takes, gives, used(name, keys, rng, test)
    return name, about, takes, gives, tuple(w[0].upper() + w[1:] for w in ways)


def used(name: str, keys: Sequence[str], rng: random.Random, test: bool) -> tuple[str, ...]:
    """Questions that name the tool and its parameters."""
    part = rng.choice(PARTS[test])
    said = " and ".join(part.format(k=k, v="{" + k + "}") for k in keys)
    return tuple(w.format(t=name, p=said) for w in USE[test])


def _of_numbers(rng: random.Random, test: bool) -> tuple[str, str, dict[str, str], dict[str, str], tuple[str, ...]]:
    """As `draw`, of a tool that makes a number of two."""
    verb, (a, b) = rng.choice([w for w in VERBS if held(w) == test]), rng.choice(_PAIRS).split()
    gives = {rng.choice(("value", "result", "number")): "int"}
    return verb, rng.choice(_SUMS).format(a=a, b=b), {a: "int", b: "int"}, gives, used(verb, (a, b), rng, test)
