"""Tool calls for tests: shapes that broke parsers, a generator of any call, and a damager of token streams.

Owns the cases and how they become tokens. What must come out of them is said in `test_tool_calls.py`.
"""

import random
import string
from typing import Any

from mlx_gemma4.call_grammar import write

OPEN, CLOSE, RESPONSE, QUOTE, TURN_END = 48, 49, 50, 52, 106

# What users of Gemma 4 runtimes reported: (the call as the model wrote it, name, arguments).
SHAPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "flat": ('call:f{city:<|"|>Paris<|"|>,days:2}', "f", {"city": "Paris", "days": 2}),
    "inner quotes": ('call:f{q:<|"|>say "hi" to me<|"|>}', "f", {"q": 'say "hi" to me'}),
    "braces in a string": ('call:f{c:<|"|>if (a) { b; } [<|"|>,n:1}', "f", {"c": "if (a) { b; } [", "n": 1}),
    "nested object": ('call:f{a:{b:{c:<|"|>d<|"|>},e:2}}', "f", {"a": {"b": {"c": "d"}, "e": 2}}),
    "array of objects": ('call:f{items:[{q:1},{q:2,s:<|"|>x<|"|>}]}', "f", {"items": [{"q": 1}, {"q": 2, "s": "x"}]}),
    "text like a key": ('call:f{t:<|"|>a:1,b:{c:2}, key:<|"|>}', "f", {"t": "a:1,b:{c:2}, key:"}),
    "newline and backslash": ('call:f{p:<|"|>C:\\new\\t\nend<|"|>}', "f", {"p": "C:\\new\\t\nend"}),
    "empty": ("call:f{}", "f", {}),
    "numbers, null, bool": (
        "call:f{a:-1,b:2.5,c:1e-07,d:null,e:true,f:false}",
        "f",
        {"a": -1, "b": 2.5, "c": 1e-07, "d": None, "e": True, "f": False},
    ),
    "colons in the name": ('call:google:mcp:pdf:create-pdf{t:<|"|>x<|"|>}', "google:mcp:pdf:create-pdf", {"t": "x"}),
    "dash in a key": ("call:f{my-key:1}", "f", {"my-key": 1}),
    "single quotes and a comma": ("call:f{a:'out, of order',b:1}", "f", {"a": "out, of order", "b": 1}),
    # vllm #48678: the token stands for a plain quote inside the string.
    "quote tokens inside a string": (
        'call:f{code:<|"|>q(<|"|><|"|><|"|>SELECT 1<|"|><|"|><|"|>).df()<|"|>,refs:[<|"|>d<|"|>]}',
        "f",
        {"code": 'q("""SELECT 1""").df()', "refs": ["d"]},
    ),
}  # fmt: skip

# Variants and damage, of calls of these tools


def tool(name, required=(), **properties):
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}}


TEXTS = {"type": "array", "items": {"type": "string"}}
TOOLS = [
    tool("add", a={"type": "integer"}, b={"type": "number"}),
    tool("mcp.fs:read-file", **{"my path": {"type": "string"}, "a:b": {}, "{": {}, "": {}, ",x": {}}),
    tool("note", ["text"], text={"type": "string"}, tags=TEXTS, o={"type": "object"}),
]  # fmt: skip

