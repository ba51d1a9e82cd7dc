"""Turns: messages to prompt ids, and the ids a model writes to what a reader is told.

Owns Gemma 4's turn grammar on token ids, as one state machine fed one id at a time. Leaves the text of prompts to the
checkpoint's template (`tokenizer.py`), bytes to the detokenizer, the inside of a tool call to `call_grammar.py`, and
when to stop computing to `generation.py`.

A model turn, as the published templates write it and the model answers in it:

    <|turn>model\\n  [<|channel>thought\\n ... \\n<channel|>]  answer  [<|tool_call>call:NAME{..}<tool_call|>]*  <turn|>

After calls the model stops with <|tool_response>. The places where reading it goes wrong:

- the prompt may already contain the opening of the thought (after a tool response), or a whole empty thought
  (thinking off, 12B/26B/31B), or the beginning of a call: `TurnParser.after_prompt` starts in the right state;
- the label `thought\\n` may come in one token or in eight, and is no part of the thought;
- a channel with another label is still not the answer: its text, label included, is a thought;
- `<|channel>` or `<|tool_call>` typed as text, letter by letter, is text: only the special id counts;
- a thought that is never closed stays a thought to the end;
- a call inside a thought is part of the thought, as in the published response_template, unless the turn ends right
  after it: then the model forgot to close the thought (ollama #18307), and it is a call with a note;
- a call token inside a string of a call is text: the call is read again at every place where it could end;
- `call:NAME{..}` without <|tool_call> is a call with a note if it is all that was said in the turn after the thought
  and NAME is declared (vllm #54256); anywhere else it is text.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .call_grammar import CLOSE, NAMES, OPEN, QUOTE, CallError, read, shown
from .declared import declared
from .events import Event, Malformed, Text, Thought, ToolCall
from .tokenizer import Tokenizer

CHANNEL_OPEN, CHANNEL_CLOSE = "<|channel>", "<channel|>"
CALL_OPEN, CALL_CLOSE, STRING = NAMES[OPEN], NAMES[CLOSE], NAMES[QUOTE]
RESPONSE_OPEN, RESPONSE_CLOSE = "<|tool_response>", "<tool_response|>"
TURN_OPEN = "<|turn>"
LABEL = "thought\n"

# A call is read again at each call token in a string. So many, and it counts as damaged: time stays linear.
MOST_INSIDE = 32


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

        parser = TurnParser.after_prompt(tokenizer, prompt, tools)
        for token in generated:
            for event in parser.feed(token): ...
        for event in parser.finish(): ...

    tools: names, or declarations as the template takes them; then a call of anything else is `Malformed`, and what the
    declarations say resolves what text alone cannot. None: any name will do.
    thinking_open: the prompt ended inside a thought, label included.

    state: "text", "label" (right after <|channel>: what was said could still become the label), "thought" or "call".
    stopped: a stop id was fed; whatever follows is ignored.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        thinking_open: bool = False,
        tools: Iterable[str | Mapping[str, Any]] | None = None,
    ):
        ids = tokenizer.token_id
        self._open, self._close = ids(CHANNEL_OPEN), ids(CHANNEL_CLOSE)
        self._marks = {ids(CALL_OPEN): OPEN, ids(CALL_CLOSE): CLOSE, ids(STRING): QUOTE}
        self._marks.pop(None, None)
        # A model that opens a response waits for the tool, whatever generation_config.json says.
        self._response = ids(RESPONSE_OPEN)
        self._stop = frozenset(tokenizer.eos_token_ids) | ({self._response} - {None})
        self._declared = declared(tools)
        self._detokenizer = tokenizer.make_detokenizer()
        self.state = "thought" if thinking_open else "text"
        self.stopped = False
        # Seen but not yet decided: a beginning of the label, the newline before <channel|>, or a call without token.
        self._held = ""
        self._fresh = True  # nothing but white space was said since the turn began or its thought ended
        # The call being read: begun in "text", in a "thought" or "bare", and its text with marks. Where call tokens
        # stand in its strings, all ids after the first of those, and what is wrong if that ended the call.
        self._origin = "text"
        self._body: list[str] = []
        self._inside: list[int] = []
        self._later: list[int] = []
        self._error = ""
        # Calls inside a thought: their text, and what they are should the turn end here.
        self._pending = ""
        self._pending_events: list[Event] = []

    @classmethod
    def after_prompt(
        cls,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        tools: Iterable[str | Mapping[str, Any]] | None = None,
    ) -> "TurnParser":
        """A parser in the state the last turn of `prompt` ends in."""
        parser = cls(tokenizer, tools=tools)
        # The last of these decides; what stands before it, tool results that quote them too, is somebody else's text.
        names = (TURN_OPEN, CHANNEL_OPEN, CHANNEL_CLOSE, CALL_OPEN, CALL_CLOSE, RESPONSE_CLOSE)
        ids = {tokenizer.token_id(name): name for name in names}
        at = next((i for i in reversed(range(len(prompt))) if prompt[i] in ids), None)
        last = TURN_OPEN if at is None else ids[prompt[at]]
        rest = prompt if at is None else prompt[at + 1 :]
        if last in (CHANNEL_OPEN, CALL_OPEN):
            stop, parser._stop = parser._stop, frozenset()
            for token in prompt[at or 0 :]:
                parser.feed(token)
            parser._stop = stop
        else:
            said = tokenizer.decode(rest)
            parser._fresh = not (said.partition("\n")[2] if last == TURN_OPEN else said).strip()
        if parser.state != "call":
            # Only the state matters, not what was said: that is the prompt's text, not the model's.
            parser._say(parser._decoded())
            parser._pending, parser._pending_events = "", []
            if parser.state != "label":
                parser._held = ""
        return parser

    def feed(self, token: int) -> list[Event]:
        """What can be told now that this id is known; often nothing."""
        if self.stopped:
            return []
        if self.state == "call":
            return self._feed_call(token)
        if token in self._stop:
            self.stopped = True
            return self.finish()
        mark = self._marks.get(token)
        if mark == OPEN:
            return self._begin_call()
        if token == self._open or token == self._close:
            events = self._settle(ended=False) + self._end_of_segment(closing=token == self._close)
            self.state = "label" if token == self._open else "text"
            self._fresh = True
            return events
        if mark == CLOSE and self.state == "text":
            events = self._say(self._decoded())
            # It closes nothing, as a <channel|> without a thought does; or a call that just came out of bytes.
            return events + (self._feed_call(token) if self.state == "call" else [])
        self._detokenizer.add_token(token)
        said = self._detokenizer.last_segment
        if self._pending and not said.strip():
            self._pending += said
            return []
        return self._settle(ended=False) + self._say(said)

    def finish(self) -> list[Event]:
        """What was held back; call once after the last id."""
        events: list[Event] = []
        while self.state == "call":
            events += self._end_of_call(None)
        return events + self._settle(ended=self.stopped) + self._end_of_segment(closing=False)

    # Thoughts and text

    def _say(self, text: str) -> list[Event]:
        """Events for newly decoded text, by state."""
        if self.state == "text":
            return self._say_text(text)
        text = self._held + text
        self._held = ""
        if self.state == "label":
            if len(text) < len(LABEL) and LABEL.startswith(text):
                self._held = text
                return []
            self.state = "thought"
            text = text.removeprefix(LABEL)
        # The template puts one newline between a thought and <channel|>; whether this is that one shows later.
        if text.endswith("\n"):
            text, self._held = text[:-1], "\n"
        return _thought(text)

    def _say_text(self, text: str) -> list[Event]:
        events: list[Event] = []
        if self._fresh and self._declared and not self._held:
            words = text.lstrip()
            events += _text(text[: len(text) - len(words)])
            text = words
        if self._fresh and text and self._declared:
            text = self._held + text
            self._held = ""
            beginnings = [f"call:{name}{bracket}" for name in self._declared for bracket in "{("]
            if any(text.startswith(b) for b in beginnings):
                self.state, self._origin, self._body = "call", "bare", [text]
                return events
            if any(b.startswith(text) for b in beginnings):
                self._held = text
                return events
        if text.strip():
            self._fresh = False
        return events + _text(text)

    def _end_of_segment(self, closing: bool) -> list[Event]:
        events = self._flush()
        rest, self._held = self._held, ""
        if self.state == "text":
            return events + _text(rest)
        # The label may lack its newline (`<|channel>thought<channel|>`); any other beginning of it was a thought.
        label = self.state == "label" and rest == LABEL.strip()
        newline = self.state == "thought" and closing
        return events + ([] if label or newline else _thought(rest))

    def _flush(self) -> list[Event]:
        """Says what the detokenizer held back; a call without token that begins in it ends in it."""
        events = self._say(self._decoded())
        while self.state == "call":
            events += self._end_of_call(None)
        return events

    def _decoded(self) -> str:
        """What the detokenizer still held back."""
        self._detokenizer.finalize()
        return self._detokenizer.last_segment

    # Calls

    def _begin_call(self) -> list[Event]:
        if self.state == "label":
            events = self._end_of_segment(closing=False)
            self.state = "thought"
        elif self._pending:
            events, self._pending = [], self._pending + self._decoded()
        else:
            events = self._flush()
            if self.state == "text":
                events += _text(self._held)
                self._held = ""
        self._origin, self.state, self._body = self.state, "call", [OPEN]
        return events

    def _feed_call(self, token: int) -> list[Event]:
        if self._inside:
            self._later.append(token)
        mark = self._marks.get(token)
        if token in self._stop or mark in (OPEN, CLOSE):
            return self._end_of_call(token)
        if mark == QUOTE:
            self._body += (self._decoded(), QUOTE)
        else:
            self._detokenizer.add_token(token)
            self._body.append(self._detokenizer.last_segment)
        return []

    def _end_of_call(self, token: int | None) -> list[Event]:
        """Reads the call at a place where it may end: a call token, a stop id, or (None) the end of the output."""
        self._body.append(self._decoded())
        mark = self._marks.get(token)
        body, later = "".join(self._body), []
        try:
            events = self._read(body, mark == CLOSE)
        except CallError as error:
            if mark and error.open_string and len(self._inside) < MOST_INSIDE:
                if not self._inside:
                    self._error = str(error)
                self._inside.append(len(self._body))
                self._body.append(mark)
                return []
            if self._inside:  # it was none of the string's: the call was damaged before it
                body, mark = "".join(self._body[: self._inside[0]]), self._body[self._inside[0]]
                later, token = self._later, None
                error = CallError(self._error)
            events: list[Event] = [Malformed(shown(body + (CLOSE if mark == CLOSE else "")), str(error))]
            if self._origin == "bare" and mark != CLOSE and token != self._response:
                events = _text(shown(body))  # words about a call
        self._inside, self._later = [], []
        self._fresh, self.state = True, "text"
        if self._origin == "thought":
            self.state = "thought"
            self._pending += shown(body + (CLOSE if mark == CLOSE else ""))
            self._pending_events += events
            events = []
        if mark == OPEN:
            events += self._begin_call()
        for following in later:
            events += self.feed(following)
        if token in self._stop:
            self.stopped = True
            events += self.finish()
        return events

    def _read(self, body: str, closed: bool) -> list[Event]:
        """The calls of a block; their raws together are what was written. Raises CallError."""
        begin, more = (0, ("<|tool_call> missing",)) if self._origin == "bare" else (1, ())
        if not closed:
            more = (*more, "<tool_call|> missing")
        if self._origin == "thought":
            more = (*more, "the thought was not closed before the call")
        events: list[Event] = []
        at = 0
        calls = read(body[begin:], closed, self._declared)
        for name, arguments, end, notes in calls[:-1]:
            events.append(ToolCall(name, arguments, shown(body[at : begin + end]), notes=notes + more))
            at = begin + end
        name, arguments, _, notes = calls[-1]
        events.append(ToolCall(name, arguments, shown(body[at:] + (CLOSE if closed else "")), notes=notes + more))
        return events

    def _settle(self, ended: bool) -> list[Event]:
        """Says what calls inside a thought were, now that it is known whether the turn ended after them."""
        if not self._pending:
            return []
        said, events = self._pending, self._pending_events
        self._pending, self._pending_events = "", []
        if not ended:
            return self._say(said)
        self._held = ""  # the newline before what should have been <channel|>
        return events


def _text(text: str) -> list[Event]:
    return [Text(text)] if text else []


def _thought(text: str) -> list[Event]:
    return [Thought(text)] if text else []
