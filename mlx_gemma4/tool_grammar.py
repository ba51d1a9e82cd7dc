"""The grammar of calls of declared tools, in llguidance's Lark dialect.

Owns the translation of JSON schemas to Gemma 4's own call syntax: bare keys in the template's order, strings between
`<|"|>`. Enforced: names, types, required and unknown properties, enums, constants, lengths, patterns, bounds of
numbers, numbers and kinds of items, alternatives, allOf, local references. Not enforced: formats, multipleOf,
uniqueItems and keywords not named here, and order and uniqueness of keys in free-form objects; the model reads them in
the declaration. Leaves JSON answers to `structured.py`, numbers to `number_grammar.py`, reading to `call_grammar.py`.

Source of the syntax: the published chat templates, macros format_argument and dictsort of call arguments.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .errors import UsageError
from .number_grammar import FLOAT, INTEGER, bounded
from .tokenizer import Tokenizer
from .turns import CALL_CLOSE, CALL_OPEN, STRING

_ANY, _COMMA = "any", '","'
# KEY: what the reader takes for one without a declaration.
_BASE = r"""
any: any_string | NUMBER | "true" | "false" | "null" | any_array | any_object
any_string: {quote} TEXT {quote}
any_array: "[" (any ("," any)*)? "]"
any_object: "{{" (KEY ":" any ("," KEY ":" any)*)? "}}"
KEY: /[^ \t\r\n:,=(){{}}\[\]"'<`]([^\t\r\n:,=(){{}}\[\]"'<`]*[^ \t\r\n:,=(){{}}\[\]"'<`])?/
TEXT: /(.|\n)*/
"""
_ANYTHING = r"(.|\n)*"


def call_grammar(tokenizer: Tokenizer, functions: Sequence[Mapping[str, Any]], several: bool = False) -> str:
    """functions: the "function" objects of declarations. several: one call or more, otherwise one. Raises UsageError
    for a schema that makes no sense."""
    ids = [tokenizer.token_id(mark) for mark in (CALL_OPEN, CALL_CLOSE, STRING)]
    if None in ids:
        raise UsageError("this checkpoint's tokenizer has no marks of tool calls; it cannot be made to call tools")
    begin, end, quote = (f"<[{i}]>" for i in ids)
    rules = _Rules(quote)
    calls = []
    for function in functions:
        schema = function.get("parameters") or {"type": "object", "properties": {}}
        calls.append(f"{_literal('call:' + function['name'])} {rules.object(rules.whole(schema, schema), schema)}")
    start = f"start: call{'+' if several else ''}\ncall: {begin} ({' | '.join(calls)}) {end}"
    numbers = f"INTEGER: {INTEGER}\nNUMBER: {INTEGER} | {FLOAT}"
    return "\n".join([start, *rules.lines, _BASE.format(quote=rules.quote), numbers])


class _Rules:
    """Rules as they are found necessary; each method returns what refers to one."""

    def __init__(self, quote: str):
        self.quote = quote
        self.lines: list[str] = []
        self._references: dict[tuple[int, str], str] = {}

    def value(self, schema: Any, root: Mapping[str, Any]) -> str:
        """A value of `schema`; `root` is where its references point into."""
        if schema is True or schema == {}:
            return _ANY
        if not isinstance(schema, Mapping):
            raise UsageError(f"a tool's parameters hold {schema!r:.80} where a schema is due")
        if "$ref" in schema:
            return self._reference(schema["$ref"], root)
        schema = self.whole(schema, root)
        options = self._options(schema, root)
        return _either([*options, '"null"'] if schema.get("nullable") else options)

    def _options(self, schema: Mapping[str, Any], root: Mapping[str, Any]) -> list[str]:
        if "const" in schema:
            return [self._constant(schema["const"])]
        if "enum" in schema:
            return [self._constant(value) for value in schema["enum"]]
        for union in ("anyOf", "oneOf"):
            if union in schema:
                rest = {k: v for k, v in schema.items() if k not in (union, "nullable", "description")}
                return [self.value(_merged(rest, option) if rest else option, root) for option in schema[union]]
        kinds = schema.get("type")
        kinds = kinds if isinstance(kinds, list) else [kinds]
        return [self._typed(str(kind).lower() if kind else None, schema, root) for kind in kinds]

    def whole(self, schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
        """The schema with its allOf, and an object's own reference, merged into it."""
        if "$ref" in schema:
            return self.whole(_target(schema["$ref"], root), root)
        parts = schema.get("allOf")
        if not parts:
            return schema
        out: Mapping[str, Any] = {k: v for k, v in schema.items() if k != "allOf"}
        for part in parts:
            out = _merged(out, self.whole(part, root))
        return out

    def object(self, schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
        required = list(schema.get("required") or ())
        more = schema.get("additionalProperties")
        properties = {name: {} if more is None or more is True else more for name in required}
        properties |= schema.get("properties") or {}
        if not properties:
            if more is False or (more is None and "properties" in schema):
                return '"{" "}"'
            if more in (None, True):
                return "any_object"
            member = f'KEY ":" {self._rule(self.value(more, root))}'
            return f'"{{" ({member} ("," {member})*)? "}}"'
        # As the template sorts them. From the last to the first: each rule names what may follow.
        first, later = '""', '""'
        for name in reversed(sorted(properties, key=str.lower)):
            member = f"{_literal(name + ':')} {self.value(properties[name], root)}"
            if name in required:
                first, later = self._rule(f"{member} {later}"), self._rule(f'"," {member} {later}')
            else:
                first = self._rule(f"{member} {later} | {first}")
                later = self._rule(f'"," {member} {later} | {later}')
        return f'"{{" {first} "}}"'

    def _typed(self, kind: str | None, schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
        if kind == "string" or (kind is None and "pattern" in schema):
            return f"{self.quote} {self._text(schema)} {self.quote}"
        if kind in ("integer", "number"):
            limits = bounded(schema, kind == "integer")
            return kind.upper() if limits is None else self._terminal(limits)
        if kind == "boolean":
            return '("true" | "false")'
        if kind == "null":
            return '"null"'
        if kind == "array" or (kind is None and "items" in schema):
            return self._array(schema, root)
        if kind == "object" or (kind is None and "properties" in schema):
            return self.object(schema, root)
        if kind is None:
            return _ANY
        raise UsageError(f"a tool's parameter is of type {kind!r}, which JSON schema does not know")

    def _text(self, schema: Mapping[str, Any]) -> str:
        from llguidance import regex_to_lark

        parts = []
        if "pattern" in schema:
            regex = "|".join(_anywhere(branch) for branch in _branches(schema["pattern"]))
            parts.append(f"/({regex_to_lark(regex, 'dw')})/")
        least, most = schema.get("minLength", 0), schema.get("maxLength")
        if most is not None and most < least:
            raise UsageError(f"a tool's parameter has minLength {least} and maxLength {most}; no text is both")
        if least or most is not None:
            parts.append(rf"/(.|\n){{{least},{'' if most is None else most}}}/")
        return self._terminal(" & ".join(parts)) if parts else "TEXT"

    def _array(self, schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
        leading = [self._rule(self.value(item, root)) for item in schema.get("prefixItems") or ()]
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if schema.get("items") is False:
            most = min(len(leading), len(leading) if most is None else most)
        if most is not None and most < least:
            raise UsageError(f"a tool's parameter has minItems {least} and at most {most} items; no list has both")
        leading = leading[:most]
        # From the last to the first, as in objects.
        rest = ""
        if most is None or most > len(leading):
            item = self._rule(self.value(schema.get("items", True), root))
            low = max(0, least - len(leading))
            if not leading:
                more = f"{max(0, low - 1)},{'' if most is None else most - 1}"
                filled = f'{item} ("," {item}){{{more}}}'
                return f'"[" {filled} "]"' if low else f'"[" ({filled})? "]"'
            rest = f'("," {item}){{{low},{"" if most is None else most - len(leading)}}}'
        for at in reversed(range(len(leading))):
            inner = f"{_COMMA if at else ''} {leading[at]} {rest}"
            rest = self._rule(inner if at < least else f'{inner} | ""')
        return f'"[" {rest} "]"'

    def _constant(self, value: Any) -> str:
        if isinstance(value, str):
            return f"{self.quote} {_literal(value) if value else ''} {self.quote}"
        if isinstance(value, list):
            return f'"[" {f" {_COMMA} ".join(map(self._constant, value))} "]"'
        if isinstance(value, Mapping):
            items = sorted(value.items(), key=lambda item: item[0].lower())
            written = f" {_COMMA} ".join(f"{_literal(f'{k}:')} {self._constant(v)}" for k, v in items)
            return f'"{{" {written} "}}"'
        return _literal(json.dumps(value))

    def _reference(self, where: str, root: Mapping[str, Any]) -> str:
        key = (id(root), where)
        if key not in self._references:
            # Named first: a schema may refer to itself.
            name = self._references[key] = f"r{len(self.lines)}"
            at = len(self.lines)
            self.lines.append("")
            self.lines[at] = f"{name}: {self.value(_target(where, root), root)}"
        return self._references[key]

    def _rule(self, body: str) -> str:
        self.lines.append(f"r{len(self.lines)}: {body}")
        return f"r{len(self.lines) - 1}"

    def _terminal(self, body: str) -> str:
        self.lines.append(f"T{len(self.lines)}: {body}")
        return f"T{len(self.lines) - 1}"


def _target(where: str, root: Mapping[str, Any]) -> Any:
    target: Any = root
    for step in where.removeprefix("#").split("/")[1:]:
        target = target.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(target, Mapping) else None
    if not where.startswith("#") or target is None:
        raise UsageError(f"a tool's parameters refer to {where!r}, which is not in its schema")
    return target


def _merged(a: Mapping[str, Any], b: Any) -> dict[str, Any]:
    """What both ask for, keyword by keyword: properties and required together, otherwise b's word."""
    if not isinstance(b, Mapping):
        return dict(a)
    out = {**a, **b}
    if "properties" in a and "properties" in b:
        out["properties"] = {**a["properties"], **b["properties"]}
    if "required" in a and "required" in b:
        out["required"] = list(dict.fromkeys([*a["required"], *b["required"]]))
    return out


def _branches(pattern: str) -> list[str]:
    """The alternatives at the top of a regular expression."""
    out, depth, at, begin, inside = [], 0, 0, 0, False
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            at += 1
        elif inside:
            inside = char != "]"
        elif char == "[":
            inside = True
        elif char in "()":
            depth += 1 if char == "(" else -1
        elif char == "|" and depth == 0:
            out.append(pattern[begin:at])
            begin = at + 1
        at += 1
    return [*out, pattern[begin:]]


def _anywhere(pattern: str) -> str:
    """A pattern that is searched for, as one that matches a whole text."""
    before = "" if pattern.startswith("^") else _ANYTHING
    after = "" if pattern.endswith("$") and not pattern.endswith("\\$") else _ANYTHING
    inner = pattern.removeprefix("^")
    return f"{before}({inner if after else inner.removesuffix('$')}){after}"


def _either(options: Iterable[str]) -> str:
    found = list(dict.fromkeys(options))
    if not found:
        raise UsageError("a tool's parameter has no possible value: its enum or alternatives are empty")
    return found[0] if len(found) == 1 else f"({' | '.join(found)})"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
