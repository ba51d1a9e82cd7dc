"""The tools of the training: real ones, made-up ones, their questions, their results and what is said to those.

Owns: the pool, the making of tools that nobody knows, the rules by which a result becomes an answer, and which tools,
words, wordings and values are kept for the test. Leaves tools of plain words to `invented.py`, conversations to
`calls.py`.
"""

import random
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import invented
import recall
import rules
import talk
import world

# name | what it does | parameters | what it gives, nothing where it only acts | questions, those after # for the test
_POOL = """
weather|The weather in a city.|city:city|celsius:int sky:sky|What is the weather in {city}?;How is the weather in {city}?;Weather in {city}?;Tell me the weather in {city}.#How warm is it in {city}?;What weather does {city} have?
time_in|The time in a city.|city:city|time:clock|What time is it in {city}?;Time in {city}?;Tell me the time in {city}.#How late is it in {city}?
people|How many live in a city.|city:city|people:int|How many people live in {city}?;How large is {city}?;People in {city}?#How many live in {city}?
hotel|Finds a hotel in a city.|city:city|hotel:name price:int|Find a hotel in {city}.;I need a hotel in {city}.;Where can I sleep in {city}?#Is there a hotel in {city}?
train|The next train.|start:city to:city|time:clock|When is the next train from {start} to {to}?;Train from {start} to {to}?;Next train from {start} to {to}?#When can I go from {start} to {to}?
distance|How far two cities are apart.|start:city to:city|km:int|How far is it from {start} to {to}?;How far is {to} from {start}?#How many km are there from {start} to {to}?
set_timer|Starts a timer.|minutes:int||Set a timer for {minutes} minutes.;Timer for {minutes} minutes.;Start a timer of {minutes} minutes.#Wake me in {minutes} minutes.
add|Adds two numbers.|a:int b:int|value:int|What is {a} + {b}?;Add {a} and {b}.;{a} + {b}?;How much is {a} plus {b}?#Work out {a} + {b}.
times|Multiplies two numbers.|a:int b:int|value:int|What is {a} x {b}?;How much is {a} times {b}?;{a} x {b}?#Work out {a} x {b}.
send|Sends a text.|text:text to:name||Send {to} the text: {text};Send "{text}" to {to}.;Tell {to}: {text};Write to {to}: {text}#Please tell {to} "{text}".
call_up|Calls a person.|name:name||Call {name}.;Please call {name}.;I want to talk to {name}.#Ring up {name}.
play|Plays a song.|song:text||Play {song}.;Play the song {song}.;I want to hear {song}.#Let me hear {song}.
light|The light of a room.|on:bool room:room||Turn {on} the light in the {room}.;Light {on} in the {room}.;{room}: light {on}.#Switch {on} the light of the {room}.
paint|Paints a thing.|colour:colour thing:object||Paint the {thing} {colour}.;Make the {thing} {colour}.;The {thing} should be {colour}.#Please paint the {thing} in {colour}.
open|Opens a thing.|code:int thing:object||Open the {thing} with the code {code}.;The code of the {thing} is {code}. Open it.#Use the code {code} and open the {thing}.
lookup|What a word means.|word:word|text:text|Look up {word}.;What does {word} mean?;What does the word {word} mean?#Look up the word {word}.
home_of|Where a person lives.|name:name|city:city|Where does {name} live?;In which city does {name} live?;Where is the home of {name}?#Where is {name} at home?
convert|Changes money.|amount:int to:money|amount:int|Convert {amount} to {to}.;How much is {amount} in {to}?;Change {amount} to {to}.#What is {amount} in {to}?
buy|Buys things.|count:int thing:like||Buy {count} {thing}.;Get me {count} {thing}.;I need {count} {thing}.#Please order {count} {thing}.
price|What a thing costs.|thing:like|price:int|How much are {thing}?;What do {thing} cost?;Price of {thing}?#Tell me the price of {thing}.
stock|How many are left.|thing:like|count:int|How many {thing} are left?;How many {thing} do we have?;Are there {thing}?#Do we still have {thing}?
note|Keeps a note.|text:text||Note: {text};Write down: {text};Keep this note: {text}#Remember the note "{text}".
plan|What a person does on a day.|day:day name:name|plan:text|What does {name} do on {day}?;Plan of {name} for {day}?;What is planned by {name} on {day}?#What comes for {name} on {day}?
meet|Plans a meeting.|day:day name:name||I meet {name} on {day}.;Plan a meeting with {name} on {day}.;Meet {name} on {day}.#On {day} I will meet {name}.
find|Finds a thing.|thing:object colour:colour|place:room|Where is the {colour} {thing}?;Find the {colour} {thing}.;I look for the {colour} {thing}.#Do you see the {colour} {thing}?
river|The river of a city.|city:city|river:word length:int|Which river is in {city}?;What is the river of {city}?;River in {city}?#Name the river of {city}.
door|Opens or closes doors.|open:bool room:room||The door of the {room} should be {open}.;Door of the {room}: {open}.;I want the door of the {room} {open}.#Make the door of the {room} {open}.
birthday|When a person was born.|name:name|day:day year:int|When is the birthday of {name}?;When was {name} born?;Birthday of {name}?#Tell me the birthday of {name}.
"""  # noqa: E501 (one line per tool)
HELD_TOOLS = frozenset(("people", "stock", "call_up"))

