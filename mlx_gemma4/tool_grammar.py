"""The grammar of one call of a declared tool, in llguidance's Lark dialect.

Owns the translation of JSON schemas to Gemma 4's own call syntax: bare keys in the template's order, strings between
`<|"|>`. Enforced: names, types, required and unknown properties, enums, constants, lengths, patterns, numbers of items,
alternatives, local references. Not enforced: bounds of numbers, formats, and keywords not named here; the model reads
them in the declaration. Leaves JSON answers to `structured.py` and reading calls to `tool_calls.py`.

Source of the syntax: the published chat templates, macros format_argument and dictsort of call arguments.
"""

import json
from collections.abc import Sequence
from typing import Any

from .errors import UsageError
from .tokenizer import Tokenizer

_ANY = "any"
_BASE = r"""
any: any_string | NUMBER | "true" | "false" | "null" | any_array | any_object
any_string: {quote} TEXT {quote}
any_array: "[" (any ("," any)*)? "]"
any_object: "{{" (KEY ":" any ("," KEY ":" any)*)? "}}"
KEY: /[A-Za-z_][A-Za-z0-9_.-]*/
TEXT: /(.|\n)*/
INTEGER: /-?(0|[1-9][0-9]{{0,17}})/
NUMBER: /-?(0|[1-9][0-9]{{0,17}})(\.[0-9]{{1,17}})?([eE][+-]?[0-9]{{1,3}})?/
"""
_UNION = ("anyOf", "oneOf")


def call_grammar(tokenizer: Tokenizer, functions: Sequence[dict[str, Any]]) -> str:
    """functions: the "function" objects of declarations. Raises UsageError for a schema that makes no sense."""
    ids = [tokenizer.token_id(mark) for mark in ("<|tool_call>", "<tool_call|>", '<|"|>')]
    if None in ids:
        raise UsageError("this checkpoint's tokenizer has no marks of tool calls; it cannot be made to call tools")
    begin, end, quote = (f"<[{i}]>" for i in ids)
    rules = _Rules(quote)
    calls = []
    for function in functions:
        schema = function.get("parameters") or {"type": "object", "properties": {}}
        calls.append(f"{_literal('call:' + function['name'])} {rules.object(schema, schema)}")
    start = f"start: {begin} ({' | '.join(calls)}) {end}"
    return "\n".join([start, *rules.lines, _BASE.format(quote=rules.quote)])


class _Rules:
    """Rules as they are found necessary; each method returns what refers to one."""

    def __init__(self, quote: str):
        self.quote = quote
        self.lines: list[str] = []
        self._references: dict[tuple[int, str], str] = {}

    def value(self, schema: Any, root: dict[str, Any]) -> str:
        """A value of `schema`; `root` is where its references point into."""
        if schema is True or schema == {}:
            return _ANY
        if not isinstance(schema, dict):
            raise UsageError(f"a tool's parameters hold {schema!r} where a schema is due")
        if "$ref" in schema:
            return self._reference(schema["$ref"], root)
        if "const" in schema:
            return self._constant(schema["const"])
        if "enum" in schema:
            return _either(self._constant(value) for value in schema["enum"])
        for union in _UNION:
            if union in schema:
                return _either(self.value(option, root) for option in schema[union])
        kinds = schema.get("type")
        kinds = kinds if isinstance(kinds, list) else [kinds]
        options = [self._typed(str(kind).lower() if kind else None, schema, root) for kind in kinds]
        if schema.get("nullable"):
            options.append('"null"')
        return _either(options)

    def object(self, schema: dict[str, Any], root: dict[str, Any]) -> str:
        properties = schema.get("properties")
        if not properties:
            return "any_object" if schema.get("additionalProperties", properties is None) else '"{" "}"'
        required = set(schema.get("required") or ())
        # As the template sorts them. From the last to the first: each rule names what may follow.
        names = sorted(properties, key=str.lower)
        first, later = '""', '""'
        for name in reversed(names):
            member = f"{_literal(name + ':')} {self.value(properties[name], root)}"
            if name in required:
                first, later = self._rule(f"{member} {later}"), self._rule(f'"," {member} {later}')
            else:
                first = self._rule(f"{member} {later} | {first}")
                later = self._rule(f'"," {member} {later} | {later}')
        return f'"{{" {first} "}}"'

    def _typed(self, kind: str | None, schema: dict[str, Any], root: dict[str, Any]) -> str:
        if kind == "string":
            return f"{self.quote} {self._text(schema)} {self.quote}"
        if kind in ("integer", "number"):
            return kind.upper()
        if kind == "boolean":
            return '("true" | "false")'
        if kind == "null":
            return '"null"'
        if kind == "array":
            return self._array(schema, root)
        if kind == "object" or (kind is None and "properties" in schema):
            return self.object(schema, root)
        if kind is None:
            return _ANY
        raise UsageError(f"a tool's parameter is of type {kind!r}, which JSON schema does not know")

    def _text(self, schema: dict[str, Any]) -> str:
        if "pattern" in schema:
            pattern = schema["pattern"]
            inner = pattern.removeprefix("^").removesuffix("$")
            before = "" if pattern.startswith("^") else r"(.|\n)*"
            after = "" if pattern.endswith("$") else r"(.|\n)*"
            return self._terminal(f"{before}({inner}){after}")
        least, most = schema.get("minLength", 0), schema.get("maxLength")
        if not least and most is None:
            return "TEXT"
        return self._terminal(rf"(.|\n){{{least},{'' if most is None else most}}}")

    def _array(self, schema: dict[str, Any], root: dict[str, Any]) -> str:
        item = self._rule(self.value(schema.get("items", True), root))
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if most == 0:
            return '"[" "]"'
        more = f"{max(0, least - 1)},{'' if most is None else most - 1}"
        filled = f'{item} ("," {item}){{{more}}}'
        return f'"[" {filled} "]"' if least else f'"[" ({filled})? "]"'

    def _constant(self, value: Any) -> str:
        if isinstance(value, str):
            return f"{self.quote} {_literal(value)} {self.quote}" if value else f"{self.quote} {self.quote}"
        if isinstance(value, dict | list):
            raise UsageError("enums of lists or objects are not possible in a tool's parameters; use strings")
        return _literal(json.dumps(value))

    def _reference(self, where: str, root: dict[str, Any]) -> str:
        key = (id(root), where)
        if key not in self._references:
            target: Any = root
            for step in where.removeprefix("#").split("/")[1:]:
                target = target.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(target, dict) else None
            if not where.startswith("#") or target is None:
                raise UsageError(f"a tool's parameters refer to {where!r}, which is not in its schema")
            # Named first: a schema may refer to itself.
            name = self._references[key] = f"r{len(self.lines)}"
            at = len(self.lines)
            self.lines.append("")
            self.lines[at] = f"{name}: {self.value(target, root)}"
        return self._references[key]

    def _rule(self, body: str) -> str:
        self.lines.append(f"r{len(self.lines)}: {body}")
        return f"r{len(self.lines) - 1}"

    def _terminal(self, regex: str) -> str:
        self.lines.append(f"T{len(self.lines)}: /{regex.replace('/', chr(92) + '/')}/")
        return f"T{len(self.lines) - 1}"


def _either(options: Any) -> str:
    found = list(dict.fromkeys(options))
    if not found:
        raise UsageError("a tool's parameter has no possible value: its enum or alternatives are empty")
    return found[0] if len(found) == 1 else f"({' | '.join(found)})"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