# text after <|tool_call> and before <tool_call|>: (name, arguments, words of the notes)
TOLERATED = {
    "parentheses": ("call:add(a=1, b=2.5)", "add", {"a": 1, "b": 2.5}, "parentheses `=`"),
    "parentheses and colons": ("call:add(a:1)", "add", {"a": 1}, "parentheses"),
    "parentheses around an object": ("call:add({a:1})", "add", {"a": 1}, "parentheses"),
    "nothing in parentheses": ("call:add()", "add", {}, "parentheses"),
    "keywords in braces": ('call:note{text="a: b"}', "note", {"text": "a: b"}, "`=`"),
    "bare": ("add{a:1}", "add", {"a": 1}, "missing"),
    "half bare": (":add{a:1}", "add", {"a": 1}, "missing"),
    "namespace": ("call:default_api.add{a:1}", "add", {"a": 1}, "namespace"),
    "single quotes": (
        "call:note{text:'it\\'s, {fine}'}", "note", {"text": "it's, {fine}"}, "strings in '"
    ),
    "an apostrophe in single quotes": ("call:note{text:'it's'}", "note", {"text": "it's"}, "strings in '"),
    "JSON": (
        'call:note{"text": "a \\"b\\" \\u00e9 \\ud83c\\udf4e\\n", "tags": ["x", "y"]}',
        "note", {"text": 'a "b" é 🍎\n', "tags": ["x", "y"]}, "keys in quotes",
    ),
    "JSON call": ('{"name": "add", "arguments": {"a": 1}}', "add", {"a": 1}, "JSON object"),
    "OpenAI call": (
        '{"type":"function","function":{"name":"add","parameters":{"a":1}}}', "add", {"a": 1}, "JSON object"
    ),
    "quoted keys": ('call:add{<|"|>a<|"|>:1}', "add", {"a": 1}, "keys in quotes"),
    "trailing comma": ("call:add{a:1,}", "add", {"a": 1}, "trailing comma"),
    "trailing comma in a list": (
        'call:note{tags:[<|"|>x<|"|>,],text:<|"|><|"|>}', "note", {"text": "", "tags": ["x"]}, "trailing"),
    "white space": (
        ' call:note {\n  text: <|"|>x<|"|>,\n  tags: [ ]\n}\n', "note", {"text": "x", "tags": []}, "white space"
    ),
    "Python's literals": (
        "call:note{o:{a:True,b:None},text:<|\"|><|\"|>}", "note",
        {"o": {"a": True, "b": None}, "text": ""}, "True for true"),
    "a word": ("call:note{text:New York}", "note", {"text": "New York"}, "without quotes"),
    "a date": ("call:note{text:2024-01-05}", "note", {"text": "2024-01-05"}, "without quotes"),
    "last brace missing": ("call:add{a:1", "add", {"a": 1}, "the last }"),
    "last brace missing after a string": ('call:note{text:<|"|>x<|"|>', "note", {"text": "x"}, "the last }"),
    "other forms of numbers": ("call:add{a:1E2,b:1.50}", "add", {"a": 100.0, "b": 1.5}, "form of a number"),
    "unsorted keys": ("call:add{b:1,a:2}", "add", {"b": 1, "a": 2}, "order of keys"),
    "another type": ('call:add{a:<|"|>1<|"|>}', "add", {"a": "1"}, "not of the type"),
    "undeclared argument": ("call:add{c:1}", "add", {"c": 1}, "not declared"),
    "required missing": ("call:note{}", "note", {}, "required 'text' missing"),
    "quotes of quotes": (
        'call:note{text:<|"|>{<|"|>a<|"|>:<|"|>b<|"|>, <|"|>c<|"|>:1}<|"|>}',
        "note", {"text": '{"a":"b", "c":1}'}, "read as \""
    ),
    "quotes in a list": (
        'call:note{tags:[<|"|>f(<|"|>a<|"|>,<|"|>b<|"|>)<|"|>,<|"|>x<|"|>],text:<|"|><|"|>}',
        "note", {"tags": ['f("a","b")', "x"], "text": ""}, "read as \"",
    ),
    "call tokens in a string": (
        'call:note{text:<|"|>write <|tool_call>call:f{}<tool_call|> and }<tool_call|><|"|>}',
        "note", {"text": "write <|tool_call>call:f{}<tool_call|> and }<tool_call|>"}, "call tokens inside",
    ),
}  # fmt: skip

