"""Generation: prompt ids in, tokens and text out, one at a time.

Owns chunked prefill, the pipelined decode loop and their cancellation. Leaves the choice of a token to
`sampling.py`, what tokens mean to `turns.py`, and several turns over one cache to `chat.py`.

Names, arguments and response fields are mlx-lm's (0.32 `generate.py`), so its users are at home. What
differs: `max_kv_size` and compression through `kv_bits` are refused instead of half applied (the latter is a
property of the cache), a progress callback that returns False cancels, and the context's end stops generation
with "length".

The pipeline: while the caller looks at token t, the device already computes token t+1. So when
`generate_step` hands out a token, that token has as a rule been fed to the model, and closing the generator
leaves a cache that is whole and holds everything handed out; only the last token before a limit is not fed,
since nothing would follow it. How many positions the cache holds is in the cache, not in the caller's count:
`cache_offset(cache)`.
"""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from . import ple_disk
from .errors import ContextError, Gemma4Error, UsageError
from .media.prompt import Prompt
from .sampling import LogitsProcessor, Sampler

if TYPE_CHECKING:
    from .guides import Guide
    from .models.merging import Media

# Called with (prompt tokens done, prompt tokens in all); False cancels.
Progress = Callable[[int, int], Any]

# MLX keeps freed buffers for reuse; this often they are given back, so that a long answer does not hoard
# them.
CLEAR_EVERY = 256


@dataclass
class GenerationResponse:
    """One step of `stream_generate`; the fields are mlx-lm's."""

    text: str  # what became readable with this token; often "" inside a character or at the end
    token: int  # -1 when cancelled during the prompt
    logprobs: mx.array  # [V], of the distribution before the sampler
    from_draft: bool
    prompt_tokens: int
    prompt_tps: float  # tokens per second
    generation_tokens: int  # the stop token included
    generation_tps: float
    peak_memory: float  # GB (1e9 bytes)
    finish_reason: str | None = None  # last response: "stop", "length" or "cancelled"; before: None


def context_limit(model: Any) -> int | None:
    """Positions the model was made for; None for a model that does not say."""
    return getattr(getattr(model, "text_config", None), "max_position_embeddings", None)


def cache_offset(cache: Sequence[Any]) -> int:
    """Positions the caches hold; Gemma4Error if they disagree (a step was torn apart, start a new cache)."""
    offsets = {int(c.offset) for c in cache if c.offset is not None}
    if len(offsets) > 1:
        raise Gemma4Error("the prompt cache was left in the middle of a step; start a new one with model.make_cache()")
    return offsets.pop() if offsets else 0


def token_budget(model: Any, cache: Sequence[Any] | None, prompt_tokens: int, max_tokens: int = -1) -> int:
    """How many tokens can follow a prompt: `max_tokens` (-1: no wish) bounded by the context; -1 without a
    bound.

    Raises ContextError when the prompt itself does not fit behind what `cache` holds.
    """
    limit = context_limit(model)
    if limit is None:
        return max_tokens
    used = cache_offset(cache or ()) + prompt_tokens
    if used > limit:
        raise ContextError(
            f"the prompt has {used:,} tokens and the context holds {limit:,}; shorten it or start a new conversation"
        )
    # The last token is sampled but not fed, so one more fits than there are free positions.
    free = limit - used + 1
    return free if max_tokens < 0 else min(max_tokens, free)


def prefill(
    model: Any,
    tokens: mx.array,
    cache: list[Any],
    step: int = 2048,
    progress: Callable[[int], Any] | None = None,
    media: "Media | None" = None,
) -> int:
    """Feeds `tokens` [L], or [B, L] for the rows of a batch, to the cache in chunks, without computing logits; returns
    how many positions went in.

    media: what of them are pictures or sound; a chunk may be up to a picture longer than `step` then.

    progress(done) is called after each chunk; when it returns False the rest is left out. Memory for
    activations is bounded by `step`. Nothing of a chunk is computed but what the caches need: logits are
    never asked for.
    """
    done, total = 0, tokens.shape[-1]
    while done < total:
        end = min(done + step, total)
        if media is not None:
            end = min(media.step_end(done, end), total)
        model(mx.atleast_2d(tokens[..., done:end]), cache=cache, **_soft(media, done, end))
        mx.eval([c.state for c in cache])
        mx.clear_cache()
        done = end
        if progress is not None and progress(done) is False:
            break
    return done


