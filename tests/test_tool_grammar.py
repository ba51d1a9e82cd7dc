"""Calls under a grammar: whatever it allows is read back as it was meant, whatever the template writes it allows."""

import random
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher
from tiny import write_tokenizer

from mlx_gemma4.errors import UsageError
from mlx_gemma4.events import Malformed, ToolCall
from mlx_gemma4.number_grammar import FLOAT, INTEGER, bounded
from mlx_gemma4.structured import GrammarGuide, grammar_for
from mlx_gemma4.tokenizer import Tokenizer
from mlx_gemma4.tool_grammar import call_grammar
from mlx_gemma4.turns import TurnParser

QUOTE = 52
TEMPLATES = Path(__file__).parent / "fixtures" / "chat_template"


@pytest.fixture(scope="module", params=["E2B-E4B", "12B-26B-31B"])
def tokenizer(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    template = (TEMPLATES / f"chat_template.{request.param}.jinja").read_text(encoding="utf-8")
    return Tokenizer((folder / "tokenizer.json").read_text(), chat_template=template, eos_token_ids=[1, 106, 50])


def tool(name, properties=None, **more):
    parameters = {"type": "object", "properties": properties or {}, **more}
    return {"type": "function", "function": {"name": name, "description": "Does it.", "parameters": parameters}}


TEXT, INT, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}


def items(kind, **more):
    return {"type": "array", "items": kind, **more}


def thing(properties, *required):
    return {"type": "object", "properties": properties, "required": list(required)}


TREE = thing({"v": INT, "next": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]}}, "v", "next")
WORDS = {
    "id": TEXT | {"pattern": "^[a-z]{2}-\\d+$"},
    "s": TEXT | {"minLength": 2, "maxLength": 4},
    "t": TEXT | {"pattern": "^a|b$"},
}
FIGURES = {
    "i": INT | {"minimum": -5, "maximum": 120},
    "x": NUMBER | {"exclusiveMinimum": 0, "maximum": 2.5},
    "n": NUMBER,
}
EITHER = {
    "v": {"anyOf": [INT, TEXT, items(TEXT)]},
    "w": {"type": ["integer", "null"]},
    "u": TEXT | {"nullable": True},
}
PAIR = {
    "at": {"type": "array", "prefixItems": [NUMBER, TEXT], "items": False, "minItems": 2},
    "all": {"allOf": [thing({"a": INT}, "a"), {"properties": {"b": TEXT}}]},
}
# (declaration, arguments that fit it)
TOOLS = [
    (tool("empty"), [{}]),
    (
        tool("get-weather.now:v2", {"city": TEXT, "days": INT}, required=["city"]),
        [{"city": "a"}, {"city": "", "days": 2}],
    ),
    (
        tool("naïve_größe", {"名前": TEXT, "my-key": INT, "a.b": {"type": "boolean"}, "Zed": NUMBER}),
        [{"名前": "漢字", "my-key": -3, "a.b": True, "Zed": 0.25}, {"a.b": False}, {}],
    ),
    (
        tool(
            "enums", {"unit": {"enum": ["°C", 'a"b', "x{}"]}, "n": {"enum": [1, 2.5, None, True, "s", [1], {"a": 0}]}}
        ),
        [{"unit": "°C", "n": 1}, {"unit": 'a"b', "n": None}, {"unit": "x{}", "n": {"a": 0}}, {"n": [1]}],
    ),
    (
        tool("nested", {"o": thing({"p": items(INT, minItems=1, maxItems=3)}, "p")}),
        [{"o": {"p": [1]}}, {"o": {"p": [1, -20, 3]}}, {}],
    ),
    (
        tool("text", WORDS, required=["id"]),
        [{"id": "ab-12", "s": "é漢"}, {"id": "zz-0", "t": "axx"}, {"id": "zz-0", "t": "xx\nb"}],
    ),
    (
        tool("numbers", FIGURES, required=["i"]),
        [{"i": -5}, {"i": 120, "x": 0.001}, {"i": 99, "x": 2.5, "n": -1.5e-07}, {"i": 0, "n": 1e16}, {"i": 0, "x": 1}],
    ),
    (
        tool("either", EITHER, required=["v"]),
        [{"v": 3}, {"v": "3", "w": None}, {"v": ["a", "b"], "w": 2}, {"v": [], "u": "x"}],
    ),
    (
        tool("tree", {"t": TREE}, required=["t"], **{"$defs": {"tree": TREE}}),
        [{"t": {"v": 1, "next": {"v": 2, "next": None}}}],
    ),
    (
        tool("pair", PAIR, required=["at"]),
        [{"at": [1.5, "x"]}, {"at": [0, ""], "all": {"a": 1, "b": "y"}}, {"at": [0, ""], "all": {"a": 1}}],
    ),
]
FREE = tool("free", {"o": {"type": "object"}, "any": {}, "m": {"type": "object", "additionalProperties": INT}})