# The same for what is no call: (text, words of the error)
MALFORMED = {
    "an unknown name": ("call:sub{a:1}", "no tool 'sub'; known tools: add, mcp.fs:read-file, note"),
    "no arguments": ("call:add", "no tool 'add'|no arguments"),
    "nothing": ("", "name is missing"),
    "a value missing": ("call:add{a:,b:1}", "value is missing"),
    "a colon missing": ('call:add{a<|"|>x<|"|>}', "a key and a colon"),
    "two values": ("call:add{a:1 2}", "unexpected|no value"),
    "a comma missing": ('call:note{text:<|"|>x<|"|>tags:[]}', "not closed"),
    "the wrong bracket": ("call:note{tags:[1}", "unexpected"),
    "two brackets missing": ("call:note{o:{a:1", "cut off"),
    "a bracket too many": ("call:add{a:1}}", "after the call"),
    "words after it": ("call:add{a:1} is what I call", "after the call"),
    "a key twice": ("call:add{a:1,a:2}", "twice"),
    "two quotes lost": (
        'call:note{o:{x:<|"|>a,y:b<|"|>,z:<|"|>c<|"|>,w:<|"|>d},text:<|"|><|"|>}',
        "not closed|do not pair",
    ),
    "a bracket lost between strings": (
        'call:note{o:{x:<|"|>a<|"|>,y:[<|"|>b<|"|>,text:<|"|>c<|"|>}',
        "unexpected|cut off",
    ),
    "a word too many": ('call:note{o:<|"|>a<|"|>x,text:<|"|>c<|"|>}', "do not pair"),
    "a quote lost": ('call:note{text:<|"|>x,tags:[<|"|>y<|"|>]}', "not closed"),
    "an opening quote lost": ('call:note{text:x<|"|>}', "unexpected"),
    "a time without quotes": ("call:note{text:10:30}", "unexpected"),
    "a number out of range": ("call:add{b:1e999}", "out of range"),
    "a number too long": (f"call:add{{a:{'9' * 5000}}}", "digits"),
    "a word for a number": ("call:add{a:many}", "no value of the type"),
    "no number": ("call:add{b:1.2.3}", "no value of the type"),
    "no number where anything goes": ("call:note{o:{x:1.2.3}}", "no value of the type"),
    "half a pair": ('call:note{text:"\\ud83c"}', "surrogate"),
    "too deep": (f"call:note{{o:{'[' * 200}{']' * 200}}}", "deeper"),
    "positional": ('call:note("x")', "a key"),
    "no call": ('{"city":"x"}', '"name" and "arguments"'),
    "an unknown JSON call": ('{"name":"sub","arguments":{}}', "no tool 'sub'"),
    "quotes that hide a required argument": ('call:note{o:<|"|>a<|"|>,text<|"|>b<|"|>}', "lacks text"),
}


# Tokens

# Written by the template as they are, these end the turn or the string: a model can only spell them.
SPELLED = ('<|"|>', "<eos>", "<turn|>", "<|tool_response>")


_GRAMMAR = (*SPELLED, "<tool_call|>", "<|tool_call>")


