"""What may come next: rules on the tokens of an answer, applied between the model and the sampler.

Owns the protocol `generate_step` follows, and `TurnGuide`, which knows where in a turn the model is: a thought is kept
to its budget and left alone otherwise, a grammar begins with the answer. Leaves grammars to `structured.py` and what a
turn means to `turns.py`.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from .errors import UsageError
from .tokenizer import Tokenizer
from .turns import CHANNEL_CLOSE, CHANNEL_OPEN, TurnParser

# Tokens of a thought that the words allow. The published models think for some 500 tokens about an easy question.
LEVELS = {"low": 256, "medium": 1024, "high": 4096}
# A thought that reached its budget may end its sentence or line within so many tokens; closing it takes two more.
GRACE = 6

Thinking = bool | int | str


class Guide(Protocol):
    """Follows the tokens of one answer and says what may come next."""

    def forced(self) -> int | None:
        """The only token that may come next, where a rule says so: it is not sampled."""
        ...

    def mask(self) -> np.ndarray | None:
        """Which tokens may come next: bool [at most V], tokens beyond it may not. None: all of them."""
        ...

    def advance(self, token: int) -> None:
        """Takes note of the token that came."""
        ...


def thinking_budget(thinking: Thinking) -> tuple[bool, int | None]:
    """(whether the model is to think, tokens it may think for or None without a limit).

    thinking: False or "off", True or "on", one of `LEVELS`, or a number of tokens (also as text); 0 is off.
    Raises UsageError for anything else.
    """
    if isinstance(thinking, bool) or thinking in ("on", "off"):
        return thinking in (True, "on"), None
    if isinstance(thinking, str) and thinking in LEVELS:
        return True, LEVELS[thinking]
    try:
        tokens = int(thinking)
    except ValueError:
        tokens = -1
    if tokens < 0 or tokens != float(thinking):
        raise UsageError(f"thinking is off, on, {', '.join(LEVELS)} or a number of tokens, not {thinking!r}")
    return tokens > 0, tokens or None


class TurnGuide:
    """One answer: its thought within `budget` tokens, what follows within `grammar`.

    prompt: ids the answer continues, which may end inside a thought. thinks: whether a thought may be opened. The
    thought is closed as the template closes it, with a newline and `<channel|>`, at the end of a sentence or line if
    one comes within GRACE tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        thinks: bool,
        budget: int | None = None,
        grammar: Guide | None = None,
    ):
        self._tokenizer = tokenizer
        self._open, self._close = tokenizer.token_id(CHANNEL_OPEN), tokenizer.token_id(CHANNEL_CLOSE)
        newline = tokenizer.encode("\n", add_special_tokens=False)
        self._closing = [*newline, self._close]
        self._stops = frozenset(tokenizer.eos_token_ids)
        self._size = tokenizer.vocab_size
        self._budget, self._grammar = budget, grammar
        self._thought = TurnParser.after_prompt(tokenizer, prompt).state in ("label", "thought")
        self._may_open = thinks and self._open is not None and self._close is not None
        self._answered = False  # whether the answer has begun
        self._used = 0  # tokens of thought so far
        self._queue: list[int] = []  # what is being forced
        self._last_text = ""

    def forced(self) -> int | None:
        if not self._queue and self._thought and self._spent():
            at_line_end = self._last_text.endswith("\n")
            self._queue = [t for t in (self._closing[-1:] if at_line_end else self._closing) if t is not None]
        return self._queue[0] if self._queue else None

    def mask(self) -> np.ndarray | None:
        if self._thought:
            # An answer is owed where a grammar describes it.
            return None if self._grammar is None else self._everything_but(self._stops)
        if self._grammar is None:
            exhausted = self._budget is not None and self._used >= self._budget
            return self._everything_but({self._open}) if exhausted and self._open is not None else None
        allowed = self._grammar.mask()
        if allowed is not None and self._may_open and not self._answered and self._open is not None:
            allowed = np.pad(allowed, (0, max(0, self._open + 1 - len(allowed))))
            allowed[self._open] = True
        return allowed

    def advance(self, token: int) -> None:
        if self._queue:
            self._queue.pop(0)
        if self._thought:
            self._used += 1
            self._last_text = self._tokenizer.decode([token])
            self._thought = token != self._close
        elif token == self._open and not (self._grammar and self._answered):
            self._thought, self._last_text = True, ""
        else:
            self._answered = True
            if self._grammar is not None:
                self._grammar.advance(token)

    def _spent(self) -> bool:
        """Whether the thought is to be closed now."""
        if self._budget is None or self._used < self._budget:
            return False
        return self._used >= self._budget + GRACE or self._last_text.rstrip(" ").endswith(("\n", ".", "!", "?"))

    def _everything_but(self, ids: "set[int] | frozenset[int]") -> np.ndarray:
        allowed = np.ones(self._size, bool)
        allowed[[i for i in ids if i < self._size]] = False
        return allowed