def schema_of(declaration):
    return declaration["function"]["parameters"]


def nullable(schema):
    """A schema as validators read it."""
    if isinstance(schema, list):
        return [nullable(v) for v in schema]
    if not isinstance(schema, dict):
        return schema
    out = {k: nullable(v) for k, v in schema.items() if k != "nullable"}
    return {"anyOf": [out, {"type": "null"}]} if schema.get("nullable") else out


def walk(tokenizer, functions, rng, most):
    """A random call, brought to an end as an answer is that may have `most` tokens."""
    guide = GrammarGuide(tokenizer, LLMatcher.grammar_from_lark(call_grammar(tokenizer, functions)))
    guide.begin(most)
    tokens = []
    for _ in range(most):
        token = guide.forced()
        if token is None:
            ids = np.flatnonzero(guide.mask())
            if 106 in ids:
                break
            token = QUOTE if QUOTE in ids and rng.random() < 0.2 else int(rng.choice(ids))
        tokens.append(guide.advance(token))
    return tokens


def read(tokenizer, tokens, tools):
    parser = TurnParser(tokenizer, tools=tools)
    events = [e for token in tokens for e in parser.feed(token)]
    return events + parser.finish()


@pytest.mark.parametrize("at", range(len(TOOLS)), ids=lambda at: TOOLS[at][0]["function"]["name"])
def test_random_calls_are_read_back_and_valid(tokenizer, at):
    declaration = TOOLS[at][0]
    others = [TOOLS[(at + 1) % len(TOOLS)][0]]
    validator = jsonschema.Draft202012Validator(nullable(schema_of(declaration)))
    rng = random.Random(at)
    for _ in range(15):
        tokens = walk(tokenizer, [declaration["function"]], rng, 150)
        [event] = read(tokenizer, tokens, [declaration, *others])
        assert isinstance(event, ToolCall) and event.notes == (), event
        validator.validate(event.arguments)


def test_random_calls_with_free_form_objects_are_read_back(tokenizer):
    rng = random.Random(5)
    for _ in range(15):
        tokens = walk(tokenizer, [FREE["function"]], rng, 150)
        [event] = read(tokenizer, tokens, [FREE])
        if isinstance(event, Malformed):
            assert "twice" in event.error  # a key said twice, which no grammar forbids
        else:
            assert all("order of keys" in note for note in event.notes), event


def test_a_call_is_not_ended_before_the_model_ends_it(tokenizer):
    guide = grammar_for(tokenizer, {"type": "tool_call"}, [TOOLS[1][0]])
    assert guide.begin(3) == 0
    for token in tokenizer.encode("<|tool_call>call:"):
        guide.advance(token) if token != 2 else None
        assert guide.forced() is None


def accepts(tokenizer, guide, text):
    """Whether the grammar takes this text, told token by token, and may stop after it."""
    for token in tokenizer.encode(text, add_special_tokens=False):
        allowed = guide.mask()
        if token >= len(allowed) or not allowed[token]:
            return False
        guide.advance(token)
    return bool(guide.mask()[106])


@pytest.mark.parametrize("at", range(len(TOOLS)), ids=lambda at: TOOLS[at][0]["function"]["name"])
def test_what_the_template_writes_is_allowed(tokenizer, at):
    declaration, cases = TOOLS[at]
    name = declaration["function"]["name"]
    for arguments in cases:
        jsonschema.validate(arguments, nullable(schema_of(declaration)))
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        text = tokenizer.apply_chat_template(messages, tools=[declaration], tokenize=False)
        written = text[text.rindex("<|tool_call>") : text.rindex("<tool_call|>") + len("<tool_call|>")]
        guide = grammar_for(tokenizer, {"type": "tool_call"}, [declaration])
        assert accepts(tokenizer, guide, written), written


@pytest.mark.parametrize(
    "value", [{}, {"a": 1}, {"key with space": ["x", {"é": None}]}, {"a-b.c": 1.5, "d": {}}, [], [[1], "x", True]]
)
def test_free_form_values_the_template_writes_are_allowed(tokenizer, value):
    from mlx_gemma4.call_grammar import write

    guide = grammar_for(tokenizer, {"type": "tool_call"}, [FREE])
    assert accepts(tokenizer, guide, f"<|tool_call>{write('free', {'any': value})}<tool_call|>")


