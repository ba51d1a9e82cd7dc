"""Room in a full context: which messages go, and what is kept of them.

Owns the two ways to shorten a conversation. Leaves the history to `chat.py`, which says what fits and asks the model
for a summary.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from .errors import ContextError
from .media.content import text_of

Message = dict[str, Any]
OnFull = Literal["stop", "drop", "summarize"]
ON_FULL: tuple[OnFull, ...] = ("stop", "drop", "summarize")

# What a conversation that was shortened leaves free for the answer, at most; less in small contexts.
ROOM = 1024

SUMMARIZE = (
    "Summarize our conversation so far for yourself. Keep names, numbers, decisions and open questions; leave out "
    "greetings. At most 200 words, no preamble."
)
_KEPT = "(Earlier in this conversation: {})\n\n"


def drop_oldest(
    messages: Sequence[Message], fits: Callable[[Sequence[Message]], bool], all_may_go: bool = False
) -> list[Message]:
    """The longest end of `messages` that fits, beginning with a user's message; empty if `all_may_go` and it must.

    Raises ContextError when not even the least that must stay fits.
    """
    starts = [i for i, m in enumerate(messages) if m["role"] == "user"]
    starts = starts[1:] if starts[:1] == [0] else starts
    for start in [*starts, len(messages)] if all_may_go else starts:
        if fits(messages[start:]):
            return list(messages[start:])
    raise ContextError("the last message alone does not fit into the context; send a shorter one")


def with_summary(kept: Sequence[Message], summary: str) -> list[Message]:
    """`kept` with `summary` in front of its first message, a user's."""
    first, *rest = kept
    told = _KEPT.format(" ".join(summary.split()))
    content = first["content"]
    content = told + content if isinstance(content, str) else [{"type": "text", "text": told}, *content]
    return [first | {"content": content}, *rest]


def as_text(messages: Sequence[Message], fits: Callable[[str], bool]) -> str:
    """A conversation as one text, media by name; its beginning is left out as far as it must be to fit."""
    names = {"user": "User", "assistant": "You", "tool": "Tool"}
    told = "\n\n".join(f"{names.get(m['role'], m['role'])}: {text_of(m.get('content') or '')}" for m in messages)
    while not fits(told):
        told = told[len(told) // 8 + 1 :]
    return told
