"""Facts of a sentence as JSON: the sentences, the requests and the schemas.

Owns: what is said of persons, things and orders, under which keys, and which requests are only the test's. Leaves
made-up words and values to `toolbox.py`, and conversations to `calls.py`.
"""

import json
import random
from typing import Any

import recall
import talk
from toolbox import value, word

# Facts for JSON: (key, kind, ways to say it of {n}); the subject itself is the first key.
_SAID = {
    "name": (("age", "int", "{n} is {v} years old"), ("city", "city", "{n} lives in {v}"),
             ("colour", "colour", "the colour of {n} is {v}"), ("likes", "likes", "{n} likes {v}"),
             ("day", "day", "{n} comes on {v}"), ("dog", "has", "{n} has {v} dog"),
             ("code", "int", "{n} has the code {v}")),
    "thing": (("colour", "colour", "the {n} is {v}"), ("price", "int", "the {n} costs {v}"),
              ("room", "room", "the {n} is in the {v}"), ("open", "is", "the {n} is {v}"),
              ("owner", "name", "{v} has the {n}"), ("code", "int", "the code of the {n} is {v}")),
    "item": (("count", "int", "we want {v} {n}"), ("price", "int", "{n} cost {v} each"),
             ("to", "name", "send {n} to {v}"), ("city", "city", "{n} come from {v}"),
             ("day", "day", "{n} come on {v}")),
}  # fmt: skip
_SUBJECT = {"name": "name", "thing": "object", "item": "like"}
_WANT = (("Give me {k} as JSON.", "JSON with {k}.", "Write {k} as JSON.", "Answer with JSON: {k}.",
          "As JSON with the keys {k}.", "Make JSON with {k}.", "{k} as JSON, please."),
         ("Put {k} into JSON.", "I need JSON with {k}.", "Tell me {k} as JSON."))  # fmt: skip
_SHAPE = ("Use this schema: {s}", "Answer with JSON of this schema: {s}", "JSON, schema: {s}")


def _stated(kind: str, rng: random.Random, test: bool) -> tuple[Any, str]:
    """(value, how a sentence says it); likes are one thing or a list of two or three."""
    if kind in ("has", "is"):
        truth = rng.random() < 0.5
        return truth, {"has": ("no", "a"), "is": ("closed", "open")}[kind][truth]
    if kind == "likes" and rng.random() < 0.5:
        some = rng.sample(recall.LIKES, rng.choice((2, 3)))
        return some, ", ".join(some[:-1]) + " and " + some[-1]
    found = value("like" if kind == "likes" else kind, rng, test)
    return found, str(found)


def _facts(rng: random.Random, test: bool) -> tuple[str, dict[str, Any]]:
    """(sentences, what they say by key)."""
    if rng.random() < 0.35:  # keys that mean nothing: what stands behind "the KEY is"
        keys = dict.fromkeys(word(rng, test) for _ in range(rng.choice((2, 3, 3, 4))))
        found = {
            k: value(rng.choice(("int", "int", "city", "name", "colour", "like", "word")), rng, test) for k in keys
        }
        clauses = [f"the {k} is {v}" for k, v in found.items()]
    else:
        about = rng.choice(sorted(_SAID))
        subject = value(_SUBJECT[about], rng, test)
        found, clauses = {about: subject}, []
        for key, kind, way in rng.sample(_SAID[about], rng.choice((2, 2, 3, 3))):
            found[key], said = _stated(kind, rng, test)
            clauses.append(way.format(n=subject, v=said))
    joined, rest = "", clauses
    while rest:
        take = rng.choice((1, 2))
        part = " and ".join(rest[:take])
        joined, rest = f"{joined} {part[0].upper()}{part[1:]}.", rest[take:]
    return joined.strip(), found


def _named(keys: list[str], rng: random.Random) -> str:
    if len(keys) == 1 or rng.random() < 0.25:
        return ", ".join(keys)
    return ", ".join(keys[:-1]) + " and " + keys[-1]


def schema_of(wanted: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of an object with these values, every key required."""

    def one(v: Any) -> dict[str, Any]:
        if isinstance(v, list):
            return {"type": "array", "items": {"type": "string"}}
        return {"type": "boolean" if isinstance(v, bool) else "integer" if isinstance(v, int) else "string"}

    return {"type": "object", "properties": {k: one(v) for k, v in wanted.items()}, "required": list(wanted)}


def task(rng: random.Random, test: bool) -> tuple[str, dict[str, Any]]:
    """(question, the object wanted); one in seven gives the schema instead of the keys."""
    while True:
        told, found = _facts(rng, test)
        keys = rng.sample(list(found), rng.randrange(1 if len(found) < 3 else 2, len(found) + 1))
        if rng.random() < 0.4:
            keys = [k for k in found if k in keys]
        if talk.held_out(told) == test:
            break
    wanted = {k: found[k] for k in keys}
    if rng.random() < 0.15:
        want = rng.choice(_SHAPE).format(s=json.dumps(schema_of(wanted)))
    else:
        want = rng.choice(_WANT[test]).format(k=_named(keys, rng))
    question = f"{want} {told}" if rng.random() < 0.2 and not want.endswith("}") else f"{told} {want}"
    return question, wanted