@pytest.mark.parametrize(
    "arguments",
    [
        "{}",
        '{city:<|"|>a<|"|>,more:1}',
        "{city:1}",
        '{days:1,city:<|"|>a<|"|>}',
        '{city:<|"|>a<|"|>,days:1.5}',
        '{city: <|"|>a<|"|>}',
    ],
)
def test_what_the_schema_or_the_syntax_forbids_is_not_allowed(tokenizer, arguments):
    guide = grammar_for(tokenizer, {"type": "tool_call"}, [TOOLS[1][0]])
    assert not accepts(tokenizer, guide, f"<|tool_call>call:get-weather.now:v2{arguments}<tool_call|>")


def matcher(tokenizer, body):
    out = LLMatcher(tokenizer.constraint_vocabulary, LLMatcher.grammar_from_lark(f"start: N\nN: {body}"), log_level=0)
    assert not out.is_error(), out.get_error()
    return lambda text: out.validate_tokens(ids := [*tokenizer.encode(text, add_special_tokens=False), 1]) == len(ids)


def test_numbers_are_as_python_writes_them(tokenizer):
    takes = matcher(tokenizer, f"{INTEGER} | {FLOAT}")
    rng = random.Random(1)
    for _ in range(1000):
        value = rng.choice(
            [
                rng.randint(-(10**9), 10**9),
                round(rng.uniform(-1e6, 1e6), rng.randint(0, 6)),
                float(f"{rng.uniform(1, 10):.{rng.randint(0, 14)}f}e{rng.randint(-300, 14)}"),
                float(f"1e{rng.choice([rng.randint(-300, 14), rng.randint(16, 300)])}"),
            ]
        )
        assert takes(repr(value)), value
    for text in ("-0.0", "0.0", "0", "1e+16", "1e-05", "481868660185147.0", str(2**200)):
        assert takes(text), text
    for text in ("-0", "01", "1.", "1.50", ".5", "1e5", "1E-07", "1e-4", "1.0e+16", "1e+309", "0.00001", "+1"):
        assert not takes(text), text


def test_numbers_keep_to_their_bounds(tokenizer):
    rng, compared = random.Random(2), 0
    for _ in range(80):
        whole = rng.random() < 0.5
        schema = {}
        for name in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"):
            if rng.random() < 0.4:
                schema[name] = rng.choice([rng.randint(-120, 120), 0, 99, -1])
                if not whole and rng.random() < 0.5:
                    schema[name] = round(rng.uniform(-20, 20), rng.randint(0, 3))
        try:
            body = bounded(schema, whole)
        except UsageError:
            continue
        if body is None:
            continue
        takes, valid = matcher(tokenizer, body), jsonschema.Draft202012Validator(schema)
        values = [rng.randint(-130, 130) for _ in range(20)] + [v for v in schema.values() if isinstance(v, int)]
        if not whole:
            values += [round(rng.uniform(-21, 21), rng.randint(1, 4)) for _ in range(20)]
            values += [float(v) for v in schema.values()] + [round(v + 0.1, 4) for v in schema.values()]
        for value in values:
            if "e" not in repr(value):
                assert takes(repr(value)) == valid.is_valid(value), (schema, value)
                compared += 1
    assert compared > 1000


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"properties": {"a": {"type": "text"}}}, "type 'text'"),
        ({"properties": {"a": {"enum": []}}}, "no possible value"),
        ({"properties": {"a": 3}}, "where a schema is due"),
        ({"properties": {"a": {"$ref": "#/$defs/b"}}}, "not in its schema"),
        ({"properties": {"a": {"type": "integer", "minimum": 3, "maximum": 2}}}, "no number is"),
        ({"properties": {"a": {"type": "string", "minLength": 3, "maxLength": 2}}}, "no text is both"),
        ({"properties": {"a": {"type": "array", "minItems": 3, "maxItems": 2}}}, "no list has both"),
        ({"properties": {"a": {"type": "string", "pattern": "(?=x)y"}}}, "cannot be used"),
    ],
)
def test_schemas_without_sense_are_refused_in_a_line(tokenizer, parameters, says):
    with pytest.raises(UsageError, match=says) as e:
        grammar_for(tokenizer, {"type": "tool_call"}, [{"function": {"name": "f", "parameters": parameters}}])
    assert "\n" not in str(e.value)


def test_calls_need_tools_of_that_name(tokenizer):
    with pytest.raises(UsageError, match="no tools; give it tools="):
        grammar_for(tokenizer, {"type": "tool_call"})
    with pytest.raises(UsageError, match="no tool 'g'"):
        grammar_for(tokenizer, {"type": "tool_call", "name": "g"}, [TOOLS[0][0]])