def generate_step(
    prompt: mx.array,
    model: Any,
    *,
    max_tokens: int = 256,
    sampler: Callable[[mx.array], mx.array] | None = None,
    logits_processors: list[LogitsProcessor] | None = None,
    prompt_cache: list[Any] | None = None,
    prior_tokens: Sequence[int] = (),
    max_kv_size: int | None = None,
    kv_bits: float | None = None,
    prefill_step_size: int = 2048,
    prompt_progress_callback: Progress | None = None,
    media: "Media | None" = None,
    guide: "Guide | None" = None,
) -> Generator[tuple[int, mx.array], None, None]:
    """Yields (token, logprobs [V]) without end at stop tokens: closing the generator is the caller's part.

    prompt: ids [L], at least one. max_tokens: -1 goes on to the end of the context. sampler:
    log-probabilities [1, V] -> ids [1]; None is greedy. See `make_sampler`. prompt_cache: updated in place;
    None makes one. prior_tokens: what it holds already, which only logits_processors look at (without it they
    would see less of a continued conversation than of the same one computed afresh).
    media: what of the prompt are pictures or sound, from `Senses.encode`. guide: says what may come next; each token
    is then known before the next one is chosen, while the device computes its logits.
    prompt_progress_callback(done, total): before, between and after the prompt's chunks; False ends the generator
    without a token, the cache holding what was done.

    Raises UsageError for arguments out of range, ContextError when the prompt does not fit, Gemma4Error when
    the first logits are not numbers.
    """
    check_options(max_tokens, max_kv_size, kv_bits, prefill_step_size)
    prompt = mx.array(prompt)
    if prompt.ndim != 1 or prompt.size == 0:
        raise UsageError(f"the prompt must be a list of at least one token id, not of shape {list(prompt.shape)}")
    cache: list[Any] = prompt_cache if prompt_cache is not None else model.make_cache(**_asked(kv_bits))
    total = prompt.size
    max_tokens = token_budget(model, cache, total, max_tokens)
    if guide is not None:
        guide.begin(max_tokens)

    progress = prompt_progress_callback or (lambda done, total: None)
    choose = chooser(sampler)
    processors = logits_processors or []
    seen = prompt  # what the processors look at; kept up only for them
    if processors and len(prior_tokens) > 0:
        seen = mx.concatenate([mx.array(list(prior_tokens), prompt.dtype), prompt])

    def forward(tokens: mx.array, **soft: Any) -> mx.array:
        logits = model(tokens[None], cache=cache, **soft)[:, -1, :]
        for process in processors:
            logits = process(seen, logits)
        return logits

    going = True

    def report(done: int) -> bool:
        nonlocal going
        going = progress(done, total) is not False
        return going

    last = total - 1 if media is None else media.last_step(total)
    if report(0):
        prefill(model, prompt[:last], cache, prefill_step_size, report, media)
    if not going:
        return
    logits = forward(prompt[last:], **_soft(media, last, total))
    token, logprobs = choose(logits) if guide is None else guided(logits, guide, choose)
    mx.async_eval(token, logprobs)
    check_numbers(logprobs)
    if not report(total):
        return

    # Foreign samplers and processors may evaluate what they are given, while rows of a table on disk are not there yet.
    lazy = not processors and guide is None and (sampler is None or isinstance(sampler, Sampler))
    n = 1
    while True:
        following: Any = None  # the next logits under a guide, else the next token with its logprobs
        if guide is not None:
            said = int(token.item())  # type: ignore[arg-type]
            if (kept := guide.advance(said)) != said:
                token = mx.array([kept])
        if n != max_tokens:
            if processors:
                seen = mx.concatenate([seen, token])
            with ple_disk.late() if lazy else nullcontext():
                logits = forward(token)
                following = logits if guide is not None else choose(logits)
            mx.async_eval(following)
        yield int(token.item()), logprobs  # type: ignore[arg-type]
        if following is None:
            return
        token, logprobs = following if guide is None else guided(following, guide, choose)
        if n % CLEAR_EVERY == 0:
            mx.clear_cache()
        n += 1


def chooser(sampler: Callable[[mx.array], mx.array] | None) -> Callable[[mx.array], tuple[mx.array, mx.array]]:
    """How a sampler chooses by logits [B, V]: (tokens [B], logprobs [B, V], or [V] for one row). None: the most likely
    one."""
    pick = sampler or (lambda logprobs: mx.argmax(logprobs, axis=-1))

    def choose(logits: mx.array) -> tuple[mx.array, mx.array]:
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return pick(logprobs), logprobs.squeeze(0) if len(logprobs) == 1 else logprobs

    return choose


def check_numbers(first: mx.array) -> None:
    """Raises Gemma4Error when a model's first logits are no numbers."""
    if mx.any(mx.isnan(first)).item():
        raise Gemma4Error("the model's first logits are not numbers (NaN); check the weights with --check")


def guided(
    logits: mx.array, guide: "Guide", choose: Callable[[mx.array], tuple[mx.array, mx.array]]
) -> tuple[mx.array, mx.array]:
    """`choose` among what `guide` allows: (token [1], logprobs [V]); a forced token leaves the probabilities alone.

    Raises Gemma4Error when nothing is allowed.
    """
    if (token := guide.forced()) is not None:
        return mx.array([token]), choose(logits)[1]
    allowed = guide.mask()
    if allowed is None:
        return choose(logits)
    if not allowed.any():
        raise Gemma4Error("the grammar allows no token here; check the schema, and that its tokenizer is the model's")
    width = logits.shape[-1]
    allowed = mx.array(np.pad(allowed[:width], (0, max(0, width - len(allowed)))))
    return choose(mx.where(allowed, logits, -mx.inf))


