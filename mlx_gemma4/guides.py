"""What may come next: rules on the tokens of an answer, applied between the model and the sampler.

Owns the protocol `generate_step` follows, and `TurnGuide`, which knows where in a turn the model is: a thought is kept
to its budget and left alone otherwise, a grammar begins with the answer. Leaves grammars to `structured.py` and what a
turn means to `turns.py`.
"""

import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from .errors import UsageError
from .tokenizer import Tokenizer
from .turns import CALL_CLOSE, CALL_OPEN, CHANNEL_CLOSE, CHANNEL_OPEN, LABEL, TurnParser

# Tokens of a thought that the words allow. The published models think for some 500 tokens about an easy question.
LEVELS = {"low": 256, "medium": 1024, "high": 4096}
# A thought that reached its budget may end its sentence within SENTENCE tokens and its character within GRACE; closing
# it takes two more.
SENTENCE, GRACE = 3, 6
# Of the tokens an answer may have, what a thought leaves to an answer of a given form.
ANSWER_SHARE = 4

Thinking = bool | int | str
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Guide(Protocol):
    """Follows the tokens of one answer and says what may come next."""

    def begin(self, limit: int) -> int:
        """So many tokens may come at most, -1: no limit. Told before the first one. Returns how many it needs, as far
        as it knows; raises UsageError when that is more."""
        ...

    def forced(self) -> int | None:
        """The only token that may come next, where a rule says so: it is not sampled."""
        ...

    def mask(self) -> np.ndarray | None:
        """Which tokens may come next: bool [at most V], tokens beyond it may not. None: all of them."""
        ...

    def advance(self, token: int) -> int:
        """Takes note of the token that came. Returns it, or the one to be said in its place."""
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
        whole = tokens == float(thinking)
    except (TypeError, ValueError, OverflowError):
        tokens, whole = -1, False
    if tokens < 0 or not whole:
        raise UsageError(f"thinking is off, on, {', '.join(LEVELS)} or a number of tokens, not {thinking!r}")
    return tokens > 0, tokens or None


def mask_rows(guides: Sequence[Guide | None], width: int) -> np.ndarray:
    """What may come next in each row of a batch: bool [B, width]. None: a row without rules, or one that has ended.

    For loops of one's own over `model(tokens [B, 1])`; `batches.py` has one ready. Each row's `advance` is
    told its own token.
    """
    rows = np.zeros((len(guides), width), bool)
    for row, guide in zip(rows, guides, strict=True):
        if guide is None:
            row[:] = True
        elif (token := guide.forced()) is not None:
            row[token] = True
        elif (allowed := guide.mask()) is None:
            row[:] = True
        else:
            row[: len(allowed)] = allowed[:width]
    return rows


class TurnGuide:
    """One answer: its thoughts within `budget` tokens together, what follows within `grammar`.

    prompt: ids the answer continues, which may end inside a thought. thinks: whether a thought may be opened. A thought
    is closed as the template closes it, with a newline and `<channel|>`, at the end of a sentence or line if one comes
    soon, and never inside a character. It is never longer than budget + GRACE + 2 tokens. Where a grammar waits for its
    turn, a thought also leaves a share of the tokens there are.
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
        ids = tokenizer.token_id
        self._open, self._close = ids(CHANNEL_OPEN), ids(CHANNEL_CLOSE)
        self._call, self._call_end = ids(CALL_OPEN), ids(CALL_CLOSE)
        self._newline = tokenizer.encode("\n", add_special_tokens=False)
        self._budget, self._grammar = budget, grammar
        state = TurnParser.after_prompt(tokenizer, prompt).state
        self._thought = state in ("label", "thought")
        self._may_open = thinks and self._open is not None and self._close is not None
        self._answered = False  # whether the answer has begun
        self._in_call = False  # one that began inside the thought
        self._left = -1
        self._used = 0  # tokens of thought so far
        self._queue: list[int] = []  # what is being forced
        # Of the thought: its beginning as far as it is the label, its last token, bytes its last character lacks.
        self._head = "" if state == "label" else LABEL
        self._last_text, self._missing = "", 0
        # An answer is owed where a grammar describes it.
        self._thinking = self._everything_but({*tokenizer.eos_token_ids, self._call, self._call_end})
        self._exhausted = self._everything_but({self._open})

    def begin(self, limit: int) -> int:
        self._left = limit
        needed = 0 if self._grammar is None else self._grammar.begin(limit)
        if self._grammar is not None and limit >= 0:
            most = max(0, limit - max(needed, limit // ANSWER_SHARE) - GRACE - 3)
            self._budget = most if self._budget is None else min(self._budget, most)
            self._may_open = self._may_open and most > GRACE
            if self._thought and most == 0 and limit < needed + GRACE + 2:
                raise UsageError(f"{limit} tokens do not hold the end of the thought and an answer; raise max_tokens")
        return needed

    def forced(self) -> int | None:
        if not self._queue and self._thought and self._close is not None and self._spent():
            self._queue = [self._close] if self._last_text.endswith("\n") else [*self._newline, self._close]
        if self._queue:
            return self._queue[0]
        return None if self._thought or self._grammar is None else self._grammar.forced()

    def mask(self) -> np.ndarray | None:
        if self._thought:
            return None if self._grammar is None else self._thinking
        exhausted = self._budget is not None and self._used >= self._budget
        if self._grammar is None:
            return self._exhausted if exhausted else None
        allowed = self._grammar.mask()
        if allowed is not None and self._may_open and not self._answered and not exhausted:
            opening = self._open or 0
            allowed = np.pad(allowed, (0, max(0, opening + 1 - len(allowed))))
            allowed[opening] = True
        return allowed

    def advance(self, token: int) -> int:
        self._left -= self._left > 0
        if self._queue:
            self._queue.pop(0)
        if self._in_call:
            self._in_call = token != self._call_end
        elif self._thought:
            self._used += 1
            self._read(token)
            self._thought = token != self._close
            self._in_call = token == self._call
            if not self._thought and self._grammar is not None:
                self._grammar.begin(self._left)
        elif token == self._open and not (self._grammar and self._answered):
            self._thought, self._head, self._last_text, self._missing = True, "", "", 0
        else:
            self._answered = True
            if self._grammar is not None:
                return self._grammar.advance(token)
        return token

    def _spent(self) -> bool:
        """Whether the thought is to be closed now."""
        over = -1 if self._budget is None else self._used - self._budget
        if over < 0 or self._in_call:
            return False
        if over >= GRACE:
            return True
        if self._in_label():
            return False
        return (over >= SENTENCE and not self._missing) or self._last_text.rstrip(" ").endswith(("\n", ".", "!", "?"))

    def _in_label(self) -> bool:
        return self._head != LABEL and LABEL.startswith(self._head)

    def _read(self, token: int) -> None:
        """Takes note of how the thought reads after this token."""
        byte = _BYTE.fullmatch(self._tokenizer.convert_ids_to_tokens(token) or "")
        if byte is None:
            self._last_text, self._missing = self._tokenizer.decode([token]), 0
            if self._in_label():
                self._head += self._last_text
            return
        value = int(byte[1], 16)
        self._last_text = chr(value) if value < 0x80 else ""
        if value < 0xC0:
            self._missing = max(0, self._missing - 1) if value >= 0x80 else 0
        else:
            self._missing = 1 + (value >= 0xE0) + (value >= 0xF0)

    def _everything_but(self, ids: "set[int | None]") -> np.ndarray:
        allowed = np.ones(self._tokenizer.vocab_size, bool)
        allowed[[i for i in ids if i is not None and i < len(allowed)]] = False
        return allowed
