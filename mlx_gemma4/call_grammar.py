"""The inside of a tool call: Gemma 4's `call:NAME{key:value,..}`, its known variants, and nothing else.

Owns reading and writing one call. Leaves finding calls among tokens to `turns.py` and messages to `tool_calls.py`.

A body is text in which the three tokens that matter are single characters no text can contain (QUOTE, OPEN, CLOSE:
lone surrogates), so `<|"|>` typed letter by letter is text. The reader keeps an explicit stack; inside a string nothing
counts but its end. A closing quote is one after which the rest makes sense: the brackets that are open close, or a
comma and a next item follow. That decides, because models also write the quote token for a plain `"` inside a string
(Python's triple quotes are three of them; vllm #48678): such quotes come in pairs with something quoted between them,
become `"`, and are noted. Where an early end leads nowhere, the next possible one is tried.

Tolerated and noted: parentheses, `key=value`, a missing `call` or (before a declared name) `call:`, a namespace before
a declared name, ' and " for strings and keys, None/True/False, unquoted words, a call as a JSON object {"name",
"arguments"}, trailing commas, white space, one missing bracket before <tool_call|>, several calls in one block.
Everything else is an error.
A call without notes renders to exactly the text it was read from; `read` checks that.

What text alone cannot resolve: the template writes keys bare, so a key is what a declared property says, longest first,
and else what stands before the first colon. Keys that are not declared and contain `:,{}[]`, or begin or end in white
space, are lost in the template's own rendering; so is a declared key that begins with another one and a colon. A string
that holds the text `<|"|>` comes back with `"`, and one with a stop token's text ends the turn, once the template's
text has been tokenized; spelled out in ordinary tokens both are safe.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from .declared import Declared, doubts, items_of, may_be, properties_of, property_of, required_of

QUOTE, OPEN, CLOSE = "\ud800", "\ud801", "\ud802"
NAMES = {QUOTE: '<|"|>', OPEN: "<|tool_call>", CLOSE: "<tool_call|>"}
MARKS = "".join(NAMES)

DEPTH = 128  # json and Jinja recurse; nobody's arguments are deeper
TRIES = 64  # other ends of strings tried before a call counts as damaged

_SPACE = re.compile(r"[ \t\r\n]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?(?![^ \t\r\n,\]})])")
_WORD = re.compile(rf"[^ \t\r\n,:=()\[\]{{}}\"'`<{MARKS}][^,:=()\[\]{{}}\"'`<\n{MARKS}]*")
_KEY = re.compile(rf"([^:,\[\]{{}}{MARKS}]+):")
_KEYWORD = re.compile(rf"([^=:,()\[\]{{}}\"'{MARKS}]+)=")
_NAME = re.compile(rf"[^ \t\r\n,()\[\]{{}}\"'{MARKS}]+")
_NEXT = re.compile(r"[ \t\r\n,;]*(?=call:)")
# Between two quote tokens that are text stands what they quote, not the end of one value and the key of the next.
_SWALLOWED = re.compile(r"[ \t\r\n]*[,\]}].*:[ \t\r\n\[{]*$", re.DOTALL)
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "/": "/", "\\": "\\", '"': '"', "'": "'"}
_LITERALS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
_QUOTES = 'quote tokens inside a string were read as "'
_CLOSER = {"{": "}", "[": "]", "(": ")"}


class CallError(Exception):
    """The body is no call. open_string: it may be the beginning of one that goes on inside a string."""

    def __init__(self, message: str, open_string: bool = False):
        super().__init__(message)
        self.open_string = open_string


def shown(text: str) -> str:
    """Body text with the marks as the tokens' names."""
    for mark, name in NAMES.items():
        text = text.replace(mark, name)
    return text


def write(name: str, arguments: Mapping[str, Any]) -> str:
    """A call as the published templates write it, without the tokens around it."""
    return f"call:{name}{_write(arguments)}"


def _write(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return f'<|"|>{value}<|"|>'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        items = sorted(value.items(), key=lambda item: item[0].lower())  # Jinja's dictsort
        return "{" + ",".join(f"{k}:{_write(v)}" for k, v in items) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_write, value)) + "]"
    return str(value)


