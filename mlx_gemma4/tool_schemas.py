"""What tools' parameters may be: JSON schemas in the form chat templates can write, and arguments held against them.

Owns the plain form of a schema, in which Gemma 4's templates and transformers' `get_json_schema` agree, and the
checking of arguments by it. Leaves Python functions, whose arguments pydantic checks, to `tools.py`, and enforcing a
schema while the model writes to `tool_grammar.py`.
"""

import json
from collections.abc import Mapping
from typing import Any

from .errors import UsageError

# What templates do not write, or would write as if it were a property.
_LEFT_OUT = ("$defs", "definitions", "title", "default", "$schema", "$id", "$comment", "examples")
_UNIONS = ("anyOf", "oneOf")
_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
_SIMPLE = ("string", "integer", "number", "boolean")


def plain_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of an object as templates can write it: local references put in place, "null" among types as
    `nullable`, alternatives of simple types as a list of types, strings in enums named as such, no titles or defaults.

    What refers to itself stays an object without properties where it would repeat. Raises UsageError for a reference
    that leads nowhere, or a schema of something else than an object.
    """
    out = _plain(schema, schema, ())
    if not isinstance(out, dict) or out.get("type", "object") != "object":
        raise UsageError("the parameters of a tool are a JSON schema of type object; put the value under a name")
    return {**out, "type": "object", "properties": out.get("properties") or {}}


def _plain(node: Any, root: Mapping[str, Any], inside: tuple[str, ...]) -> Any:
    if not isinstance(node, Mapping):
        return node
    if "$ref" in node:
        where = node["$ref"]
        rest = {k: v for k, v in node.items() if k != "$ref"}
        if where in inside:
            return _plain({"type": "object", **rest}, root, inside)
        return _plain({**_found(where, root), **rest}, root, (*inside, where))
    out = {k: v for k, v in node.items() if k not in _LEFT_OUT}
    if isinstance(out.get("allOf"), list) and len(out["allOf"]) == 1:
        [only] = out.pop("allOf")
        return _plain({**only, **out}, root, inside)
    if isinstance(out.get("properties"), Mapping):
        out["properties"] = {k: _plain(v, root, inside) for k, v in out["properties"].items()}
    for key in ("items", "additionalProperties"):
        if key in out:
            out[key] = _plain(out[key], root, inside)
            if out[key] in ({}, True):
                del out[key]
    if isinstance(out.get("prefixItems"), list):
        out["prefixItems"] = [_plain(v, root, inside) for v in out["prefixItems"]]
    for union in _UNIONS:
        if isinstance(out.get(union), list):
            out |= _united(union, [_plain(option, root, inside) for option in out.pop(union)])
    if isinstance(out.get("type"), list):
        out |= _kinds(out["type"])
    if "const" in out:
        out["enum"] = [out.pop("const")]
    if isinstance(out.get("enum"), list):
        out |= _enum(out)
    return out


def _found(where: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    target: Any = root
    for step in str(where).removeprefix("#").split("/")[1:]:
        target = target.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(target, Mapping) else None
    if not isinstance(target, Mapping):
        raise UsageError(f"a tool's schema refers to {where!r}, which is not in it")
    return target


def _united(union: str, options: list[Any]) -> dict[str, Any]:
    """Alternatives: templates know `nullable` and a list of simple types, and write nothing of others."""
    real = [o for o in options if not isinstance(o, Mapping) or o.get("type") != "null"]
    nullable = {"nullable": True} if len(real) < len(options) else {}
    if len(real) == 1:
        return {**real[0], **nullable}
    if all(isinstance(o, Mapping) and set(o) == {"type"} and o["type"] in _SIMPLE for o in real):
        return {"type": [o["type"] for o in real], **nullable}
    return {union: real, **nullable}


def _kinds(kinds: list[Any]) -> dict[str, Any]:
    real = [k for k in kinds if k != "null"]
    nullable = {"nullable": True} if len(real) < len(kinds) else {}
    return {"type": real[0] if len(real) == 1 else real, **nullable}


def _enum(schema: dict[str, Any]) -> dict[str, Any]:
    """Templates write the values of strings only, and those only under their type."""
    values = [v for v in schema["enum"] if v is not None]
    out: dict[str, Any] = {"enum": values}
    kinds = {_TYPES.get(type(v)) for v in values}
    if "type" not in schema and len(kinds) == 1:
        out["type"] = kinds.pop()
    return out | ({"nullable": True} if len(values) < len(schema["enum"]) else {})


# Arguments


class ArgumentError(Exception):
    """Arguments that do not fit; the message is one line for the model."""


def fit(schema: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as a plain schema wants them: numbers and truth values written as text become such, and the other
    way round. Raises ArgumentError naming everything that is wrong.

    Checked: types, enums, required and unknown names, at any depth. Ranges, lengths and patterns are the tool's.
    """
    wrong: list[str] = []
    fitted = _fit(schema, dict(arguments), "", wrong)
    if wrong:
        raise ArgumentError("; ".join(wrong))
    return fitted


