"""A conversation: messages in, typed events out, and one prompt cache kept between turns.

Owns the history and what happens to it when an answer is interrupted. Leaves parsing to `turns.py`, rendering, pictures
and sound to `senses.py`, computing to `generation.py`, and what of a prompt need not be computed again to `reuse.py`.

The prompt of every turn is the whole conversation, rendered afresh by the checkpoint's own template; the
cache only saves time. So nothing that happens to the cache can change what the model reads.
"""

import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx

from .errors import UsageError
from .generation import context_limit, generate_step, prefill, token_budget
from .media.content import Content
from .media.items import MediaSettings
from .media.prompt import Prompt
from .media.store import FeatureStore
from .reuse import PromptMemory, common_prefix
from .sampling import Sampler, Sampling
from .senses import Senses
from .tokenizer import Tokenizer
from .turns import Event, TurnParser

# Called with (prompt tokens computed, prompt tokens to compute); False cancels.
Progress = Callable[[int, int], Any]


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
    finish_reason: str  # "stop" | "length" | "cancelled"


@dataclass(frozen=True)
class Thought:
    """A piece of the model's reasoning. Never empty."""

    text: str
    kind: ClassVar[str] = "thought"


@dataclass(frozen=True)
class Text:
    """A piece of the answer. Never empty, never half a character."""

    text: str
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Done:
    """The last event of every turn that did not raise."""

    stats: Stats
    reason: str  # same as stats.finish_reason
    kind: ClassVar[str] = "done"


ChatEvent = Thought | Text | Done


