"""What a reader of a model's turn is told: thoughts, text, tool calls, calls that cannot be read, and how it ended.

Owns the types alone. `turns.py` makes the first four from tokens; `chat.py` passes them on and adds the others.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal


@dataclass(frozen=True)
class Thought:
    """A piece of the model's reasoning. Never empty, never half a character."""

    text: str
    kind: ClassVar[Literal["thought"]] = "thought"


@dataclass(frozen=True)
class Text:
    """A piece of the answer. Never empty, never half a character."""

    text: str
    kind: ClassVar[Literal["text"]] = "text"


@dataclass(frozen=True)
class ToolCall:
    """One complete call.

    arguments: values as the model wrote them, nothing coerced. raw: its text, special tokens by name; the raws of
    a row of calls joined are what the model wrote. id: "" until somebody gives one. notes: how the call differs
    from what the template writes, one line each; none when it renders to exactly `raw`.
    """

    name: str
    arguments: dict[str, Any]
    raw: str
    id: str = ""
    notes: tuple[str, ...] = field(default=())
    kind: ClassVar[Literal["tool_call"]] = "tool_call"


@dataclass(frozen=True)
class Malformed:
    """What was meant as a call and is none: truncated, damaged, or of a tool that was not declared.

    error: one line, fit to be given back to the model.
    """

    raw: str
    error: str
    kind: ClassVar[Literal["malformed"]] = "malformed"


Event = Thought | Text | ToolCall | Malformed


@dataclass(frozen=True)
class Stats:
    """What one turn cost. Token counts are tokens, rates tokens per second, sizes bytes."""

    prompt_tokens: int  # whole prompt of this turn, history included
    cached_tokens: int  # of those, taken from the cache instead of computed
    prompt_tps: float  # computed prompt tokens per second
    generation_tokens: int  # sampled tokens, thought and stop token included
    generation_tps: float
    context_used: int  # positions in the cache now
    context_limit: int | None
    cache_bytes: int
    peak_memory: int  # of the process's MLX allocations since start
    finish_reason: str  # "stop" | "tool_calls" | "length" | "repetition" | "cancelled"
    thought_tokens: int = 0  # of generation_tokens, the thought with its marks


@dataclass(frozen=True)
class Shortened:
    """The context was full: so many of the oldest messages were left out, or told in a summary."""

    messages: int
    summary: str | None = None
    kind: ClassVar[str] = "shortened"


@dataclass(frozen=True)
class Done:
    """The last event of every turn that did not raise."""

    stats: Stats
    reason: str  # same as stats.finish_reason
    kind: ClassVar[str] = "done"


ChatEvent = Event | Shortened | Done