def read(body: str, closed: bool, declared: Declared | None) -> list[tuple[str, dict[str, Any], int, tuple[str, ...]]]:
    """(name, arguments, end in `body`, notes) of each call in one block.

    body: what follows <|tool_call>. closed: <tool_call|> followed it. declared: parameters' schema by tool name; None
    when nothing is known. Raises CallError.
    """
    calls = []
    at = 0
    while True:
        reader = _Reader(body, closed, declared)
        name, arguments, end = reader.call(at)
        written = shown(body[at:end])
        notes = list(dict.fromkeys(reader.notes))
        if not notes and write(name, arguments) != written:
            notes.append("not written as the template writes it (order of keys, form of a number)")
        notes += reader.doubts(name, arguments)
        calls.append((name, arguments, end, notes))
        if not body[end:].strip(" \t\r\n"):
            if end < len(body):
                notes.append("white space")
            break
        follows = _NEXT.match(body, end)
        if not follows:
            raise CallError(f"unexpected {_excerpt(body, end)} after the call of {name}")
        at = follows.end()
    if len(calls) > 1:
        for *_, notes in calls:
            notes.append("several calls in one block")
    return [(name, arguments, end, tuple(notes)) for name, arguments, end, notes in calls]


class _Reader:
    """Reads one call of a body. notes grows as things are tolerated."""

    def __init__(self, body: str, closed: bool, declared: Declared | None):
        self.s, self.closed, self.declared = body, closed, declared
        self.notes: list[str] = []
        self.ops: list[tuple[str, Any]] = []  # ("{" | "[", None), ("key", text), ("value", value), ("end", None)
        self.choices: list[tuple[Any, ...]] = []
        self.schema: Mapping[str, Any] | None = None  # of the tool's parameters

    # Name

    def call(self, at: int) -> tuple[str, dict[str, Any], int]:
        s = self.s
        begin = self.space(at)
        if s.startswith("{", begin):
            return self.json_call(begin)
        if s.startswith("call:", begin):
            at = begin + 5
        elif s.startswith(":", begin):
            at = begin + 1
            self.notes.append("`call` missing")
        else:
            at = begin
            self.notes.append("`call:` missing")
            if self.declared is None:  # nobody can tell a name from half a `call:`
                raise CallError(f"a call begins `call:NAME{{`, not {_excerpt(s, at)}")
        name, schema, at = self.name(at)
        end = self.arguments(at, schema)
        return name, self.built(), end

    def name(self, at: int) -> tuple[str, Any, int]:
        """Name, schema of its parameters, position of the bracket."""
        for name in sorted(self.declared or (), key=len, reverse=True):
            if self.s.startswith(name, at):
                end = self.skip(at + len(name))
                if self.s[end : end + 1] in ("{", "("):
                    if end > at + len(name):
                        self.notes.append("white space")
                    return name, (self.declared or {})[name], end
        at = self.space(at)
        found = _NAME.match(self.s, at)
        if not found:
            raise CallError(f"a tool's name is missing at {_excerpt(self.s, at)}")
        name, end = found.group(), self.space(found.end())
        if self.declared is not None:
            last = re.split(r"[:./]", name)[-1]
            if last == name or last not in self.declared:
                raise self.unknown(name)
            self.notes.append(f"namespace {name[: -len(last)]!r} left out")
            name = last
        if self.s[end : end + 1] not in ("{", "("):
            raise CallError(f"the call of {name} has no arguments in {{}}")
        return name, (self.declared or {}).get(name), end

    def unknown(self, name: str) -> CallError:
        known = ", ".join(self.declared or ()) or "none"
        return CallError(f"there is no tool {name!r}; known tools: {known}")

    def json_call(self, at: int) -> tuple[str, dict[str, Any], int]:
        """{"name": .., "arguments": {..}}, bare or under "function", as other models write calls."""
        end = self.arguments(at, None)
        call = self.built()
        if isinstance(call.get("function"), dict):
            call = call["function"]
        name = call.get("name")
        arguments = next((call[key] for key in ("arguments", "parameters") if key in call), None)
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise CallError('a call begins `call:NAME{`, and this object has no "name" and "arguments"')
        if self.declared is not None and name not in self.declared:
            raise self.unknown(name)
        self.notes.append("the call is a JSON object")
        self.schema = (self.declared or {}).get(name)
        return name, arguments, end

    # Arguments

    def arguments(self, at: int, schema: Any) -> int:
        """Reads the bracket at `at` into ops; position after it. Goes back to another end of a string when stuck."""
        self.schema = schema
        if self.s[at] == "(":
            self.notes.append("parentheses")
            inner = self.skip(at + 1)
            if self.s.startswith("{", inner):  # name({..})
                end = self.skip(self.arguments(inner, schema))
                if not self.s.startswith(")", end):
                    raise CallError(f") missing at {_excerpt(self.s, end)}")
                return end + 1
        state: tuple[Any, ...] = ("value", at, (), 0, len(self.notes), schema)
        first: CallError | None = None
        for _ in range(TRIES):
            try:
                return self.run(*state)
            except CallError as e:
                first = first or e
            if not self.choices:
                break
            state = self.choices.pop()
            del self.ops[state[3] :], self.notes[state[4] :]
        assert first is not None
        raise first

    def run(self, mode: str, at: int, stack: tuple[tuple[str, Any], ...], ops: int, notes: int, extra: Any) -> int:
        """The machine. stack: (closing bracket, schema) of what is open; extra: schema of the value to come, or where
        a string goes on."""
        s = self.s
        schema = extra
        while True:
            if mode == "value":
                at = self.space(at)
                char = s[at : at + 1]
                if char in _CLOSER and (char != "(" or not stack):
                    if len(stack) == DEPTH:
                        raise CallError(f"arguments are nested deeper than {DEPTH}")
                    stack = (*stack, (_CLOSER[char], schema))
                    self.ops.append(("[" if char == "[" else "{", None))
                    at, mode = self.first(at + 1, stack)
                elif char in (QUOTE, '"', "'"):
                    extra, mode = (at, at + 1, schema), "string"
                else:
                    value, at = self.scalar(at, schema)
                    self.ops.append(("value", value))
                    mode = "after"
            elif mode == "string":
                begin, search, schema = extra
                end = self.string_end(begin, search, stack)
                # Should this end lead nowhere, the string goes on.
                again = (begin, end + 1, schema)
                self.choices.append(("string", at, stack, len(self.ops), len(self.notes), again))
                self.ops.append(("value", self.string(begin, end)))
                at, mode = end + 1, "after"
            elif mode == "key":
                at = self.key(at, stack)
                schema = property_of(stack[-1][1], self.ops[-1][1])
                mode = "value"
            elif mode == "item":
                schema = items_of(stack[-1][1])
                mode = "value"
            elif mode == "after":
                if not stack:
                    if self.ends(at):
                        return at
                    raise CallError(f"unexpected {_excerpt(s, at)} after the call")
                at = self.space(at)
                char, closer = s[at : at + 1], stack[-1][0]
                if char == closer:
                    stack, at = stack[:-1], at + 1
                    self.ops.append(("end", None))
                elif char == ",":
                    at, mode = self.first(at + 1, stack, comma=True)
                elif not char and self.closed and len(stack) == 1 and _QUOTES not in self.notes:
                    self.notes.append(f"the last {closer} missing")
                    self.ops.append(("end", None))
                    return at
                elif not char:
                    raise CallError("the call is cut off")
                else:
                    raise CallError(f"unexpected {_excerpt(s, at)}")

    def first(self, at: int, stack: tuple[tuple[str, Any], ...], comma: bool = False) -> tuple[int, str]:
        """Position and mode after an opening bracket or a comma."""
        closer, schema = stack[-1]
        if closer != "]" and self.declared_key(at, schema) is not None:
            return at, "key"
        end = self.skip(at)
        if self.s.startswith(closer, end):
            if comma:
                self.notes.append("trailing comma")
            if end > at:
                self.notes.append("white space")
            return end, "after"
        return at, "item" if closer == "]" else "key"

    def key(self, at: int, stack: tuple[tuple[str, Any], ...]) -> int:
        """Reads a key and its colon into ops; position after them."""
        s, (closer, schema) = self.s, stack[-1]
        found = self.declared_key(at, schema)
        if found is None:
            start = self.space(at)
            found = self.declared_key(start, schema) if start > at else None
            at = start
        if found is not None:
            self.ops.append(("key", found))
            return at + len(found) + 1
        char = s[at : at + 1]
        if not char:
            raise CallError("the call is cut off")
        if char in (QUOTE, '"', "'"):
            end = self.quoted_key(at)
            if end is None:
                raise CallError(f"a key is not closed at {_excerpt(s, at)}")
            self.ops.append(("key", self.string(at, end)))
            self.notes.append("keys in quotes")
            at = self.space(end + 1)
            if s[at] == "=":
                self.notes.append("`=` for `:`")
            return at + 1
        keyword = _KEYWORD.match(s, at)
        python = keyword is not None and (closer == ")" or s[keyword.end() : keyword.end() + 1] in (QUOTE, '"', "'"))
        found = keyword if python else _KEY.match(s, at) or keyword
        if found is None:
            raise CallError(f"a key and a colon are missing at {_excerpt(s, at)}")
        key = found.group(1).rstrip(" \t\r\n")
        if s[found.end() - 1] == "=":
            self.notes.append("`=` for `:`")
        if len(key) < len(found.group(1)):
            self.notes.append("white space")
        self.ops.append(("key", key))
        return found.end()

    def quoted_key(self, at: int) -> int | None:
        """Where the key whose quote stands at `at` ends, if a colon follows it."""
        end = next(self.quotes(at, at + 1), None)
        after = self.skip(end + 1) if end is not None else 0
        return end if self.s[after : after + 1] in (":", "=") else None

    def declared_key(self, at: int, schema: Any) -> str | None:
        """The longest declared property that stands here with a colon after it."""
        for key in sorted(properties_of(schema), key=len, reverse=True):
            if self.s.startswith(key + ":", at):
                return key
        return None

    def scalar(self, at: int, schema: Any) -> tuple[Any, int]:
        """Number, literal or unquoted word."""
        number = _NUMBER.match(self.s, at)
        if number:
            try:
                value = float(number.group()) if number.group(1) or number.group(2) else int(number.group())
            except ValueError:  # Python's limit on digits
                raise CallError(f"a number of {len(number.group())} digits") from None
            if isinstance(value, float) and math.isinf(value):
                raise CallError(f"the number {number.group()} is out of range")
            return value, number.end()
        word = _WORD.match(self.s, at)
        text = word.group().rstrip(" \t\r") if word else ""
        if word is None or (at + len(text) == len(self.s) and not self.closed):
            raise CallError(f"a value is missing at {_excerpt(self.s, at)}")
        if text in _LITERALS:
            if text[0].isupper():
                self.notes.append(f"{text} for {_write(_LITERALS[text])}")
            return _LITERALS[text], at + len(text)
        # What begins like a number is one that was damaged, unless a string was asked for.
        if not may_be(schema, "string", unknown=text[0] not in "+-.0123456789"):
            raise CallError(f"{text!r} is no value of the type declared")
        self.notes.append(f"a string without quotes: {text!r}")
        return text, at + len(text)

    # Strings

    def quotes(self, begin: int, search: int) -> Iterator[int]:
        """Positions from `search` on where the string opened at `begin` could end."""
        s, quote = self.s, self.s[begin]
        # Quote tokens that are text come in pairs; an odd one is the sign of a lost end. Other quotes are escaped.
        even = s.count(quote, begin + 1, search) % 2 == 0
        at = s.find(quote, search)
        while at >= 0:
            escapes = at
            while quote != QUOTE and s[escapes - 1] == "\\":
                escapes -= 1
            if even if quote == QUOTE else (at - escapes) % 2 == 0:
                yield at
            even = not even
            at = s.find(quote, at + 1)

    def string_end(self, begin: int, search: int, stack: tuple[tuple[str, Any], ...]) -> int:
        for end in self.quotes(begin, search):
            if self.goes_on(end + 1, stack):
                return end
        raise CallError(f"a string is not closed: {_excerpt(self.s, begin)}", open_string=True)

    def goes_on(self, at: int, stack: tuple[tuple[str, Any], ...]) -> bool:
        """Whether what stands at `at` can follow a value."""
        s, depth = self.s, len(stack)
        at = self.skip(at)
        while depth and s.startswith(stack[depth - 1][0], at):
            depth -= 1
            at = self.skip(at + 1)
        if at == len(s):
            return depth == 0 or (self.closed and depth == 1)
        if depth == 0:
            return self.ends(at)
        if s[at] != ",":
            return False
        closer, schema = stack[depth - 1]
        if closer == "]":
            at = self.skip(at + 1)
            return at < len(s) and s[at] not in ",:})"
        if self.declared_key(at + 1, schema) is not None:
            return True
        at = self.skip(at + 1)
        if s[at : at + 1] in (QUOTE, '"', "'"):
            return self.quoted_key(at) is not None
        return s.startswith(closer, at) or bool(
            self.declared_key(at, schema) is not None or _KEY.match(s, at) or (closer == ")" and _KEYWORD.match(s, at))
        )

    def string(self, begin: int, end: int) -> str:
        text = self.s[begin + 1 : end]
        if self.s[begin] == QUOTE:
            if QUOTE in text:
                if any(_SWALLOWED.match(inside) for inside in text.split(QUOTE)[1::2]):
                    raise CallError(f"the quotes of a string do not pair: {_excerpt(self.s, begin)}")
                self.notes.append(_QUOTES)
            if OPEN in text or CLOSE in text:
                self.notes.append("call tokens inside a string were read as text")
            return shown(text.replace(QUOTE, '"'))
        self.notes.append(f"strings in {self.s[begin]}")
        text = _ESCAPE.sub(lambda m: _unescaped(m.group(1)), shown(text))
        try:
            return text.encode("utf-16", "surrogatepass").decode("utf-16")  # \ud83c\udf4e is one character
        except UnicodeDecodeError:
            raise CallError("half a surrogate pair in a string") from None

    # The rest

    def ends(self, at: int) -> bool:
        """Whether nothing stands here, or another call, or the ) of `name({..})`."""
        at = self.skip(at)
        return at == len(self.s) or self.s[at] == ")" or _NEXT.match(self.s, at) is not None

    def skip(self, at: int) -> int:
        found = _SPACE.match(self.s, at)
        return found.end() if found else at

    def space(self, at: int) -> int:
        """The same, noted."""
        end = self.skip(at)
        if end > at:
            self.notes.append("white space")
        return end

    def built(self) -> dict[str, Any]:
        """The arguments that ops describe."""
        holder: list[Any] = []
        stack: list[tuple[Any, str | None]] = [(holder, None)]
        for op, value in self.ops:
            if op == "key":
                stack[-1] = (stack[-1][0], value)
                continue
            if op == "end":
                stack.pop()
                continue
            into, key = stack[-1]
            made: Any = {} if op == "{" else [] if op == "[" else value
            if isinstance(into, list):
                into.append(made)
            elif key in into:
                raise CallError(f"the key {key!r} stands there twice")
            else:
                into[key] = made
            if op != "value":
                stack.append((made, None))
        return holder[0]

    def doubts(self, name: str, arguments: dict[str, Any]) -> list[str]:
        """Notes on what the declaration says and the call does not; CallError where that is a sign of damage."""
        missing = [k for k in required_of(self.schema) if k not in arguments]
        if missing and _QUOTES in self.notes:
            raise CallError(f"the call of {name} lacks {', '.join(missing)}, and its quotes do not pair")
        return doubts(self.schema, arguments)


def _unescaped(what: str) -> str:
    if len(what) == 5:
        return chr(int(what[1:], 16))
    return _ESCAPES.get(what, "\\" + what)  # \d of a regular expression stays


def _excerpt(text: str, at: int) -> str:
    rest = " ".join(shown(text[at : at + 40]).split())
    return f"`{rest}`" if rest else "the end"