_ROOMS = "kitchen garden school church shop bedroom cellar hall office".split()
_MONEY = "euro dollar pound yen crown".split()
_SKY = ("sunny", "clear", "cold", "wet", "windy")
_FIELDS = ("name", "city", "age", "colour", "code", "count", "price", "day", "size", "place", "thing", "word")
_ERRORS = ("not found", "no answer", "too late", "no such {w}", "the {w} is gone", "there is no {w}")
_SENTENCES = (
    "{name} lives in {city}.", "{name} is in the {room} with {int} {like}.", "It is {int} in {city} on {day}.",
    "{name} has {int} {like}.", "There are {int} {like} in the {room}.", "The {object} is {colour}.",
    "{name} comes on {day}.", "{city} has {int} {like}.", "{name} was here at {clock}.", "{name} made the {word}.",
    "The {word} of {name} costs {int} {money}.", "{word} is not {word}.",
)  # fmt: skip
_SPOKEN = {"on": ("off", "on"), "open": ("closed", "open")}  # what false and true are called
_TYPES = {"int": "integer", "bool": "boolean"}

# Ways to ask a made-up tool by what the declaration says of it.
_ASK = (("What is the {g} of {v}?", "Tell me the {g} of {v}.", "Which {g} has {v}?", "{g} of {v}?",
         "Find the {g} of {v}.", "I need the {g} of {v}.", "What {g} does {v} have?", "Show me the {g} of {v}."),
        ("I want to know the {g} of {v}.", "Do you know the {g} of {v}?"))  # fmt: skip


@dataclass(frozen=True)
class Tool:
    """takes and gives: kinds of values by name. ways: questions of the training side and of the test's."""

    name: str
    about: str
    takes: dict[str, str]
    gives: dict[str, str]
    ways: tuple[tuple[str, ...], tuple[str, ...]]
    side: str
    free: tuple[str, ...] = ()  # parameters that may be left out, and are


def _kinds(text: str) -> dict[str, str]:
    return dict(part.split(":") for part in text.split())


def _pool() -> list[Tool]:
    out = []
    for line in _POOL.strip().splitlines():
        name, about, takes, gives, ways = line.split("|")
        train, test = (tuple(side.split(";")) for side in ways.split("#"))
        side = "held" if name in HELD_TOOLS else "known"
        out.append(Tool(name, about, _kinds(takes), _kinds(gives), (train, test), side))
    return out


POOL = _pool()


def _pieces() -> list[str]:
    """Two to six letters that stand together in the training's words now and then, as in the tokens of a vocabulary."""
    rng = random.Random("pieces")
    texts = [f"{t.answer} {' '.join(t.train)}" for t in world.TOPICS] + [recall.filler(rng) for _ in range(1500)]
    found: Counter[str] = Counter()
    for whole in re.findall("[a-z]{2,}", " ".join(texts + rules.WORDS + recall.OBJECTS + recall.LIKES)):
        found.update(whole[i:j] for i in range(len(whole)) for j in range(i + 2, min(i + 6, len(whole)) + 1))
    return sorted(piece for piece, count in found.items() if count > 2)


_PIECES = _pieces()


def word(rng: random.Random, test: bool) -> str:
    """A word for a made-up name, of syllables or of pieces of other words; the test side has its own."""
    roll = rng.random()
    if roll < 0.2:
        return rules.draw_word(rng, test)
    while True:
        made = "".join(rng.choice(talk._SYLLABLES) for _ in range(rng.randrange(2, 4)))
        if roll < 0.8:
            made = "".join(rng.choice(_PIECES) for _ in range(rng.choice((2, 2, 3))))
        if talk.held_out(made) == test:
            return made


def value(kind: str, rng: random.Random, test: bool) -> Any:
    """A value of one kind, as JSON has it."""
    if kind == "int":
        return rng.randrange(10 ** rng.choice((1, 2, 2, 3, 3)))
    if kind == "bool":
        return rng.random() < 0.5
    if kind == "clock":
        return f"{rng.randrange(24)}:{rng.randrange(60):02}"
    if kind == "name":
        return talk.name(rng, test)
    if kind == "word":
        return word(rng, test)
    if kind == "text":
        pool = (rules.WORDS, recall.LIKES, recall.NAMES, recall.COLOURS)
        return " ".join(rng.choice(rng.choice(pool)) for _ in range(rng.randrange(1, 5)))
    lists = {"city": recall.CITIES, "colour": recall.COLOURS, "like": recall.LIKES, "day": recall.DAYS,
             "object": recall.OBJECTS, "room": _ROOMS, "money": _MONEY, "sky": _SKY}  # fmt: skip
    return rng.choice(lists[kind])


