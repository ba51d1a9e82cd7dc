"""How an answer that keeps to a grammar can end soon: a short way from where it is to where it may stop.

Owns the search. llguidance knows what may come next, not what it takes to finish, so the way is searched byte by byte
over a vocabulary of single bytes, where a step costs microseconds. Leaves when to take it to `structured.py`.

A walk closes what is open where it may, and goes where it has been least otherwise, so that it leaves every loop.
Positions that allow the same next bytes, behind the same words, count as one. What nests without end it may fail to
leave, so further walks try their luck. The way is short, not the shortest.

What a text must hold somewhere (a pattern without anchors) cannot be felt in what is allowed next: `examples` of it are
tried where a text may not end yet.
"""

import json
import random
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

MOST = 4_000  # bytes after which a walk gives up
WALKS = 6  # the first by rule, the others at random where there is a choice
SHORT, MORE = 64, 3  # after one of at most so many bytes no more are tried, otherwise so many
# Bytes in the order they are tried: ends of things, then short values; then the others.
_FIRST = b'"}])>,:;. 0ntfa<-\n'
_FIRST_IN_TEXT = b'">a0 .,'
_FREE = 60  # so many bytes are allowed in free text, where brackets end nothing
_ENDS = frozenset(b"}])")
_BLANK = frozenset(b" \t\r\n")
# What opens something is tried when the rest was tried so often.
_OPENS, LATE = frozenset(b"{[(\\"), 200


class _Bytes(SimpleNamespace):
    """What llguidance's TokenizerWrapper asks for."""

    def __call__(self, text: bytes) -> list[int]:
        return [self.at + b for b in text]


def byte_vocabulary(tokenizer: "Tokenizer") -> Any:
    """An `LLTokenizer` of special tokens at their own ids and the 256 bytes from `first_byte` on."""
    from llguidance import LLTokenizer, TokenizerWrapper

    at = first_byte(tokenizer)
    tokens = [b""] * at + [bytes([b]) for b in range(256)]
    for i in tokenizer.special_ids:
        tokens[i] = tokenizer.convert_ids_to_tokens(i).encode()
    stops = sorted(tokenizer.eos_token_ids)
    source = _Bytes(at=at, tokens=tokens, special_token_ids=[*tokenizer.special_ids])
    source.eos_token_id, source.bos_token_id = stops[0], None
    return LLTokenizer(TokenizerWrapper(source), eos_token=stops, slices=[])


