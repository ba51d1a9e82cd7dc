"""A conversation: messages in, typed events out, and one prompt cache kept between turns.

Owns the history and what happens to it when an answer is interrupted. Leaves parsing to `turns.py`, rendering, pictures
and sound to `senses.py`, rules on what may be said to `guides.py`, computing to `generation.py`, what of a prompt need
not be computed again to `reuse.py`, and files to `session_file.py`.

The prompt of every turn is the whole conversation, rendered afresh by the checkpoint's own template; the
cache only saves time. So nothing that happens to the cache can change what the model reads.
"""

import itertools
import os
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.core as mx

from . import reuse, room, session_file
from .answering import answer_tokens
from .errors import ContextError, UsageError
from .events import ChatEvent, Done, Malformed, Shortened, Stats, Text, Thought, ToolCall
from .generation import context_limit, token_budget
from .guards import RepetitionGuard
from .guides import Guide, Thinking, TurnGuide, thinking_budget
from .media.content import Content
from .media.items import MediaSettings
from .media.prompt import Prompt
from .media.store import FeatureStore
from .reuse import PromptMemory, common_prefix
from .sampling import Sampler, Sampling
from .senses import Senses
from .tokenizer import Tokenizer
from .tool_calls import as_call, call_message, numbered, result_message, unanswered
from .tools import declarations
from .turns import TurnParser

Progress = Callable[[int, int], Any]  # called with (prompt tokens computed, prompt tokens to compute); False cancels
Message = dict[str, Any]

# A system prompt of so many tokens gets a way back of its own: it outlives edits, /clear and forks.
LONG_HEAD = 64
THINKING = ("label", "thought")  # states of the parser


@dataclass(frozen=True)
class _Request:
    """What one turn asks of the model, beside the messages."""

    sampling: Sampling
    thinks: bool
    budget: int | None  # of the thought
    tools: tuple[Message, ...]  # declarations
    response_format: Any
    progress: Progress


