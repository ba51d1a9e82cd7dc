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
With tools and another form than "tool_call", an answer may also be calls of them; the form is for what is said at last.

An answer that may have only so many tokens still keeps its form: before they run out it is ended on a short way
(`endings.py`). A call is not: half an argument must not look like one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .endings import Endings, examples_of
from .errors import Gemma4Error, UsageError
from .guides import Guide
from .tokenizer import Tokenizer
from .turns import CALL_OPEN

_BLANKS = {"whitespace_flexible": True, "whitespace_pattern": r"(\n {0,40}| ?)"}
_FORMS = "json_object, json_schema, regex, grammar, tool_call or a JSON schema"
_WORDS = ("type", "properties", "items", "prefixItems", "anyOf", "oneOf", "allOf", "enum", "const", "$ref", "pattern")
# So many tokens before the last one, ways to an end are looked for with every token; before, at halves of what is left.
WATCH = 512
# Bytes of a token at most, as far as ways are concerned.
LONGEST = 16


class GrammarGuide:
    """Keeps to a grammar, token by token; at its end only stop tokens may come.

    grammar: what `llguidance.LLMatcher.grammar_from_*` returns. ends: whether the answer is brought to an end before
    its tokens run out. patterns: regular expressions that its texts must hold. Raises UsageError, in one line, for a
    grammar that does not compile, Gemma4Error when the answer has left it, which only a foreign sampler can do.
    """

    def __init__(self, tokenizer: Tokenizer, grammar: str, ends: bool = True, patterns: Sequence[str] = ()):
        from llguidance import LLMatcher

        self._tokenizer, self._grammar = tokenizer, grammar
        self._vocabulary = tokenizer.constraint_vocabulary
        self._matcher = LLMatcher(self._vocabulary, grammar, log_level=0)
        if self._matcher.is_error():
            raise UsageError(f"the response format cannot be used: {_line(self._matcher.get_error())}")
        self._stops = [i for i in tokenizer.eos_token_ids if i < self._vocabulary.vocab_size]
        self._words = np.zeros((self._vocabulary.vocab_size + 31) // 32, np.int32)
        self._over = False
        # Ending: tokens left (-1: no limit), what came since `_endings` was told, and the way out as it is known.
        self._ends, self._left, self._look_at = ends, -1, 0
        self._patterns = patterns
        self._endings: Endings | None = None
        self._since: list[int] = []
        self._way: list[int] | None = None

    def begin(self, limit: int) -> int:
        """See `Guide`. May be told again: what matters is what is left."""
        self._left = limit if self._ends else -1
        if self._left < 0 or self._over:
            return 0
        self._look_at = WATCH
        while self._look_at * 2 < limit:
            self._look_at *= 2
        if limit > 4 * WATCH:  # enough for any answer to begin with
            return 0
        self._way = self._find()
        if self._way is None:  # tried again at half of what is left
            self._look_at = limit // 2
        needed = len(self._way or ())
        if needed > limit:
            raise UsageError(
                f"the shortest answer of this form that was found takes {needed} tokens and {limit} are allowed; "
                "raise max_tokens"
            )
        return needed

    def forced(self) -> int | None:
        if self._way and not self._over and 0 <= self._left <= len(self._way):
            return self._way[0]
        return None

    def mask(self) -> np.ndarray | None:
        if self._over:
            return None
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        if self._matcher.is_error():
            raise Gemma4Error(f"the response format became too complex: {_line(self._matcher.get_error())}")
        size = self._vocabulary.vocab_size
        allowed = np.unpackbits(self._words.view(np.uint8), bitorder="little", count=size).view(bool)
        if self._matcher.is_accepting() or self._matcher.is_stopped():
            allowed[self._stops] = True
        return allowed

    def advance(self, token: int) -> int:
        if self._over:
            return token
        if token in self._stops:
            self._over = True
            return token
        if not self._matcher.consume_token(token):
            if self._words[token // 32] >> (token % 32) & 1:
                raise Gemma4Error(f"the response format became too complex: {_line(self._matcher.get_error())}")
            raise Gemma4Error(f"token {token} is not of the response format; its sampler ignored the mask")
        if self._left > 0:
            token = self._kept(token)
        return token

    def _kept(self, token: int) -> int:
        """The token, or the first one of the way out where it would lead too far from every end."""
        self._left -= 1
        way = self._way
        if way is None and self._left > self._look_at:
            self._since.append(token)
            return token
        new = self._way_after(token)
        if way is not None and (new is None or len(new) > self._left) and len(way) <= self._left + 1:
            self._matcher.rollback(1)
            way = self._shorter(way)
            if not way:  # it may stop here
                self._over = True
                return self._stops[0]
            token, new = way[0], way[1:]
            self._matcher.consume_token(token)
        self._since.append(token)
        if new is None:  # not found: tried again at half of what is left
            self._look_at = self._left // 2
        elif self._look_at > WATCH and len(new) < self._left // 2:  # far from the limit
            self._look_at //= 2
            new = None
        if new and new is way and len(new) >= self._left:  # about to be taken
            new = self._shorter(new)
        self._way = new
        return token

    def _shorter(self, way: list[int]) -> list[int]:
        """A way from here, which may be better than one that was found earlier and still holds."""
        found = self._find()
        return way if found is None or len(found) > len(way) else found

    def _way_after(self, token: int) -> list[int] | None:
        if self._way:
            if self._way[0] == token:
                return self._way[1:]
            # Most tokens lengthen a text and leave the way as it is.
            if self._matcher.validate_tokens([*self._way, self._stops[0]]) == len(self._way) + 1:
                return self._way
        return [] if self._matcher.is_accepting() else self._find([token])

    def _find(self, then: Sequence[int] = ()) -> list[int] | None:
        if self._endings is None:
            examples = examples_of(self._tokenizer, self._patterns)
            self._endings = Endings(self._tokenizer, self._grammar, examples)
        self._endings.follow(self._since)
        self._since.clear()
        way = self._endings.find(then, most=LONGEST * self._left)
        if way is None or self._matcher.validate_tokens([*way, self._stops[0]]) < len(way) + 1:
            return None
        return way


class AnswerOrCalls:
    """One answer of a form, or calls of tools: the first token decides."""

    def __init__(self, answer: Guide, calls: Guide, opening: int):
        self._answer, self._calls, self._opening = answer, calls, opening
        self._chosen: Guide | None = None

    def begin(self, limit: int) -> int:
        return (self._chosen or self._answer).begin(limit)

    def forced(self) -> int | None:
        return (self._chosen or self._answer).forced()

    def mask(self) -> np.ndarray | None:
        if self._chosen is not None:
            return self._chosen.mask()
        allowed = self._answer.mask()
        if allowed is not None:
            allowed[self._opening] = True
        return allowed

    def advance(self, token: int) -> int:
        if self._chosen is None:
            self._chosen = self._calls if token == self._opening else self._answer
        return self._chosen.advance(token)


def grammar_for(tokenizer: Tokenizer, response_format: Any, tools: Sequence[dict[str, Any]] = ()) -> Guide:
    """The guide of one answer. tools: declarations of what may be called. Raises UsageError."""
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise UsageError("response formats need llguidance; install it with: pip install llguidance") from None
    kind, what = _read(response_format)
    if kind == "tool_call":
        return _calls(tokenizer, _chosen(tools, what))
    if kind == "regex":
        grammar = LLMatcher.grammar_from_regex(what)
    elif kind == "grammar":
        grammar = LLMatcher.grammar_from_lark(what)
    else:
        try:
            grammar = LLMatcher.grammar_from_json_schema(what, defaults=_BLANKS)  # type: ignore[arg-type]
        except (TypeError, ValueError) as e:
            raise UsageError(f"the JSON schema cannot be used: {_line(e)}") from None
    answer = GrammarGuide(tokenizer, grammar, patterns=_patterns(what) if kind == "schema" else ())
    opening = tokenizer.token_id(CALL_OPEN)
    if not tools or opening is None:
        return answer
    return AnswerOrCalls(answer, _calls(tokenizer, _chosen(tools, None), several=True), opening)


def _calls(tokenizer: Tokenizer, functions: Sequence[Mapping[str, Any]], several: bool = False) -> GrammarGuide:
    from llguidance import LLMatcher

    from .tool_grammar import call_grammar

    grammar = LLMatcher.grammar_from_lark(call_grammar(tokenizer, functions, several))
    return GrammarGuide(tokenizer, grammar, ends=False)


def _read(given: Any) -> tuple[str, Any]:
    """(kind, schema or text or name) of a response format."""
    if hasattr(given, "model_json_schema"):  # a pydantic model
        return "schema", given.model_json_schema()
    if given in ("json", "json_object"):
        return "schema", {"type": "object"}
    if not isinstance(given, Mapping):
        raise UsageError(f"a response format is {_FORMS}, not {given!r:.80}")
    kind = given.get("type")
    if kind == "json_object":
        return "schema", {"type": "object"}
    if kind == "json_schema":
        inner = given.get("json_schema")
        schema = given.get("schema", inner.get("schema") if isinstance(inner, Mapping) else None)
        if not isinstance(schema, Mapping):
            raise UsageError('a response format of type "json_schema" lacks its "schema"')
        return "schema", dict(schema)
    if kind in ("regex", "grammar"):
        if not isinstance(given.get(kind), str):
            raise UsageError(f'a response format of type "{kind}" lacks its "{kind}"')
        return kind, given[kind]
    if kind == "tool_call":
        return "tool_call", given.get("name")
    if kind == "text" or not given:
        raise UsageError(f"a response format is {_FORMS}; leave it out for free text")
    if not any(word in given for word in _WORDS):
        raise UsageError(f"this is no JSON schema: {dict(given)!r:.80}; it has none of {', '.join(_WORDS[:7])}, ...")
    return "schema", dict(given)


def _patterns(schema: Any) -> list[str]:
    """The patterns anywhere in a schema."""
    if isinstance(schema, Mapping):
        own = [schema["pattern"]] if isinstance(schema.get("pattern"), str) else []
        return own + [p for value in schema.values() for p in _patterns(value)]
    return [p for value in schema for p in _patterns(value)] if isinstance(schema, list) else []


def _chosen(tools: Sequence[dict[str, Any]], name: str | None) -> list[dict[str, Any]]:
    functions = [tool.get("function", tool) for tool in tools]
    if name is not None:
        functions = [f for f in functions if f["name"] == name]
    if not functions:
        which = f"tool {name!r}" if name else "tools"
        raise UsageError(f"a tool call is asked for, but the turn has no {which}; give it tools=")
    return functions


def _line(error: Any) -> str:
    """llguidance's message without its state, in one line."""
    text = " ".join(str(error).partition("<state>")[0].split())
    return text if len(text) < 300 else f"{text[:297]}..."
