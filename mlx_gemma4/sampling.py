"""Choosing the next token: settings, the sampler, and processors that change logits before it.

Owns how log-probabilities become a token. Leaves when to sample to `generation.py` and which settings a
checkpoint wishes for to `tokenizer.py`.

Order of the filters: repetition penalty and biases first (logits processors), then temperature, top-k, top-p,
min-p, each on what the one before left, renormalised. That is transformers' order (5.23 `generation/utils.py`
`_get_logits_processor`) and therefore what generation_config.json's numbers mean. mlx-lm's sampler applies
top-p and min-p before the temperature; at temperature 1.0, Gemma 4's default, both agree.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .errors import UsageError

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]

# Colder than this is greedy: float32 could not hold the divided log-probabilities.
COLDEST = 1e-5


@dataclass(frozen=True)
class Sampling:
    """Everything a user may set about how an answer is chosen. Raises UsageError for values outside their
    range."""

    temperature: float = 1.0  # 0: always the most likely token
    top_p: float = 0.95  # smallest set of tokens with this probability together; 1 (or 0): off
    top_k: int = 64  # the k most likely tokens; 0: off
    min_p: float = 0.0  # tokens at least this likely, relative to the most likely one; 0: off
    repetition_penalty: float = 1.0  # divides positive, multiplies negative logits of recent tokens; 1: off
    repetition_context_size: int = 20  # how many recent tokens that looks at
    seed: int | None = None  # None: different every time
    max_tokens: int = -1  # per answer; -1: until the context ends
    suppress_tokens: tuple[int, ...] = ()  # ids never sampled (12B's generation_config.json names two)

    def __post_init__(self):
        _check_sampler(self.temperature, self.top_p, self.min_p, self.top_k, self.seed)
        _check_penalty(self.repetition_penalty, self.repetition_context_size)
        if not _is_int(self.max_tokens) or self.max_tokens < -1 or self.max_tokens == 0:
            raise UsageError(f"max_tokens must be at least 1, or -1 for no limit, not {self.max_tokens!r}")

    @classmethod
    def from_defaults(cls, defaults: dict[str, Any], **overrides: Any) -> "Sampling":
        """From a `Tokenizer.generation_defaults`; overrides that are None are left out.

        As in transformers, do_sample absent or false means greedy, and the numbers beside it are not used.
        """
        values: dict[str, Any] = {k: defaults[k] for k in ("repetition_penalty",) if k in defaults}
        values["suppress_tokens"] = tuple(defaults.get("suppress_tokens") or ())
        if defaults.get("do_sample"):
            # transformers' own defaults where the file is silent: everything off except top_k 50.
            values.update(temperature=1.0, top_p=1.0, top_k=50, min_p=0.0)
            values.update({k: defaults[k] for k in ("temperature", "top_p", "top_k", "min_p") if k in defaults})
        else:
            values["temperature"] = 0.0
        values.update({k: v for k, v in overrides.items() if v is not None})
        return cls(**values)

    def sampler(self) -> "Sampler":
        return make_sampler(self.temperature, self.top_p, self.min_p, self.top_k, self.seed)

    def logits_processors(self) -> list[LogitsProcessor]:
        return make_logits_processors(
            repetition_penalty=self.repetition_penalty,
            repetition_context_size=self.repetition_context_size,
            suppress_tokens=self.suppress_tokens,
        )


class Sampler:
    """Log-probabilities [B, V] to token ids [B]; see `make_sampler`.

    Draws come from a key of its own, split once per call: equal seeds and equal calls give equal tokens, and
    neither `mx.random.seed` nor another sampler changes them.
    """

    def __init__(self, temp: float, top_p: float, min_p: float, top_k: int, seed: int | None):
        _check_sampler(temp, top_p, min_p, top_k, seed)
        self.temp, self.top_p, self.min_p, self.top_k = temp, top_p, min_p, top_k
        self.reseed(seed)

    def reseed(self, seed: int | None) -> None:
        """Starts the sequence of draws over; None takes a seed from the operating system."""
        self.seed = seed
        self._key = mx.random.key(secrets.randbits(63) if seed is None else seed)

    def __call__(self, logprobs: mx.array) -> mx.array:
        if self.temp < COLDEST:
            return mx.argmax(logprobs, axis=-1)
        kept, ids = self._filter(logprobs)
        self._key, key = mx.random.split(self._key)
        drawn = mx.random.categorical(kept, key=key)
        return drawn if ids is None else mx.take_along_axis(ids, drawn[..., None], axis=-1).squeeze(-1)

    def distribution(self, logprobs: mx.array) -> mx.array:
        """The probabilities [B, V] (float32) that a call draws from."""
        if self.temp < COLDEST:
            return (mx.arange(logprobs.shape[-1]) == mx.argmax(logprobs, axis=-1, keepdims=True)).astype(mx.float32)
        kept, ids = self._filter(logprobs)
        p = mx.softmax(kept, axis=-1)
        return p if ids is None else mx.put_along_axis(mx.zeros(logprobs.shape), ids, p, axis=-1)

    def _filter(self, logprobs: mx.array) -> tuple[mx.array, mx.array | None]:
        """(unnormalised log-probabilities [B, n], their ids [B, n] or None for all in order); dropped ones
        are -inf.

        With top_k only k of the V columns are looked at afterwards, so top-p sorts 64 numbers, not 262,144.
        """
        x = logprobs.astype(mx.float32) / self.temp
        ids = None
        vocab = x.shape[-1]
        nucleus = 0 < self.top_p < 1
        if 0 < self.top_k < vocab:
            ids = mx.argpartition(x, kth=vocab - self.top_k, axis=-1)[..., vocab - self.top_k :]
            x = mx.take_along_axis(x, ids, axis=-1)
        if nucleus:
            order = mx.argsort(-x, axis=-1)
            ids = order if ids is None else mx.take_along_axis(ids, order, axis=-1)
            x = mx.take_along_axis(x, order, axis=-1)
            # A token stays while those before it have not reached top_p; the first always stays.
            before = mx.cumsum(mx.softmax(x, axis=-1), axis=-1, inclusive=False)
            x = mx.where(before < self.top_p, x, -mx.inf)
        if self.min_p > 0:
            floor = mx.max(x, axis=-1, keepdims=True) + mx.log(mx.array(self.min_p, mx.float32))
            x = mx.where(x < floor, -mx.inf, x)
        return x, ids


def make_sampler(
    temp: float = 0.0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    top_k: int = 0,
    seed: int | None = None,
) -> Sampler:
    """A function from log-probabilities [B, V] to token ids [B], each row drawn on its own.

    temp: 0 takes the most likely token and ignores the rest; top_p: 0 or 1 is off; min_p and top_k: 0 is off.
    seed: None draws one from the operating system.

    Raises UsageError naming the allowed range.
    """
    return Sampler(temp, top_p, min_p, top_k, seed)


def make_logits_processors(
    repetition_penalty: float | None = None,
    repetition_context_size: int = 20,
    logit_bias: dict[int, float] | None = None,
    suppress_tokens: tuple[int, ...] | list[int] | None = None,
) -> list[LogitsProcessor]:
    """Functions (tokens so far [T] or [B, T], logits [B, V]) -> logits [B, V], to be applied in order.

    repetition_penalty: 1 or None is off. Above 1, logits of the last repetition_context_size tokens are made
    less likely, once however often they occur (arXiv 1909.05858). logit_bias: id -> number added.
    suppress_tokens: ids that get -inf.

    Raises UsageError naming the allowed range.
    """
    _check_penalty(repetition_penalty, repetition_context_size)
    processors: list[LogitsProcessor] = []
    if repetition_penalty is not None and repetition_penalty != 1:
        processors.append(_repetition(repetition_penalty, repetition_context_size))
    if logit_bias:
        ids, values = mx.array(list(logit_bias)), mx.array(list(logit_bias.values()), mx.float32)
        processors.append(lambda _, logits: logits.at[:, ids].add(values.astype(logits.dtype)))
    if suppress_tokens:
        banned = mx.array(list(suppress_tokens))
        processors.append(lambda _, logits: logits.at[:, banned].add(mx.array(-mx.inf, logits.dtype)))
    return processors


def _repetition(penalty: float, context: int) -> LogitsProcessor:
    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        recent = tokens[..., -context:]
        if recent.shape[-1] == 0:
            return logits
        ids = mx.broadcast_to(recent, (logits.shape[0], recent.shape[-1]))
        old = mx.take_along_axis(logits, ids, axis=-1)
        # A token that occurs twice is written twice with the same value.
        return mx.put_along_axis(logits, ids, mx.where(old < 0, old * penalty, old / penalty), axis=-1)

    return process


def _check_sampler(temp: Any, top_p: Any, min_p: Any, top_k: Any, seed: Any) -> None:
    _number("temperature", temp, 0, None)
    _number("top_p", top_p, 0, 1)
    _number("min_p", min_p, 0, 1)
    if not _is_int(top_k) or top_k < 0:
        raise UsageError(f"top_k must be a whole number, 0 (off) or more, not {top_k!r}")
    if seed is not None and (not _is_int(seed) or not 0 <= seed < 2**64):
        raise UsageError(f"seed must be a whole number between 0 and 2**64 - 1, not {seed!r}")


def _check_penalty(penalty: Any, context: Any) -> None:
    if penalty is not None:
        _number("repetition_penalty", penalty, 0, None, above=True)
    if not _is_int(context) or context < 1:
        raise UsageError(f"repetition_context_size must be a whole number, 1 or more, not {context!r}")


def _number(name: str, value: Any, low: float, high: float | None, above: bool = False) -> None:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and value == value and abs(value) != mx.inf
    if not fits or value < low or (above and value == low) or (high is not None and value > high):
        allowed = f"between {low} and {high}" if high is not None else f"{'above' if above else 'at least'} {low}"
        raise UsageError(f"{name} must be a number {allowed}, not {value!r}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