class Encoder:
    """Text to token ids in many ways, with special tokens where they are meant."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._cache: dict[str, list[int]] = {}
        self._bytes = [tokenizer.token_id(f"<0x{b:02X}>") for b in range(256)]

    def ids(self, text: str) -> list[int]:
        if len(text) > 40:
            return self.tokenizer.encode(text, add_special_tokens=False)
        if text not in self._cache:
            self._cache[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self._cache[text]

    def spelled(self, text: str, rng: random.Random) -> list[int]:
        """Text without special tokens, cut into pieces of any size, some of them bytes."""
        ids: list[int] = []
        at = 0
        while at < len(text):
            size = rng.randint(1, 5)
            # Only whole names are special: none is shorter than this piece.
            piece = text[at : at + (1 if text[at] == "<" else size)]
            if len(piece) > 1 and "<" in piece[1:]:
                piece = piece[: piece.index("<", 1)]
            at += len(piece)
            if piece == "\u2581" or rng.random() < 0.1:  # ▁ is the vocabulary's space, except in bytes
                ids += [self._bytes[b] for b in piece.encode()]
            else:
                ids += self.ids(piece) if "\u2581" not in piece else [self._bytes[b] for b in piece.encode()]
        return ids

    def call(self, name: str, arguments: dict[str, Any], rng: random.Random | None = None) -> list[int]:
        """A call as the template writes it, <|tool_call> to <tool_call|>. rng: chops the text; None: what the
        tokenizer makes of the template's text, special names in strings included."""
        text = write(name, arguments)
        if rng is None:
            return [OPEN, *self.ids(text), CLOSE]
        ids: list[int] = [OPEN]

        def say(value: Any) -> None:
            if isinstance(value, str):
                ids.append(QUOTE)
                ids.extend(self.spelled(value, rng))
                ids.append(QUOTE)
            elif isinstance(value, dict):
                ids.extend(self.spelled("{", rng))
                for i, (key, inner) in enumerate(sorted(value.items(), key=lambda item: item[0].lower())):
                    ids.extend(self.spelled(("," if i else "") + key + ":", rng))
                    say(inner)
                ids.extend(self.spelled("}", rng))
            elif isinstance(value, list):
                ids.extend(self.spelled("[", rng))
                for i, inner in enumerate(value):
                    if i:
                        ids.extend(self.spelled(",", rng))
                    say(inner)
                ids.extend(self.spelled("]", rng))
            else:
                ids.extend(self.spelled(write("", {"": value})[7:-1], rng))

        ids += self.spelled(f"call:{name}", rng)
        say(arguments)
        return [*ids, CLOSE]


# Calls

_WORDS = [
    *'{}[]():,;=-"\'`<>|\\/\n\t\r \u2581.#$%&*+?@^_~!',
    *('<|"|>', "<tool_call|>", "<|tool_call>", "<|channel>", "<channel|>", "<turn|>", "<eos>", "<|tool_response>"),
    *("<|image|>", "<bos>", "<|tool>", "<tool_response|>", "<|think|>"),
    *("call:f{", "call:", "}<tool_call|>", ",a:1", "null", "true", "1.5", '"""', "\\n", "\\u0041", "a:", ":b", "{a:1}"),
    *("漢字", "é", "🍎", "👩‍👩‍👧", "e\u0301", "\u202e", "\u2003", "\x00", "\x7f", "\xa0", "\ufeff"),
    *("\U0010ffff", "\ud7ff", "\ue000"),
    *("user", "model", "hello", "the", "x", "thought\n"),
]  # fmt: skip


def any_text(rng: random.Random, most: int = 8) -> str:
    kind = rng.random()
    if kind < 0.1:
        return ""
    if kind < 0.4:
        return "".join(rng.choices(string.ascii_letters + string.digits + " _-", k=rng.randint(1, most)))
    if kind < 0.9:
        return "".join(rng.choices(_WORDS, k=rng.randint(1, most)))
    ranges = ((0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF))
    return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, most)))


def any_scalar(rng: random.Random) -> Any:
    kind = rng.randrange(9)
    if kind < 4:
        return any_text(rng)
    if kind == 4:
        return rng.choice([True, False, None])
    if kind == 5:
        return rng.choice([0, -1, 1, 10**18, -(10**40), 2**63, rng.randint(-1000, 1000)])
    if kind == 6:
        return rng.choice([0.0, -0.0, 0.1, 1e16, 1e-7, -2.5e300, 5e-324, 1.0, rng.random(), rng.uniform(-1e9, 1e9)])
    return any_text(rng, 30)


def bare_key(rng: random.Random) -> str:
    """A key that needs no declaration."""
    while True:
        key = any_text(rng, 4)
        # What a reader without a declaration takes for a bracket, a quote or layout.
        layout = key != key.strip(" \t\r\n") or set(key) & set(":,{}[]=\u2581") or key[:1] in ("", '"', "'")
        if not layout and not any(token in key for token in _GRAMMAR):
            return key


