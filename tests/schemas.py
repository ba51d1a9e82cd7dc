"""Thirty JSON schemas for tests of structured output: nested, enums, arrays, numbers, patterns, unicode, references.

Owns the schemas and how a model is made to answer in their form; what must come out is said in `test_structured.py`.
"""

from typing import Any

import mlx.core as mx

from mlx_gemma4.generation import generate_step
from mlx_gemma4.guides import TurnGuide
from mlx_gemma4.sampling import make_sampler
from mlx_gemma4.structured import grammar_for
from mlx_gemma4.turns import CHANNEL_OPEN, TurnParser

TEXT, INT, NUMBER, BOOL = ({"type": t} for t in ("string", "integer", "number", "boolean"))


def thing(properties: dict[str, Any], *required: str, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required or properties), **more}


def items(kind: Any, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": kind, **more}


CLOSED: dict[str, Any] = {"additionalProperties": False}
ADDRESS = thing({"street": TEXT, "zip": TEXT | {"pattern": "^[0-9]{5}$"}}, **CLOSED)
NODE = thing({"v": INT, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}, **CLOSED)
TREE = thing({"name": TEXT, "children": items({"$ref": "#/$defs/tree"}, maxItems=3)}, **CLOSED)
SHAPES = [
    thing({"kind": {"const": "circle"}, "r": NUMBER | {"exclusiveMinimum": 0}}, **CLOSED),
    thing({"kind": {"const": "box"}, "size": items(NUMBER, minItems=2, maxItems=2)}, **CLOSED),
]
SCHEMAS: dict[str, dict[str, Any]] = {
    "flat": thing({"name": TEXT, "age": INT}, **CLOSED),
    "optional": thing({"a": TEXT, "b": INT, "c": BOOL}, "b", **CLOSED),
    "any object": {"type": "object"},
    "open object": thing({"id": INT}),
    "map": {"type": "object", "additionalProperties": NUMBER},
    "small map": {"type": "object", "additionalProperties": BOOL, "minProperties": 1, "maxProperties": 3},
    "nested": thing({"person": thing({"name": TEXT, "home": ADDRESS, "work": ADDRESS}, "home", **CLOSED)}, **CLOSED),
    "deep": thing({"a": thing({"b": thing({"c": thing({"d": items(items(INT))}, **CLOSED)}, **CLOSED)}, **CLOSED)}),
    "enum": {"enum": ["red", "green", 3, None, {"x": [1, 2]}]},
    "enum unicode": thing({"unit": {"enum": ["°C", "Å", "漢字", "👩‍👩‍👧", 'say "hi"\n']}}, **CLOSED),
    "const": thing({"version": {"const": 2}, "tag": {"const": "naïve"}}, **CLOSED),
    "array": items(TEXT),
    "array bounded": items(INT, minItems=2, maxItems=5),
    "array of objects": thing({"rows": items(thing({"q": NUMBER, "ok": BOOL}, **CLOSED), minItems=1)}, **CLOSED),
    "tuple": {"type": "array", "prefixItems": [TEXT, INT, BOOL], "items": False, "minItems": 3},
    "integers": thing({"i": INT | {"minimum": -5, "maximum": 120}, "j": INT | {"exclusiveMinimum": 1000}}, **CLOSED),
    "numbers": thing({"p": NUMBER | {"minimum": 0, "maximum": 1}, "t": NUMBER | {"maximum": -1.5}}, **CLOSED),
    "multiple": thing({"cents": INT | {"multipleOf": 5, "minimum": 0}}, **CLOSED),
    "pattern": thing({"mail": TEXT | {"pattern": "^[a-z]+@[a-z]{2,9}\\.(com|org)$"}}, **CLOSED),
    "pattern inside": thing({"code": TEXT | {"pattern": "[A-Z]{3}-[0-9]+"}}, **CLOSED),
    "lengths": thing({"short": TEXT | {"maxLength": 8}, "long": TEXT | {"minLength": 12, "maxLength": 40}}, **CLOSED),
    "formats": thing({"day": TEXT | {"format": "date"}, "id": TEXT | {"format": "uuid"}}, **CLOSED),
    "unicode keys": thing({"größe": NUMBER, "名前": TEXT, "a b": BOOL, 'q"': INT}, **CLOSED),
    "any of": thing({"v": {"anyOf": [INT, TEXT, items(BOOL), {"type": "null"}]}}, **CLOSED),
    "types": thing({"v": {"type": ["integer", "boolean", "null"]}}, **CLOSED),
    "shapes": thing({"shapes": items({"anyOf": SHAPES}, maxItems=4)}, **CLOSED),
    "all of": {"allOf": [thing({"a": INT}), thing({"b": TEXT | {"maxLength": 5}})]},
    "list": {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
    "tree": thing({"root": {"$ref": "#/$defs/tree"}}, **CLOSED) | {"$defs": {"tree": TREE}},
    "form": thing(
        {
            "title": TEXT,
            "tags": items(TEXT | {"maxLength": 12}, maxItems=5),
            "author": thing({"name": TEXT, "address": ADDRESS}, "name", **CLOSED),
            "rating": INT | {"minimum": 1, "maximum": 5},
            "price": {"anyOf": [NUMBER, {"type": "null"}]},
        },
        "title",
        "rating",
        "price",
        **CLOSED,
    ),
}


def tell(
    model, tokenizer, prompt, response_format, *, thinks=False, budget=None, most=200, seed=0, opens=True, tools=()
):
    """(events, tokens) of one sampled answer. thinks: a thought is opened where the prompt has not, if `opens`."""
    guide = TurnGuide(tokenizer, prompt, thinks, budget, grammar_for(tokenizer, response_format, tools))
    opening = tokenizer.token_id(CHANNEL_OPEN)

    def open_thought(seen, logits):
        return logits.at[:, opening].add(1000.0) if seen.size == len(prompt) else logits

    parser = TurnParser.after_prompt(tokenizer, prompt, tools or None)
    events, tokens = [], []
    steps = generate_step(
        mx.array(prompt),
        model,
        max_tokens=most,
        sampler=make_sampler(1.0, seed=seed),
        logits_processors=[open_thought] if thinks and opens and parser.state == "text" else None,
        guide=guide,
    )
    for token, _ in steps:
        tokens.append(token)
        events += parser.feed(token)
        if parser.stopped:
            break
    steps.close()
    return events + parser.finish(), tokens
