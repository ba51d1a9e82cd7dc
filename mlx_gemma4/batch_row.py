"""One prompt of a batch: what is chosen for it, what it says, and how it ends.

Owns a row's state between its first token and its answer. Leaves which rows are under way to `batches.py`, computing to
`batch_steps.py`, and what tokens mean to `turns.py`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from .errors import Gemma4Error
from .events import Event, Malformed, Text, Thought, ToolCall
from .generation import chooser, guided
from .guides import Guide
from .sampling import COLDEST, Sampling
from .tool_calls import numbered
from .turns import TurnParser

THINKING = ("label", "thought")  # states of the parser


@dataclass(frozen=True)
class BatchAnswer:
    """What came of one prompt."""

    row: int  # the prompt's place in the list
    text: str  # the answer without thought and calls
    thought: str
    calls: tuple[ToolCall | Malformed, ...]
    tokens: tuple[int, ...]  # everything generated, the stop token included
    reason: str  # "stop" | "tool_calls" | "length" | "cancelled" | "error"
    prompt_tokens: int
    thought_tokens: int  # of `tokens`, the thought with its marks
    error: str | None = None  # in one line; then the rest is what came before it
    kind: ClassVar[str] = "done"


class Row:
    """One prompt and what came of it.

    number: its place among the prompts. limit: tokens it may say, -1: no limit. calls: numbers for the calls it makes.
    declared: whether there are tools. make_guide: called when its turn comes, so that waiting rows hold no grammar.
    """

    def __init__(
        self,
        number: int,
        prompt: list[int],
        limit: int,
        sampling: Sampling,
        parser: TurnParser,
        calls: Iterator[int],
        declared: bool,
        make_guide: Callable[[], Guide | None],
    ):
        self.number, self.prompt = number, prompt
        self.limit = limit
        self.tokens: list[int] = []
        self.last = 0  # the token that came last
        self.reason: str | None = None
        self.error: str | None = None
        self.guide: Guide | None = None
        self.greedy = sampling.temperature < COLDEST
        self.processors = sampling.logits_processors()
        # What the processors look at; kept up only for them.
        self.seen = mx.array(prompt, mx.int32) if self.processors else None
        self._choose = chooser(None if self.greedy else sampling.sampler())
        self._parser, self._calls, self._make_guide = parser, calls, make_guide
        self._declared = declared
        self._said: list[Event] = []
        self._thought = 0

    @property
    def plain(self) -> bool:
        """Whether nothing but the logits decides."""
        return self.greedy and self.guide is None and not self.processors

    def may_go_on(self, coming: int) -> bool:
        """Whether tokens may follow after so many more."""
        most = math.inf if self.limit < 0 else self.limit
        return self.reason is None and len(self.tokens) + coming < most

    def begin(self) -> bool:
        """Whether its rules can be kept; before its prompt is read."""
        try:
            self.guide = self._make_guide()
            if self.guide is not None:
                self.guide.begin(self.limit)
        except Gemma4Error as error:
            self._fail(error)
        return self.reason is None

    def choose(self, logits: mx.array) -> mx.array:
        """The next token [1] by logits [1, V]; any one when that fails."""
        for process in self.processors:
            logits = process(self.seen, logits)  # type: ignore[arg-type]
        if self.guide is None:
            return self._choose(logits)[0]
        try:
            return guided(logits, self.guide, self._choose)[0]
        except Gemma4Error as error:
            self._fail(error)
            return mx.array([0])

    def take(self, token: int) -> list[Event]:
        """What can be told once this token came; `reason` says whether it was the last, `last` what is to be fed."""
        if self.guide is not None:
            try:
                token = self.guide.advance(token)
            except Gemma4Error as error:
                self._fail(error)
                return self.end("error")
        self.last = token
        self.tokens.append(token)
        inside = self._parser.state in THINKING
        events = numbered(self._parser.feed(token), self._calls)
        self._thought += inside or self._parser.state in THINKING
        self._said += events
        if self._parser.stopped:
            return events + self.end("stop")
        return events if self.may_go_on(0) else events + self.end("length")

    def end(self, reason: str) -> list[Event]:
        """Nothing follows. What was held back."""
        events = numbered(self._parser.finish(), self._calls)
        self._said += events
        self.reason = "tool_calls" if reason == "stop" and self._called() else reason
        return events

    def answer(self) -> BatchAnswer:
        said = self._said
        assert self.reason is not None
        return BatchAnswer(
            row=self.number,
            text="".join(e.text for e in said if isinstance(e, Text)),
            thought="".join(e.text for e in said if isinstance(e, Thought)),
            calls=tuple(self._called()),
            tokens=tuple(self.tokens),
            reason=self.reason,
            prompt_tokens=len(self.prompt),
            thought_tokens=self._thought,
            error=self.error,
        )

    def _called(self) -> list[ToolCall | Malformed]:
        # Where no tool was declared, what looks like a broken call was none.
        return [e for e in self._said if isinstance(e, ToolCall) or (self._declared and isinstance(e, Malformed))]

    def _fail(self, error: Gemma4Error) -> None:
        self.reason, self.error = "error", str(error)