def any_value(rng: random.Random, depth: int = 0) -> tuple[Any, dict[str, Any]]:
    """(value, schema that declares its keys where they need it)."""
    kind = rng.random()
    if depth < 4 and kind < 0.15:
        if rng.random() < 0.5:
            return {bare_key(rng): any_value_plain(rng, depth + 1) for _ in range(rng.randint(0, 3))}, {}
        return any_object(rng, depth + 1)
    if depth < 4 and kind < 0.3:
        if rng.random() < 0.5:
            return [any_value_plain(rng, depth + 1) for _ in range(rng.randint(0, 4))], {"type": "array"}
        item, schema = any_object(rng, depth + 1)
        return [item], {"type": "array", "items": schema}
    return any_scalar(rng), {}


def any_value_plain(rng: random.Random, depth: int) -> Any:
    kind = rng.random()
    if depth < 5 and kind < 0.15:
        return {bare_key(rng): any_value_plain(rng, depth + 1) for _ in range(rng.randint(0, 3))}
    if depth < 5 and kind < 0.3:
        return [any_value_plain(rng, depth + 1) for _ in range(rng.randint(0, 4))]
    return any_scalar(rng)


def any_object(rng: random.Random, depth: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """An object whose keys are any text that its schema declares."""
    keys: list[str] = []
    for _ in range(rng.randint(0, 4)):
        key = any_text(rng, 4)
        # The quote token in a key has no reading, and of `a` and `a:b` either could be meant.
        tokens = any(token in key for token in _GRAMMAR)
        clash = any(key == k or key.startswith(k + ":") or k.startswith(key + ":") for k in keys)
        if not tokens and not clash and "\u2581" not in key:
            keys.append(key)
    made = {key: any_value(rng, depth) for key in keys}
    schema = {"type": "object", "properties": {key: schema for key, (_, schema) in made.items()}}
    return {key: value for key, (value, _) in made.items() if rng.random() < 0.85}, schema


def any_name(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.5:
        return rng.choice(["f", "get_weather", "add", "create-order", "call", "a.b/c", "google:mcp:pdf:create-pdf"])
    while True:
        name = any_text(rng, 4)
        if name and "\u2581" not in name and not any(token in name for token in _GRAMMAR):
            return name


def any_call(rng: random.Random) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """(name, arguments, declarations, this tool's among them)."""
    name = any_name(rng)
    arguments, schema = any_object(rng)
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}}]
    for _ in range(rng.randint(0, 2)):
        other = any_name(rng)
        # A name that goes on with a bracket where another one ends could be either.
        if not other.startswith(name) and not name.startswith(other):
            tools.append({"type": "function", "function": {"name": other, "parameters": {"properties": {"a": {}}}}})
    return name, arguments, tools


# Damage


def damaged(ids: list[int], rng: random.Random, vocabulary: int = 480) -> list[int]:
    """One to three of: a token lost, added, said twice, exchanged with another, the end lost."""
    ids = list(ids)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if not ids:
            break
        at = rng.randrange(len(ids))
        # Where damage does most: at the tokens of the grammar.
        if rng.random() < 0.4:
            at = rng.choice([i for i, t in enumerate(ids) if t < 110] or [at])
        match rng.randrange(5):
            case 0:
                del ids[at]
            case 1:
                ids.insert(
                    at,
                    rng.choice(
                        [OPEN, CLOSE, QUOTE, RESPONSE, 100, 101, 107, rng.choice(ids), rng.randrange(vocabulary)]
                    ),
                )
            case 2:
                ids.insert(at, ids[at])
            case 3:
                other = min(at + 1, len(ids) - 1) if rng.random() < 0.7 else rng.randrange(len(ids))
                ids[at], ids[other] = ids[other], ids[at]
            case 4:
                del ids[at:]
    return ids