def first_byte(tokenizer: "Tokenizer") -> int:
    return -(-tokenizer.vocab_size // 32) * 32


class Endings:
    """Ways to the end of one answer. It is told every token, and catches up when it is asked."""

    def __init__(self, tokenizer: "Tokenizer", grammar: str, examples: Sequence[bytes] = ()):
        from llguidance import LLMatcher

        self._vocabulary, self._bytes = tokenizer.constraint_vocabulary, tokenizer.byte_vocabulary
        self._at = first_byte(tokenizer)
        stops = tokenizer.eos_token_ids
        self._specials = np.array([i for i in sorted(tokenizer.special_ids) if i not in stops], np.int64)
        self._matcher = LLMatcher(self._bytes, grammar, log_level=0)
        self._examples = [[self._at + b for b in text] for text in examples]
        self._words = np.zeros((self._bytes.vocab_size + 31) // 32, np.int32)

    def follow(self, tokens: Sequence[int]) -> None:
        """The answer went on by these tokens."""
        for token in tokens:
            self._matcher.consume_tokens(self._spelled(token))

    def find(self, then: Sequence[int] = (), most: int = MOST) -> list[int] | None:
        """Tokens that end the answer after `then`, the stop token not among them; None when no way of at most so many
        bytes was found."""
        root = self._matcher.deep_copy()
        for token in then:
            root.consume_tokens(self._spelled(token))
        best: list[int] | None = None
        for walk in range(WALKS):
            most = min(most, MOST) if best is None else len(best) - 1
            best = self._walk(root.deep_copy(), most, random.Random(walk) if walk else None) or best
            if best is not None and (len(best) <= SHORT or walk >= MORE):
                break
        if best is None:
            return [] if root.is_accepting() else None
        return self._tokens(best)

    def _walk(self, matcher: Any, most: int, rng: random.Random | None) -> list[int] | None:
        """Steps (ids of the byte vocabulary), at most so many, to a position where the answer may stop."""
        way: list[int] = []
        visits: Counter[Any] = Counter()  # of positions, and of steps from one
        leads: dict[tuple[bytes, int], tuple[int, bytes]] = {}  # from a place, by a step: length of the step, to where
        words = b""
        while not matcher.is_error() and len(way) <= most:
            if matcher.is_accepting():
                return way
            place, steps = self._allowed(matcher)
            here = place + words
            if len(steps) >= _FREE and (example := self._example(matcher)):
                matcher.consume_tokens(example)
                way += example
                continue
            step = next((s for s in steps if s - self._at in _ENDS), None) if len(steps) < _FREE else None
            if step is None or visits[here] > MOST // 8:
                choosing = rng is not None and len(steps) < _FREE and rng.random() < 0.5
                step = (
                    rng.choice(steps) if choosing and rng else self._least(matcher, here, words, steps, visits, leads)
                )
            visits[here] += 1
            visits[here, step] += 1
            run = self._take(matcher, step)
            way += [step, *run]
            words = _context(run, words)
        return None

    def _example(self, matcher: Any) -> list[int] | None:
        """An example after which the text may end, where it may not yet."""
        end = self._at + ord('"')
        if not self._examples or matcher.validate_tokens([end]):
            return None
        return next((e for e in self._examples if matcher.validate_tokens([*e, end]) > len(e)), None)

    def _least(
        self,
        matcher: Any,
        here: bytes,
        words: bytes,
        steps: list[int],
        visits: "Counter[Any]",
        leads: dict[tuple[bytes, int], tuple[int, bytes]],
    ) -> int:
        """The step taken least, to where it was least."""
        best = ((len(visits) + MOST * 2, 0, 0), steps[0])
        for step in steps:
            late = LATE if step - self._at in _OPENS else 0
            if (here, step) not in leads:
                following = matcher.deep_copy()
                run = self._take(following, step)
                leads[here, step] = len(run), self._allowed(following)[0] + _context(run, words)
            length, there = leads[here, step]
            best = min(best, ((visits[there] + late, visits[here, step], length), step))
            if best[0] <= (0, 0, 3):  # somewhere new, at once: the others are not looked at
                break
        return best[1]

    @staticmethod
    def _take(matcher: Any, step: int) -> list[int]:
        """Takes the step and what can only follow it; returns the latter."""
        matcher.consume_token(step)
        run = matcher.compute_ff_tokens()
        matcher.consume_tokens(run)
        return run

    def _allowed(self, matcher: Any) -> tuple[bytes, list[int]]:
        """(what makes a position alike to others, steps worth trying) at a position."""
        matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        bytes_ = np.unpackbits(self._words[self._at // 32 :].view(np.uint8), bitorder="little").view(bool)
        words, bits = np.divmod(self._specials, 32)
        specials = self._specials[(self._words[words] >> bits) & 1 != 0]
        values = np.flatnonzero(bytes_).tolist()
        signature = bytes_.tobytes() + specials.tobytes() + bytes([matcher.is_accepting()])
        # Letters beyond ASCII only where nothing else will do.
        plain = [v for v in values if v < 0x80] or values[:1]
        # Between the parts of JSON both blanks may stand; neither has to.
        if bytes_[ord("\n")] and bytes_[ord(" ")]:
            plain = [v for v in plain if v not in _BLANK] or plain
        first = _FIRST if len(values) < _FREE else _FIRST_IN_TEXT
        plain.sort(key=lambda v: len(first) + 1 if v in _BLANK else first.find(v) if v in first else len(first))
        return signature, [*specials.tolist(), *(self._at + v for v in plain)]

    def _spelled(self, token: int) -> list[int]:
        if self._vocabulary.is_special_token(token):
            return [token]
        return [self._at + b for b in self._vocabulary.decode_bytes([token])]

    def _tokens(self, way: Sequence[int]) -> list[int]:
        """The vocabulary's tokens for these steps."""
        out: list[int] = []
        text = bytearray()
        for step in [*way, None]:
            if step is not None and step >= self._at:
                text.append(step - self._at)
                continue
            out += self._vocabulary.tokenize_bytes(bytes(text)) if text else []
            text.clear()
            out += [] if step is None else [step]
        return out


def _context(run: Sequence[int], words: bytes) -> bytes:
    """What a position stands behind: the last words that had no alternative, such as a key."""
    return bytes(step % 256 for step in run) if len(run) > 1 else words


def examples_of(tokenizer: "Tokenizer", patterns: Sequence[str]) -> list[bytes]:
    """For each pattern that is searched for a text that holds it, as JSON writes it."""
    from llguidance import LLMatcher

    found = []
    for pattern in patterns:
        inner = pattern.removeprefix("^").removesuffix("$")
        way = Endings(tokenizer, LLMatcher.grammar_from_regex(inner)).find()
        if way:
            found.append(json.dumps(tokenizer.decode(way), ensure_ascii=False)[1:-1].encode())
    return found
