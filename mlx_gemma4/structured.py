"""Answers of a given form: JSON, JSON of a schema, a regular expression, a grammar, or a call of a declared tool.

Owns what a `response_format` may be and the masks of allowed tokens, which llguidance computes. Leaves where in a turn
the form begins to `guides.py`, and the syntax of Gemma 4's calls to `tool_grammar.py`.

    "json", {"type": "json_object"}                           any JSON object
    {"type": "json_schema", "json_schema": {"schema": ...}}   as OpenAI spells it; {"schema": ...} beside the type, too
    {"type": "object", "properties": ...}, a pydantic model   a schema itself
    {"type": "regex", "regex": "[0-9]{4}"}
    {"type": "grammar", "grammar": "start: ..."}              in llguidance's Lark dialect
    {"type": "tool_call"}, {"type": "tool_call", "name": ...} a call of one of the turn's tools

JSON comes with at most one space or one indented line between its parts: a model cannot fill its answer with blanks.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import Gemma4Error, UsageError
from .tokenizer import Tokenizer

_BLANKS = {"whitespace_flexible": True, "whitespace_pattern": r"(\n {0,40}| ?)"}
_FORMS = "json_object, json_schema, regex, grammar, tool_call or a JSON schema"


class GrammarGuide:
    """Keeps to a grammar, token by token; at its end only stop tokens may come.

    grammar: what `llguidance.LLMatcher.grammar_from_*` returns. Raises UsageError, in one line, for one that does not
    compile, Gemma4Error when the answer has left it, which only a foreign sampler can do.
    """

    def __init__(self, tokenizer: Tokenizer, grammar: str):
        from llguidance import LLMatcher

        self._vocabulary = tokenizer.constraint_vocabulary
        self._matcher = LLMatcher(self._vocabulary, grammar, log_level=0)
        if self._matcher.is_error():
            raise UsageError(f"the response format cannot be used: {_line(self._matcher.get_error())}")
        self._stops = [i for i in tokenizer.eos_token_ids if i < self._vocabulary.vocab_size]
        self._words = np.zeros((self._vocabulary.vocab_size + 31) // 32, np.int32)
        self._over = False

    def forced(self) -> int | None:
        return None

    def mask(self) -> np.ndarray | None:
        if self._over:
            return None
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        if self._matcher.is_error():
            raise Gemma4Error(f"the response format became too complex: {_line(self._matcher.get_error())}")
        bits = np.unpackbits(self._words.view(np.uint8), bitorder="little")
        allowed = bits[: self._vocabulary.vocab_size].astype(bool)
        if self._matcher.is_accepting() or self._matcher.is_stopped():
            allowed[self._stops] = True
        return allowed

    def advance(self, token: int) -> None:
        if self._over:
            return
        self._over = token in self._stops
        if not self._over and not self._matcher.consume_token(token):
            raise Gemma4Error(f"token {token} is not of the response format; its sampler ignored the mask")


def grammar_for(tokenizer: Tokenizer, response_format: Any, tools: Sequence[dict[str, Any]] = ()) -> GrammarGuide:
    """The guide of one answer. tools: declarations, for "tool_call". Raises UsageError."""
    try:
        import llguidance
    except ImportError:
        raise UsageError("response formats need llguidance; install it with: pip install llguidance") from None
    matcher = llguidance.LLMatcher
    kind, what = _read(response_format)
    if kind == "tool_call":
        from .tool_grammar import call_grammar

        return GrammarGuide(tokenizer, matcher.grammar_from_lark(call_grammar(tokenizer, _chosen(tools, what))))
    if kind == "regex":
        return GrammarGuide(tokenizer, matcher.grammar_from_regex(what))
    if kind == "grammar":
        return GrammarGuide(tokenizer, matcher.grammar_from_lark(what))
    try:
        grammar = matcher.grammar_from_json_schema(what, defaults=_BLANKS)  # type: ignore[arg-type]
    except ValueError as e:
        raise UsageError(f"the JSON schema cannot be used: {_line(e)}") from None
    return GrammarGuide(tokenizer, grammar)


def _read(given: Any) -> tuple[str, Any]:
    """(kind, schema or text or name) of a response format."""
    if hasattr(given, "model_json_schema"):  # a pydantic model
        return "schema", given.model_json_schema()
    if given in ("json", "json_object"):
        return "schema", {"type": "object"}
    if not isinstance(given, dict):
        raise UsageError(f"a response format is {_FORMS}, not {type(given).__name__}")
    kind = given.get("type")
    if kind == "json_object":
        return "schema", {"type": "object"}
    if kind == "json_schema":
        schema = given.get("schema", (given.get("json_schema") or {}).get("schema"))
        if not isinstance(schema, dict):
            raise UsageError('a response format of type "json_schema" lacks its "schema"')
        return "schema", schema
    if kind in ("regex", "grammar"):
        if not isinstance(given.get(kind), str):
            raise UsageError(f'a response format of type "{kind}" lacks its "{kind}"')
        return kind, given[kind]
    if kind == "tool_call":
        return "tool_call", given.get("name")
    if kind == "text" or not given:
        raise UsageError(f"a response format is {_FORMS}; leave it out for free text")
    return "schema", given


def _chosen(tools: Sequence[dict[str, Any]], name: str | None) -> list[dict[str, Any]]:
    functions = [tool["function"] for tool in tools]
    if name is not None:
        functions = [f for f in functions if f["name"] == name]
    if not functions:
        which = f"a tool {name!r}" if name else "tools"
        raise UsageError(f"a tool call is asked for, but the turn has no {which}; give it tools=")
    return functions


def _line(error: Any) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 300 else f"{text[:297]}..."
