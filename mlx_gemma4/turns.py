"""Turns: messages to prompt ids, and the ids a model writes to what a reader sees.

Owns Gemma 4's turn grammar on token ids, as one state machine fed one id at a time. Leaves the text of
prompts to the checkpoint's template (`tokenizer.py`), bytes to the detokenizer, and when to stop computing to
`generation.py`.

A model turn, as the published templates write it and the model answers in it:

    <|turn>model\\n  [<|channel>thought\\n ... \\n<channel|>]  answer  <turn|>

and the places where reading it goes wrong:

- the prompt may already contain the opening of the thought (after a tool response), or a whole empty thought
  (thinking off, 12B/26B/31B): `TurnParser.after_prompt` starts in the right state;
- the label `thought\\n` may come in one token or in eight, and is no part of the thought;
- a channel with another label is still not the answer: its text, label included, is a thought;
- `<|channel>` typed as text, letter by letter, is text: only the special id opens a channel;
- a thought that is never closed stays a thought to the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from .tokenizer import Tokenizer

CHANNEL_OPEN, CHANNEL_CLOSE = "<|channel>", "<channel|>"
TURN_OPEN = "<|turn>"
LABEL = "thought\n"


@dataclass(frozen=True)
class Event:
    """A piece of what the model said: kind "thought" or "text"; the text is never empty or half a
    character."""

    kind: str
    text: str


class _State(Enum):
    TEXT = "text"
    LABEL = "label"  # right after <|channel>: what was said so far could still become the label
    THOUGHT = "thought"


def render(
    tokenizer: Tokenizer,
    messages: Sequence[dict[str, Any]],
    thinking: bool,
    tools: Sequence[dict[str, Any]] | None = None,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Prompt ids of a conversation, exactly as the checkpoint's template writes it. Raises TokenizerError."""
    ids = tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=add_generation_prompt, enable_thinking=thinking
    )
    assert isinstance(ids, list)
    return ids


class TurnParser:
    """Reads one model turn.

        parser = TurnParser.after_prompt(tokenizer, prompt)
        for token in generated:
            for event in parser.feed(token): ...
        for event in parser.finish(): ...

    thinking_open: the prompt ended inside a thought, label included.
    stopped: a stop id was fed; whatever follows is ignored.
    """

    def __init__(self, tokenizer: Tokenizer, thinking_open: bool = False):
        self._open = tokenizer.token_id(CHANNEL_OPEN)
        self._close = tokenizer.token_id(CHANNEL_CLOSE)
        self._stop = frozenset(tokenizer.eos_token_ids)
        self._detokenizer = tokenizer.make_detokenizer()
        self._state = _State.THOUGHT if thinking_open else _State.TEXT
        self._held = ""  # seen but not yet decided: a beginning of the label, or the newline before <channel|>
        self.stopped = False

    @classmethod
    def after_prompt(cls, tokenizer: Tokenizer, prompt: Sequence[int]) -> "TurnParser":
        """A parser in the state the last turn of `prompt` ends in."""
        parser = cls(tokenizer)
        turn = tokenizer.token_id(TURN_OPEN)
        begin = next((i + 1 for i in reversed(range(len(prompt))) if prompt[i] == turn), 0)
        # Only the state matters, not what was said: that is the prompt's text, not the model's.
        for token in prompt[begin:]:
            parser._feed(token, stops=frozenset())
        parser._detokenizer.finalize()
        parser._say(parser._detokenizer.last_segment)
        if parser._state is not _State.LABEL:
            parser._held = ""
        return parser

    def feed(self, token: int) -> list[Event]:
        """What can be shown now that this id is known; often nothing."""
        return self._feed(token, self._stop)

    def _feed(self, token: int, stops: frozenset[int]) -> list[Event]:
        if self.stopped:
            return []
        if token in stops:
            self.stopped = True
            return self.finish()
        if token == self._open or token == self._close:
            events = self._end_of_segment(closing=token == self._close)
            self._state = _State.LABEL if token == self._open else _State.TEXT
            return events
        self._detokenizer.add_token(token)
        return self._say(self._detokenizer.last_segment)

    def finish(self) -> list[Event]:
        """What was held back; call once after the last id."""
        return self._end_of_segment(closing=False)

    def _say(self, text: str) -> list[Event]:
        """Events for newly decoded text, by state."""
        if self._state is _State.TEXT:
            return _event(_State.TEXT, text)
        text = self._held + text
        self._held = ""
        if self._state is _State.LABEL:
            if len(text) < len(LABEL) and LABEL.startswith(text):
                self._held = text
                return []
            self._state = _State.THOUGHT
            text = text.removeprefix(LABEL)
        # The template puts one newline between a thought and <channel|>; whether this is that one shows
        # later.
        if text.endswith("\n"):
            text, self._held = text[:-1], "\n"
        return _event(_State.THOUGHT, text)

    def _end_of_segment(self, closing: bool) -> list[Event]:
        self._detokenizer.finalize()
        events = self._say(self._detokenizer.last_segment)
        # The label may lack its newline (`<|channel>thought<channel|>`); any other beginning of it was a
        # thought.
        label = self._state is _State.LABEL and self._held == LABEL.strip()
        newline = self._state is _State.THOUGHT and closing
        rest = "" if label or newline else self._held
        self._held = ""
        return events + _event(_State.THOUGHT, rest)


def _event(state: _State, text: str) -> list[Event]:
    return [Event(state.value, text)] if text else []