def _fit(schema: Any, value: Any, where: str, wrong: list[str]) -> Any:
    if not isinstance(schema, Mapping):
        return value
    if value is None and (schema.get("nullable") or "null" in _named(schema)):
        return None
    if (union := next((u for u in _UNIONS if u in schema), None)) is not None:
        for option in schema[union]:
            problems: list[str] = []
            fitted = _fit(option, value, where, problems)
            if not problems:
                return fitted
        wrong.append(f"{where}: {_shown(value)} is none of the alternatives")
        return value
    if "enum" in schema:
        same = [v for v in schema["enum"] if v == value and type(v) is type(value)]
        same = same or [v for v in schema["enum"] if _text(v) == _text(value)]
        if not same:
            wrong.append(f"{where}: {_shown(value)} is none of {', '.join(map(_shown, schema['enum']))}")
        return same[0] if same else value
    kinds = _named(schema)
    if not kinds:
        return value
    # As it is before anything is converted: "5" stays text where text is allowed, too.
    for convert in (False, True):
        for kind in kinds:
            fits, fitted = _as(kind, value, convert)
            if fits:
                return _inside(schema, fitted, where, wrong)
    wrong.append(f"{where or 'the arguments'}: {_shown(value)} is no {' or '.join(kinds)}")
    return value


def _named(schema: Mapping[str, Any]) -> list[str]:
    kinds = schema.get("type", "object" if "properties" in schema else [])
    return [k.lower() for k in ([kinds] if isinstance(kinds, str) else kinds)]


def _as(kind: str, value: Any, convert: bool) -> tuple[bool, Any]:
    """(whether it is a `kind`, the value as one)."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "string":
        return (True, value) if isinstance(value, str) else (convert and number, _text(value))
    if kind == "boolean":
        known = {"true": True, "false": False}
        if isinstance(value, str) and convert and value.lower() in known:
            return True, known[value.lower()]
        return isinstance(value, bool), value
    if kind in ("integer", "number"):
        if isinstance(value, str) and convert:
            try:
                value = int(value) if kind == "integer" else float(value)
            except ValueError:
                return False, value
            return True, value
        if kind == "integer" and isinstance(value, float):
            return (True, int(value)) if value.is_integer() else (False, value)
        return number, value
    found = {"array": list, "object": dict, "null": type(None)}.get(kind)
    return found is None or isinstance(value, found), value


def _inside(schema: Mapping[str, Any], value: Any, where: str, wrong: list[str]) -> Any:
    """The value with its items or properties fitted."""
    if isinstance(value, list):
        items = schema.get("items")
        return [_fit(items, v, f"{where}[{i}]", wrong) for i, v in enumerate(value)]
    if not isinstance(value, dict):
        return value
    properties = schema.get("properties") or {}
    other = schema.get("additionalProperties")
    at = f"{where}." if where else ""
    for name in schema.get("required") or ():
        if name not in value:
            wrong.append(f"{at}{name} is missing")
    out = {}
    for name, inner in value.items():
        # Nobody would know what to do with a name that is not declared, unless the schema is open or says nothing.
        if name not in properties and (other is False or (properties and other is None)):
            wrong.append(f"there is no {at}{name}; there are {', '.join(properties) or 'none'}")
        out[name] = _fit(properties.get(name, other), inner, f"{at}{name}", wrong)
    return out


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