def made_up(rng: random.Random, test: bool) -> Tool:
    """A tool that nobody knows: its name and parameters are words; only the declaration says what it is for."""
    kinds = ("int", "city", "name", "colour", "like", "object", "day", "word", "word", "word")
    if rng.random() < 0.4:  # asked for what it gives, not by its name
        gives, key, kind = word(rng, test), word(rng, test), rng.choice(kinds)
        shown = tuple(w.replace("{g}", gives).replace("{v}", "{" + key + "}") for w in _ASK[test])
        about = rng.choice(("Gives the {g}.", "Knows the {g}.", "The {g} of a thing.")).format(g=gives)
        name = rng.choice((gives, "get_" + gives, word(rng, test), word(rng, test)))
        return Tool(name, about, {key: kind}, {gives: rng.choice(kinds)}, (shown, shown), "made-up")
    name = rng.choice(("{}", "{}", "get_{}", "find_{}")).format(word(rng, test))
    keys = list(dict.fromkeys(word(rng, test) for _ in range(rng.choice((1, 1, 2)))))
    free = {word(rng, test): rng.choice(kinds)} if rng.random() < 0.15 else {}
    shown = invented.used(name, keys, rng, test)
    about = rng.choice(("Works with the {w}.", "Asks the {w}.", "For the {w}.")).format(w=word(rng, test))
    fields = [rng.choice(_FIELDS) if rng.random() < 0.5 else word(rng, test) for _ in range(rng.choice((0, 1, 1, 2)))]
    takes = {k: rng.choice(kinds) for k in keys} | {k: v for k, v in free.items() if k not in keys}
    out = tuple(k for k in takes if k not in keys)
    return Tool(name, about, takes, {f: rng.choice(kinds) for f in fields}, (shown, shown), "made-up", out)


def named(rng: random.Random, test: bool) -> Tool:
    """A tool of plain words, with nothing but the declaration behind it."""
    name, about, takes, gives, ways = invented.draw(rng, test)
    return Tool(name, about, takes, gives, (ways, ways), "named")


def declaration(tool: Tool, rng: random.Random) -> dict[str, Any]:
    """What the prompt says of a tool, in the form of `mlx_gemma4.tools`; now and then parameters are described."""
    properties = {}
    more = rng.random() < 0.15
    for key, kind in tool.takes.items():
        properties[key] = {"type": _TYPES.get(kind, "string")}
        if more:
            properties[key]["description"] = {"int": "A number.", "bool": "Yes or no."}.get(kind, f"A {kind}.")
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    schema["required"] = [key for key in tool.takes if key not in tool.free]
    return {"type": "function", "function": {"name": tool.name, "description": tool.about, "parameters": schema}}


def asked(tool: Tool, rng: random.Random, test: bool) -> tuple[str, dict[str, Any]]:
    """(question, arguments of its call), of the wanted side; a tool that is held out itself has every wording."""
    ways = tool.ways[0] + tool.ways[1] if tool.side == "held" else tool.ways[test]
    while True:
        given = {k: value(kind, rng, test) for k, kind in tool.takes.items() if k not in tool.free}
        own = {"name", "word"} & set(tool.takes.values())  # these have sides of their own
        if tool.side == "known" and not own and talk.held_out(f"{tool.name}/{given}") != test:
            continue
        words = {k: _SPOKEN[k][v] if isinstance(v, bool) else v for k, v in given.items()}
        question = rng.choice(ways).format(**words)
        question = question[0].upper() + question[1:] if tool.side not in ("made-up", "named") else question
        return (question if test else world.vary(question, rng)), given


def _sentence(rng: random.Random, test: bool) -> str:
    """What a tool may say in a whole sentence."""
    roll = rng.random()
    if roll < 0.5:
        return recall.filler(rng)
    if roll < 0.6 and not test:
        return rng.choice(world.SPEAKABLE).answer
    said = rng.choice(_SENTENCES)
    kinds = re.findall(r"{([a-z]+)}", said)
    return said.format(**{kind: value(kind, rng, test) for kind in kinds})


def result(tool: Tool, rng: random.Random, test: bool) -> tuple[Any, str]:
    """(what the tool gives, what the model says to it). The same few rules for every tool, so that they carry over."""
    roll = rng.random()
    if roll < 0.1:
        error = rng.choice(_ERRORS).format(w=word(rng, test))
        return {"error": error}, f"That did not work: {error}."
    if roll < 0.25:
        said = _sentence(rng, test)
        return said, said
    if not tool.gives:
        return rng.choice((({"ok": True}, "Done."), ({"ok": True}, "Done."), ({"ok": False}, "That did not work."),
                           (None, "Done."), (True, "Done.")))  # fmt: skip
    fields = {k: value(kind, rng, test) for k, kind in tool.gives.items()}
    if rng.random() < 0.1:
        fields = {k: v + 0.5 if isinstance(v, int) else v for k, v in fields.items()}
    if roll < 0.5 or list(fields) == ["value"]:
        first = next(iter(fields.values()))
        return first, f"The answer is {first}."
    said = " and ".join(f"the {k} is {v}" for k, v in fields.items()) + "."
    return fields, said[0].upper() + said[1:]