class Chat:
    """One conversation with one model.

        chat = Chat(model, tokenizer, system="Be terse.")
        for event in chat.stream("Hello"):
            match event:
                case Thought(text): ...
                case Text(text): print(text, end="", flush=True)
                case Done(stats): ...

    system: the system prompt, or None. thinking: asks the template for a thought before each answer.
    sampling: None takes the checkpoint's own settings (generation_config.json).
    kv_bits, kv_key_bits, kv_value_bits, kv_bits_sliding, kv_mode: how the cache keeps what it remembers, for
    `model.make_cache`; None is the model's own. `set_kv` changes them.
    media: how pictures, sound and video become tokens; None leaves it to the model, which must be loaded with its
    towers. features: what the towers made is kept there; None makes a store of this chat's own.

    `thinking`, `sampling` and `senses.settings` may be assigned between turns. `messages` holds the "user" and
    "assistant" messages in the template's form; an assistant's thought is under "reasoning_content", and pictures and
    sounds are `Item`s, so a file may change or go.

    One turn at a time; `cancel` may come from anywhere.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        system: str | None = None,
        thinking: bool = False,
        sampling: Sampling | None = None,
        *,
        kv_bits: float | None = None,
        kv_key_bits: float | None = None,
        kv_value_bits: float | None = None,
        kv_bits_sliding: float | None = None,
        kv_mode: str | None = None,
        prefill_step_size: int = 2048,
        media: MediaSettings | None = None,
        features: FeatureStore | None = None,
    ):
        self.messages: list[dict[str, Any]] = []
        self.system = system
        self.thinking = thinking
        self.sampling = sampling or Sampling.from_defaults(tokenizer.generation_defaults)
        self.stats: Stats | None = None  # of the last turn
        self._model = model
        self._tokenizer = tokenizer
        self.senses = Senses(model, tokenizer, media, features)
        self._prefill_step_size = prefill_step_size
        self._sampler: tuple[Sampling, Sampler] | None = None
        self._cancelled = threading.Event()
        self._busy = threading.Lock()
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
        progress: Progress | None = None,
    ) -> Generator[ChatEvent, None, None]:
        """Answers `message`, one event at a time; the last is `Done`.

        message: text, or text and media in a list of parts, see `media/content.py`. images, audio, videos: sources
        that come before it, as in {"type": "image", "image": source}; a sound's samples as (array, rate).

        progress(done, total) is called before, between and after the prompt's chunks, in tokens that had to
        be computed; False cancels.

        `cancel()`, or closing the iterator, stops within a token. What was said until then stays in the
        history as the answer; if nothing was said, the message is taken back too, so that it can be sent
        again. The same holds when this raises: ContextError when the conversation no longer fits, MediaError when a
        source cannot be read, UsageError when the model cannot take it or another turn is running, TokenizerError when
        there is no template, and whatever the model runs into.
        """
        if not self._busy.acquire(blocking=False):
            raise UsageError("this chat is still answering; cancel() it or wait before the next message")
        try:
            self._cancelled.clear()
            content = self.senses.load(message, images, audio, videos)
            yield from self._turn(content, progress or (lambda done, total: None))
        finally:
            self._busy.release()

    def send(self, message: Content | Sequence[dict[str, Any]], **options: Any) -> str:
        """The whole answer without thoughts; its figures are in `stats`. Takes and raises what `stream` does."""
        return "".join(e.text for e in self.stream(message, **options) if isinstance(e, Text))

    def cancel(self) -> None:
        """Stops the running turn before its next token or prefill chunk. From any thread or a signal
        handler."""
        self._cancelled.set()

    def clear(self) -> None:
        """Forgets messages and cache; keeps the system prompt and the settings. A seed starts over."""
        if self._busy.locked():
            raise UsageError("this chat is still answering; cancel() it before clear()")
        self.messages.clear()
        self.stats = None
        self._sampler = None
        self._memory.forget()

    def set_system(self, system: str | None) -> None:
        """Changes the system prompt from the next turn on. The history stays; the cache starts anew."""
        self.system = system

    def set_kv(self, **options: Any) -> None:
        """Changes what the cache keeps, from the next turn on; the conversation is then read again.

        options: those of `model.make_cache`, None for its default. Raises UsageError, changing nothing, for what it
        refuses or while a turn is running.
        """
        if self._busy.locked():
            raise UsageError("this chat is still answering; cancel() it before its cache is changed")
        given = {name: value for name, value in options.items() if value is not None}
        if given:
            self._model.make_cache(**given)
        self._memory = PromptMemory(lambda: self._model.make_cache(**given))

    @property
    def context_used(self) -> int:
        """Positions the cache holds."""
        return len(self._memory.ids)

    @property
    def context_limit(self) -> int | None:
        return context_limit(self._model)

    @property
    def cache_bytes(self) -> int:
        return self._memory.nbytes

    @property
    def cache_status(self) -> list[str]:
        """What each layer's cache applies, one line each."""
        return self._memory.status()

    def _turn(self, content: Content, progress: Progress) -> Generator[ChatEvent, None, None]:
        sampling = self.sampling
        user = {"role": "user", "content": content}
        system = [{"role": "system", "content": self.system}] if self.system else []
        conversation = [*system, *self.messages, user]
        prompt = self.senses.prompt(conversation, self.thinking)
        budget = token_budget(self._model, None, len(prompt), sampling.max_tokens)
        # History comes back without its thoughts and without whatever else opened an answer, so the next
        # prompt is sure to agree with this one up to the end of the user's turn: there the memory keeps a way
        # back.
        fixed = self.senses.prompt(conversation, self.thinking, add_generation_prompt=False)
        boundary = min(common_prefix(prompt.keys, fixed.keys), len(prompt) - 1)

        self.messages.append(user)
        started = time.perf_counter()
        cached = self._memory.reuse(prompt.keys)
        parser = TurnParser.after_prompt(self._tokenizer, prompt.ids)
        said: list[Event] = []
        count, reason = 0, "cancelled"
        prompt_seconds = generation_seconds = 0.0

        def report(position: int) -> bool:
            if progress(position - cached, len(prompt) - cached) is False:
                self._cancelled.set()
            return not self._cancelled.is_set()

        try:
            with closing(self._compute(prompt, cached, boundary, sampling, report)) as tokens:
                for token in tokens:
                    count += 1
                    if count == 1:
                        prompt_seconds, started = time.perf_counter() - started, time.perf_counter()
                    else:
                        generation_seconds = time.perf_counter() - started
                    events = parser.feed(token)
                    if parser.stopped or count == budget:
                        reason = "stop" if parser.stopped else "length"
                        events += parser.finish()
                    said += events
                    for event in events:
                        yield Thought(event.text) if event.kind == "thought" else Text(event.text)
                    if parser.stopped:
                        break
        finally:
            self._remember(user, said, finished=reason != "cancelled")
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
        )
        yield Done(self.stats, reason)

    def _compute(
        self,
        prompt: Prompt,
        cached: int,
        boundary: int,
        sampling: Sampling,
        report: Callable[[int], bool],
    ) -> Generator[int, None, None]:
        """Generated tokens, while the memory learns what the cache holds. Ends early when `report` says
        False."""
        memory, tokens = self._memory, []
        try:
            going = report(cached)
            media = self.senses.encode(prompt, cached) if going else None
            if going and boundary > cached:
                part, begin = mx.array(prompt.ids[cached:boundary]), cached
                step = self._prefill_step_size
                cached += prefill(self._model, part, memory.cache, step, lambda n: report(begin + n), media)
                memory.hold(prompt.keys)
                media = media and media.after(cached - begin)
                if cached == boundary:
                    memory.mark()
            if self._cancelled.is_set():
                return
            steps = generate_step(
                mx.array(prompt.ids[cached:]),
                self._model,
                max_tokens=sampling.max_tokens,
                sampler=self._sampler_for(sampling),
                logits_processors=sampling.logits_processors(),
                prompt_cache=memory.cache,
                prior_tokens=prompt.ids[:cached],
                media=media,
                prefill_step_size=self._prefill_step_size,
                prompt_progress_callback=lambda n, _: report(cached + n),
            )
            with closing(steps):
                for token, _ in steps:
                    tokens.append(token)
                    yield token
                    if self._cancelled.is_set():
                        return
        except (Exception, KeyboardInterrupt):
            # The step was torn apart, or what the cache holds is the reason (NaN): neither is worth keeping.
            memory.forget()
            raise
        finally:
            memory.hold([*prompt.keys, *tokens])

    def _remember(self, user: dict[str, Any], said: list[Event], finished: bool) -> None:
        """Puts what was said into the history, or takes the question back when there is nothing."""
        if not finished and not said:
            self.messages.pop()
            return
        answer = {"role": "assistant", "content": "".join(e.text for e in said if e.kind == "text")}
        thought = "".join(e.text for e in said if e.kind == "thought")
        self.messages.append(answer | ({"reasoning_content": thought} if thought else {}))

    def _sampler_for(self, sampling: Sampling) -> Sampler:
        """One sampler for as long as the settings stay: a seed fixes the conversation, not each answer
        alone."""
        if self._sampler is None or self._sampler[0] != sampling:
            self._sampler = (sampling, sampling.sampler())
        return self._sampler[1]
