"""What tools' JSON schemas say about a call, as far as reading one needs it.

Owns the way from declarations as users write them to names and schemas, and small questions to a schema. Leaves making
declarations to `tools.py` and validating values to whoever runs a tool. `$ref` is not followed: what it hides counts as
not said.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from .errors import UsageError

# Schema of the parameters, or None where only the name is known, by tool name.
Declared = Mapping[str, Mapping[str, Any] | None]


def declared(tools: Iterable[str | Mapping[str, Any]] | None) -> Declared | None:
    """Tools by name: from names, or declarations in the template's form ({"type": "function", "function": {"name",
    "parameters"}}, or what stands under "function" alone). None stays None: nothing is known. Raises UsageError."""
    if tools is None:
        return None
    found: dict[str, Mapping[str, Any] | None] = {}
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else tool
        name = function.get("name") if isinstance(function, Mapping) else function
        if not isinstance(name, str) or not name:
            raise UsageError(f"a tool's declaration has no name ({tool!r:.80}); give it one under function.name")
        found[name] = function.get("parameters") if isinstance(function, Mapping) else None
    return found


def _branches(schema: Any) -> list[Mapping[str, Any]]:
    """The schema and its alternatives."""
    if not isinstance(schema, Mapping):
        return []
    inner = [b for key in ("anyOf", "oneOf", "allOf") for b in schema.get(key) or () if isinstance(b, Mapping)]
    return [schema, *inner]


def properties_of(schema: Any) -> dict[str, Any]:
    """Properties of an object and of its alternatives."""
    found: dict[str, Any] = {}
    for branch in _branches(schema):
        properties = branch.get("properties")
        if isinstance(properties, Mapping):
            found |= properties
    return found


def property_of(schema: Any, key: str) -> Any:
    """Schema of the value under `key`, or None."""
    known = properties_of(schema)
    if key in known:
        return known[key]
    return next((b["additionalProperties"] for b in _branches(schema) if "additionalProperties" in b), None)


def items_of(schema: Any) -> Any:
    """Schema of an array's items, or None."""
    return next((b["items"] for b in _branches(schema) if "items" in b), None)


def kinds_of(value: Any) -> tuple[str, ...]:
    """JSON schema's names for the type of a value."""
    if isinstance(value, bool):
        return ("boolean",)
    if isinstance(value, int):
        return ("integer", "number")
    names = {float: "number", str: "string", list: "array", dict: "object"}
    return (names.get(type(value), "null"),)


def may_be(schema: Any, *kinds: str, unknown: bool = True) -> bool:
    """Whether a schema admits one of these types; `unknown` where it says nothing of types."""
    said: set[str] = set()
    for branch in _branches(schema):
        types = branch.get("type")
        said |= {t.lower() for t in ([types] if isinstance(types, str) else types or ()) if isinstance(t, str)}
        if branch.get("nullable"):
            said.add("null")
    return bool(said.intersection(kinds)) if said - {"null"} else unknown


def required_of(schema: Any) -> list[str]:
    """Names of the properties an object must have."""
    return list(schema.get("required") or ()) if isinstance(schema, Mapping) else []


def doubts(schema: Any, arguments: Mapping[str, Any]) -> list[str]:
    """Where arguments are not as declared, at the top level alone, one line each. No schema, no doubts."""
    if not isinstance(schema, Mapping):
        return []
    properties = properties_of(schema)
    found = [f"required {key!r} missing" for key in required_of(schema) if key not in arguments]
    for key, value in arguments.items():
        if properties and key not in properties and not schema.get("additionalProperties"):
            found.append(f"{key!r} is not declared")
        elif key in properties and not may_be(properties[key], *kinds_of(value)):
            found.append(f"{key!r} is not of the type declared")
    return found