def stream_generate(
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence[int] | mx.array | Prompt,
    max_tokens: int = 256,
    *,
    seed: int | None = None,
    **kwargs: Any,
) -> Generator[GenerationResponse, None, None]:
    """Yields a `GenerationResponse` per token; the last one has a finish_reason.

    prompt: text (encoded with one <bos>), ids, or a `Prompt` with media from `senses.media_prompt`. Sampling is greedy
    unless a `sampler` is given; the checkpoint's own settings are in `tokenizer.generation_defaults`. seed: restarts a
    sampler made by `make_sampler`; greedy needs none. The other arguments are `generate_step`'s. Stop tokens
    (`tokenizer.eos_token_ids`) leave no text, other special tokens do.

    Raises what `generate_step` raises.
    """
    runs = prompt.runs if isinstance(prompt, Prompt) else ()
    prompt = prompt.ids if isinstance(prompt, Prompt) else prompt
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    ids = ids if isinstance(ids, mx.array) else mx.array(list(ids), mx.int32)
    sampler = kwargs.get("sampler")
    if seed is not None and sampler is not None:
        if not isinstance(sampler, Sampler):
            raise UsageError("seed works with samplers of make_sampler; give your own sampler its seed yourself")
        sampler.reseed(seed)
    budget = token_budget(model, kwargs.get("prompt_cache"), ids.size, max_tokens)
    if runs:
        from .models.merging import encode

        kwargs["media"] = encode(model, runs)

    detokenizer = tokenizer.detokenizer
    token, logprobs, count = -1, mx.zeros((0,)), 0
    prompt_seconds = generation_seconds = 0.0

    def response(finish_reason: str | None) -> GenerationResponse:
        return GenerationResponse(
            text=detokenizer.last_segment,
            token=token,
            logprobs=logprobs,
            from_draft=False,
            prompt_tokens=ids.size,
            prompt_tps=ids.size / prompt_seconds if prompt_seconds else 0.0,
            generation_tokens=count,
            # The first token belongs to the prompt's time.
            generation_tps=(count - 1) / generation_seconds if generation_seconds else 0.0,
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=finish_reason,
        )

    begin = time.perf_counter()
    reason = "cancelled"
    steps = generate_step(ids, model, max_tokens=max_tokens, **kwargs)
    try:
        for token, logprobs in steps:  # noqa: B007 (`response` reads them)
            count += 1
            if count == 1:
                prompt_seconds, begin = time.perf_counter() - begin, time.perf_counter()
            else:
                generation_seconds = time.perf_counter() - begin
            if token in tokenizer.eos_token_ids:
                reason = "stop"
                break
            detokenizer.add_token(token)
            if count == budget:
                reason = "length"
                break
            yield response(None)
    finally:
        steps.close()
    detokenizer.finalize()
    yield response(reason)


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence[int] | mx.array | Prompt,
    verbose: bool = False,
    **kwargs: Any,
) -> str:
    """The whole text of `stream_generate`. verbose: prints it while it comes, and the speeds after it."""
    text, last = "", None
    for last in stream_generate(model, tokenizer, prompt, **kwargs):
        text += last.text
        if verbose:
            print(last.text, end="", flush=True)
    if verbose and last is not None:
        print(
            f"\nprompt {last.prompt_tokens} tokens, {last.prompt_tps:.1f} tokens/s; "
            f"answer {last.generation_tokens} tokens, {last.generation_tps:.1f} tokens/s; "
            f"peak {last.peak_memory:.2f} GB"
        )
    return text


def _soft(media: "Media | None", begin: int, end: int) -> dict[str, Any]:
    """The model's argument for a step over the prompt's positions begin .. end; models of text have none."""
    soft = None if media is None else media.soft(begin, end)
    return {} if soft is None else {"media": soft}


def _asked(kv_bits: float | None) -> dict[str, float]:
    return {} if kv_bits is None else {"kv_bits": kv_bits}


def check_options(max_tokens: int, max_kv_size: int | None, kv_bits: float | None, prefill_step_size: int) -> None:
    """What `generate_step` refuses. Raises UsageError."""
    if max_tokens == 0 or max_tokens < -1:
        raise UsageError(f"max_tokens must be at least 1, or -1 for no limit, not {max_tokens}")
    if prefill_step_size < 1:
        raise UsageError(f"prefill_step_size must be at least 1, not {prefill_step_size}")
    if max_kv_size is not None:
        raise UsageError(
            "max_kv_size is not supported: sliding layers keep only their window anyway, and dropping "
            "positions from global layers changes what the model reads; shorten the prompt instead"
        )
    if kv_bits not in (None, 16):
        raise UsageError(
            f"kv_bits={kv_bits} is a property of the cache: load(..., kv_bits={kv_bits}), or give this call "
            f"prompt_cache=model.make_cache(kv_bits={kv_bits})"
        )