class Chat:
    """One conversation with one model.

        chat = Chat(model, tokenizer, system="Be terse.")
        for event in chat.stream("Hello"):
            match event:
                case Thought(text): ...
                case Text(text): print(text, end="", flush=True)
                case ToolCall(name, arguments): ...     # answered with `stream_results`
                case Done(stats): ...

    system: the system prompt, or None. thinking: whether, or how long, the model thinks before each answer: False,
    True, "low", "medium", "high" or a number of tokens (`guides.thinking_budget`). sampling: None takes the
    checkpoint's own settings (generation_config.json). tools: what the model may call: functions, JSON declarations
    or `tools.Tool`s. kv_bits, kv_key_bits, kv_value_bits, kv_bits_sliding, kv_mode: how the cache keeps what it
    remembers, for `model.make_cache`; None is the model's own. `set_kv` changes them. snapshot_bytes: what ways back
    may take beside it, see `reuse.py`. media: how pictures, sound and video become tokens; None leaves it to the
    model, which must be loaded with its towers. features: what the towers made is kept there; None makes a store of
    this chat's own. on_full: when the conversation no longer fits: "stop" raises ContextError, "drop" leaves out the
    oldest turns, "summarize" has the model sum them up first. loop_guard: stops an answer that repeats itself without
    end.

    `thinking`, `sampling`, `tools`, `on_full` and `senses.settings` may be assigned between turns. `messages` holds the
    "user", "assistant" and "tool" messages in the template's form; an assistant's thought is under "reasoning_content",
    and pictures and sounds are `Item`s, so a file may change or go.

    One turn at a time; `cancel` may come from anywhere. `Engine` serves several threads.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        system: str | None = None,
        thinking: Thinking = False,
        sampling: Sampling | None = None,
        *,
        tools: Sequence[Any] = (),
        kv_bits: float | None = None,
        kv_key_bits: float | None = None,
        kv_value_bits: float | None = None,
        kv_bits_sliding: float | None = None,
        kv_mode: str | None = None,
        snapshot_bytes: int = reuse.DEFAULT_BYTES,
        prefill_step_size: int = 2048,
        media: MediaSettings | None = None,
        features: FeatureStore | None = None,
        on_full: room.OnFull = "stop",
        loop_guard: bool = True,
    ):
        self.messages: list[Message] = []
        self.system = system
        self.thinking = thinking
        self.tools = tuple(tools)
        self.on_full: room.OnFull = on_full
        self.loop_guard = loop_guard
        self.sampling = sampling or Sampling.from_defaults(tokenizer.generation_defaults)
        self.stats: Stats | None = None  # of the last turn
        self._model = model
        self._tokenizer = tokenizer
        self.senses = Senses(model, tokenizer, media, features)
        self._prefill_step_size = prefill_step_size
        self._snapshot_bytes = snapshot_bytes
        self._sampler: tuple[Sampling, Sampler] | None = None
        self._cancelled = threading.Event()
        self._busy = threading.Lock()
        self._helper: Chat | None = None  # sums up what no longer fits
        thinking_budget(thinking)
        self.set_kv(
            kv_bits=kv_bits,
            kv_key_bits=kv_key_bits,
            kv_value_bits=kv_value_bits,
            kv_bits_sliding=kv_bits_sliding,
            kv_mode=kv_mode,
        )

    def stream(
        self,
        message: Content | Sequence[dict[str, Any]],
        *,
        images: Sequence[Any] = (),
        audio: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        thinking: Thinking | None = None,
        tools: Sequence[Any] | None = None,
        response_format: Any = None,
        progress: Progress | None = None,
    ) -> Generator[ChatEvent, None, None]:
        """Answers `message`, one event at a time; the last is `Done`.

        message: text, or text and media in a list of parts, see `media/content.py`. images, audio, videos: sources
        that come before it, as in {"type": "image", "image": source}; samples or frames in an array as `items.Rated`.
        thinking, tools: for this turn, instead of the chat's own. response_format: what the answer must look like, see
        `structured.py`; a thought before it is free.

        progress(done, total) is called before, between and after the prompt's chunks, in tokens that had to
        be computed; False cancels.

        `cancel()`, or closing the iterator, stops within a token. What was said until then stays in the
        history as the answer; if nothing was said, the message is taken back too, so that it can be sent
        again. The same holds when this raises: ContextError when the conversation no longer fits, MediaError when a
        source cannot be read, UsageError when the model cannot take it or another turn is running, TokenizerError when
        there is no template, and whatever the model runs into.
        """

        def load() -> list[Message]:
            content = self.senses.load(message, images, audio, videos)
            return [*unanswered(self.messages), {"role": "user", "content": content}]

        yield from self._locked(load, thinking, tools, response_format, progress)

    def stream_results(
        self,
        results: Sequence[tuple[ToolCall | Malformed, Any]],
        *,
        thinking: Thinking | None = None,
        tools: Sequence[Any] | None = None,
        response_format: Any = None,
        progress: Progress | None = None,
    ) -> Generator[ChatEvent, None, None]:
        """Goes on after calls, given what each returned: text, a JSON value, or parts with pictures. Otherwise as
        `stream`.

        A call that could not be read (`Malformed`) is answered, too, best with its `error`, so that the model may try
        again. Without results, the history is answered as it stands.
        """

        def load() -> list[Message]:
            told = [result_message(as_call(call), result) for call, result in results]
            load = self.senses.load  # results may hold pictures, too
            return [m | {"content": load(m["content"])} if isinstance(m["content"], list) else m for m in told]

        yield from self._locked(load, thinking, tools, response_format, progress)

    def send(self, message: Content | Sequence[dict[str, Any]], **options: Any) -> str:
        """The whole answer without thoughts; its figures are in `stats`. Takes and raises what `stream` does."""
        return "".join(e.text for e in self.stream(message, **options) if isinstance(e, Text))

    def cancel(self) -> None:
        """Stops the running turn before its next token or prefill chunk. From any thread or a signal
        handler."""
        self._cancelled.set()
        if self._helper is not None:
            self._helper.cancel()

    def clear(self) -> None:
        """Forgets messages and cache; keeps the system prompt and the settings. A seed starts over."""
        self._check_idle("clear()")
        self.messages.clear()
        self.stats = None
        self._sampler = None
        self._memory.forget()

    def set_system(self, system: str | None) -> None:
        """Changes the system prompt from the next turn on; the history stays and is read again."""
        self.system = system

    def set_kv(self, **options: Any) -> None:
        """Changes what the cache keeps, from the next turn on; the conversation is then read again.

        options: those of `model.make_cache`, None for its default. Raises UsageError, changing nothing, for what it
        refuses or while a turn is running.
        """
        self._check_idle("its cache is changed")
        given = {name: value for name, value in options.items() if value is not None}
        if given:
            self._model.make_cache(**given)
        self._kv = given
        model = self._model  # not the chat itself, which would then wait for the garbage collector
        self._memory = PromptMemory(lambda: model.make_cache(**given), self._snapshot_bytes)

    def make_room(self, how: room.OnFull) -> Shortened:
        """Shortens the history to half the context: "drop" leaves out the oldest turns, "summarize" tells them first.

        Raises ContextError when the last message alone is too long, UsageError for "stop" or while a turn is running.
        """
        self._check_idle("its history is shortened")
        if how not in room.ON_FULL[1:]:
            raise UsageError(f"a conversation is shortened by {' or '.join(room.ON_FULL[1:])}, not {how!r}")
        limit = self.context_limit
        return self._shorten(how, lambda kept: limit is None or len(self._prompt(kept, False, ())) <= limit // 2)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the conversation and its cache to `path` (.safetensors). Raises UsageError, Gemma4Error."""
        self._check_idle("save()")
        kept = {"system": self.system, "thinking": self.thinking, "sampling": asdict(self.sampling), "kv": self._kv}
        session_file.save(path, self._model, self._memory, self.messages, kept)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any, tokenizer: Tokenizer, **options: Any) -> "Chat":
        """A conversation that `save` wrote, ready to go on without reading it again.

        options: of `Chat`; what is not given is as it was. Raises Gemma4Error when the file is none, or of other
        weights or cache settings.
        """
        _, kept = session_file.load(path, model, None)
        kept["sampling"] = Sampling(**kept["sampling"])
        chat = cls(model, tokenizer, **(kept | kept.pop("kv") | options))
        chat.messages, _ = session_file.load(path, model, chat._memory)
        return chat

    def fork(self) -> "Chat":
        """A chat that goes on from here on its own; nothing is computed again and memory is shared until it changes."""
        self._check_idle("fork()")
        other = Chat(
            self._model,
            self._tokenizer,
            self.system,
            self.thinking,
            self.sampling,
            tools=self.tools,
            snapshot_bytes=self._snapshot_bytes,
            prefill_step_size=self._prefill_step_size,
            media=self.senses.settings,
            features=self.senses.store,
            on_full=self.on_full,
            loop_guard=self.loop_guard,
            **self._kv,
        )
        other.messages = list(self.messages)
        other._memory = self._memory.copy()
        return other

    @property
    def context_used(self) -> int:  # positions the cache holds
        return len(self._memory.ids)

    @property
    def context_limit(self) -> int | None:
        return context_limit(self._model)

    @property
    def cache_bytes(self) -> int:
        return self._memory.nbytes

    @property
    def snapshot_bytes(self) -> int:  # what the ways back take beside the cache
        return self._memory.mark_bytes

    @property
    def cache_status(self) -> list[str]:  # one line per kind
        return self._memory.status()

    def _locked(
        self,
        load: Callable[[], list[Message]],
        thinking: Thinking | None,
        tools: Sequence[Any] | None,
        response_format: Any,
        progress: Progress | None,
    ) -> Generator[ChatEvent, None, None]:
        """A turn that begins with the messages `load` makes, alone on this chat."""
        if not self._busy.acquire(blocking=False):
            raise UsageError("this chat is still answering; cancel() it or wait before the next message")
        try:
            self._cancelled.clear()
            thinks, budget = thinking_budget(self.thinking if thinking is None else thinking)
            request = _Request(
                self.sampling,
                thinks,
                budget,
                tuple(declarations(self.tools if tools is None else tools)),
                response_format,
                progress or (lambda done, total: None),
            )
            yield from self._turn(load(), request)
        finally:
            self._busy.release()

    def _turn(self, new: list[Message], request: _Request) -> Generator[ChatEvent, None, None]:
        prompt, shortened = self._fitted(new, request)
        if shortened is not None:
            yield shortened
        budget = token_budget(self._model, None, len(prompt), request.sampling.max_tokens)
        boundaries = self._boundaries(prompt, new, request)
        guide = self._guide(prompt, request)
        parser = TurnParser.after_prompt(self._tokenizer, prompt.ids, request.tools or None)

        before = len(self.messages)
        self.messages += new
        started = time.perf_counter()
        cached = self._memory.reuse(prompt.keys)
        guard = RepetitionGuard() if self.loop_guard else None
        calls = itertools.count(sum(len(m.get("tool_calls", ())) for m in self.messages))
        said: list[Any] = []
        # Where no tool was declared, what looks like a broken call was none.
        meant = ToolCall | Malformed if request.tools else ToolCall
        count, thought, reason = 0, 0, "cancelled"
        prompt_seconds = generation_seconds = 0.0

        def report(position: int) -> bool:
            if request.progress(position - cached, len(prompt) - cached) is False:
                self._cancelled.set()
            return not self._cancelled.is_set()

        steps = answer_tokens(
            self._model,
            prompt,
            self._memory,
            self.senses,
            cached=cached,
            boundaries=boundaries,
            going=lambda: not self._cancelled.is_set(),
            report=report,
            step=self._prefill_step_size,
            max_tokens=request.sampling.max_tokens,
            sampler=self._sampler_for(request.sampling),
            logits_processors=request.sampling.logits_processors(),
            guide=guide,
        )
        try:
            with closing(steps) as tokens:
                for token in tokens:
                    count += 1
                    if count == 1:
                        prompt_seconds, started = time.perf_counter() - started, time.perf_counter()
                    else:
                        generation_seconds = time.perf_counter() - started
                    inside = parser.state in THINKING
                    events = numbered(parser.feed(token), calls)
                    thought += inside or parser.state in THINKING
                    if parser.stopped:
                        reason = "stop"
                    elif count == budget:
                        reason = "length"
                    elif guard is not None and guard.stuck(token):
                        reason = "repetition"
                    if reason != "cancelled":
                        events += numbered(parser.finish(), calls)
                    said += events
                    if reason == "stop" and any(isinstance(e, meant) for e in said):
                        reason = "tool_calls"
                    yield from events
                    if reason != "cancelled":
                        break
        finally:
            self._remember(before, said, meant, finished=reason != "cancelled")
        self.stats = Stats(
            prompt_tokens=len(prompt),
            cached_tokens=cached,
            prompt_tps=(len(prompt) - cached) / prompt_seconds if prompt_seconds else 0.0,
            generation_tokens=count,
            generation_tps=(count - 1) / generation_seconds if generation_seconds else 0.0,
            context_used=self.context_used,
            context_limit=self.context_limit,
            cache_bytes=self.cache_bytes,
            peak_memory=mx.get_peak_memory(),
            finish_reason=reason,
            thought_tokens=thought,
        )
        yield Done(self.stats, reason)

    def _prompt(
        self, messages: Sequence[Message], thinks: bool, tools: Sequence[Message], generation_prompt: bool = True
    ) -> Prompt:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self.senses.prompt([*system, *messages], thinks, tools or None, generation_prompt)

    def _fitted(self, new: list[Message], request: _Request) -> tuple[Prompt, Shortened | None]:
        """The prompt of this turn, after making room if that was asked for. Raises ContextError."""

        def prompt_of(messages: Sequence[Message]) -> Prompt:
            return self._prompt([*messages, *new], request.thinks, request.tools)

        prompt, limit = prompt_of(self.messages), self.context_limit
        if limit is None or self.on_full == "stop" or len(prompt) <= limit - 1:
            token_budget(self._model, None, len(prompt))
            return prompt, None
        most = limit - min(room.ROOM, limit // 4)
        if not self.messages:
            raise ContextError("the message alone does not fit into the context; send a shorter one")
        shortened = self._shorten(self.on_full, lambda kept: len(prompt_of(kept)) <= most, new)
        return prompt_of(self.messages), shortened

    def _shorten(
        self, how: str, fits: Callable[[Sequence[Message]], bool], new: list[Message] | None = None
    ) -> Shortened:
        """new: the messages about to be sent, of which the first is told the summary when nothing else is left."""
        goes_on = bool(new) and new[0]["role"] == "user"
        kept = room.drop_oldest([*self.messages], fits, all_may_go=goes_on)
        gone, summary = self.messages[: len(self.messages) - len(kept)], None
        if how == "summarize":
            limit = self.context_limit or 4096
            asked = replace(self.sampling, max_tokens=min(512, limit // 8))
            helper = Chat(self._model, self._tokenizer, sampling=asked, features=self.senses.store)
            told = room.as_text(gone, lambda text: len(self._tokenizer.encode(text)) <= limit // 2)
            self._helper = helper
            try:
                summary = helper.send(f"{told}\n\n{room.SUMMARIZE}")
            finally:
                self._helper = None
            told_in = kept or new or []
            told_in[:1] = room.with_summary(told_in[:1], summary)
        self.messages[:] = kept
        return Shortened(len(gone), summary)

    def _boundaries(self, prompt: Prompt, new: list[Message], request: _Request) -> list[int]:
        """Positions worth a way back: the end of a long system prompt, and where any answer will begin in the history.

        An answer comes back without its thoughts and without whatever else the template opened it with. The prompt's
        last position is no place for a mark: it is computed for the first token.
        """
        answered = [*self.messages, *new, {"role": "assistant", "content": "?"}]
        fixed = self._prompt(answered, request.thinks, request.tools, False)
        out = {min(common_prefix(prompt.keys, fixed.keys), len(prompt) - 1)}
        if self.system or request.tools:
            other = self._prompt([{"role": "user", "content": "?"}], request.thinks, request.tools, False)
            head = common_prefix(prompt.keys, other.keys)
            out |= {head} if head >= LONG_HEAD else set()
        return sorted(out)

    def _guide(self, prompt: Prompt, request: _Request) -> Guide | None:
        grammar = None
        if request.response_format is not None:
            from .structured import grammar_for

            grammar = grammar_for(self._tokenizer, request.response_format, request.tools)
        if grammar is None and request.budget is None:
            return None
        return TurnGuide(self._tokenizer, prompt.ids, request.thinks, request.budget, grammar)

    def _remember(self, before: int, said: list[Any], meant: Any, finished: bool) -> None:
        """Puts what was said into the history, or takes the new messages back when there is nothing."""
        if not finished and not said:
            del self.messages[before:]
            return
        calls = [as_call(e) for e in said if isinstance(e, meant)]
        text = "".join(e.text for e in said if isinstance(e, Text))
        thought = "".join(e.text for e in said if isinstance(e, Thought))
        self.messages.append(call_message(calls, text, thought))

    def _sampler_for(self, sampling: Sampling) -> Sampler:
        """One sampler while the settings stay: a seed fixes the conversation, not each answer alone."""
        if self._sampler is None or self._sampler[0] != sampling:
            self._sampler = (sampling, sampling.sampler())
        return self._sampler[1]

    def _check_idle(self, what: str) -> None:
        if self._busy.locked():
            raise UsageError(f"this chat is still answering; cancel() it before {what}")
