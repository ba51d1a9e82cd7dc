"""Many prompts at once: each row of a batch with its own sampling, rules and end.

Owns the public calls, what may be asked of them, and which rows are under way together. Leaves a row's own state to
`batch_row.py`, computing to `batch_steps.py`, and a conversation to `chat.py`.
"""

import itertools
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import mlx.core as mx

from .batch_row import BatchAnswer, Row
from .batch_steps import Batch
from .errors import ContextError, UsageError
from .events import Event
from .generation import Progress, check_options, token_budget
from .guides import Guide, Thinking, TurnGuide, thinking_budget
from .media.prompt import Prompt
from .sampling import Sampling
from .tokenizer import Tokenizer
from .tool_calls import decode_arguments
from .tools import declarations
from .turns import TurnParser, render

TextPrompt = str | Sequence[int] | mx.array | Prompt | Sequence[Mapping[str, Any]]


def stream_batch(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[TextPrompt],
    *,
    max_tokens: int | Sequence[int] = 256,
    sampling: Sampling | Sequence[Sampling | None] | None = None,
    thinking: Thinking | Sequence[Thinking] = False,
    tools: Sequence[Any] = (),
    response_formats: Any = None,
    batch_size: int = 8,
    prefill_step_size: int = 2048,
    prompt_progress_callback: Progress | None = None,
) -> Generator[tuple[int, Event | BatchAnswer], None, None]:
    """Yields (place in `prompts`, event) as rows speak, in no order among rows; the last of each is its `BatchAnswer`.

    prompts: of text alone; each is text as it stands, ids, or a list of messages for the checkpoint's template.
    max_tokens: per answer, -1 until the context ends. sampling: how tokens are chosen, None greedily; its max_tokens
    counts, too, and where one `Sampling` with a seed is for all, the row at place i draws with seed + i. thinking:
    whether, or how long, the model thinks. tools: what messages tell the model it may call, as `Chat` takes them.
    response_formats: what answers must look like, see `structured.py`. Of max_tokens, sampling, thinking and
    response_formats a list (or tuple) has one for each prompt, anything else is for all.

    batch_size: rows under way at once; the others wait, the longest go first. prefill_step_size: positions read at a
    time, of all rows together. prompt_progress_callback(prompt tokens read, prompt tokens in all) is called between
    chunks; when it returns False, rows without an end get the reason "cancelled". Closing the iterator cancels as well.

    Caches are the model's own kind, `load(..., kv_bits=)`. Compressed ones work; which of a row's positions are codes
    then depends on the other rows' lengths.

    Raises, before anything is computed, UsageError for arguments and forms that cannot be used, ContextError when a
    prompt does not fit, TokenizerError; later Gemma4Error when the first logits are not numbers. What goes wrong in one
    row alone, such as a form that needs more than its tokens, is the "error" of that row.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, not {batch_size}")
    check_options(-1, None, None, prefill_step_size)
    declared = tuple(declarations(tools))
    waiting = _rows(model, tokenizer, prompts, max_tokens, sampling, thinking, declared, response_formats)
    waiting.sort(key=lambda row: -len(row.prompt))
    total, read = sum(len(row.prompt) for row in waiting), 0
    batch = Batch(model, tokenizer.pad_token_id or 0, prefill_step_size)

    def report(done: int) -> bool:
        return prompt_progress_callback is None or prompt_progress_callback(read + done, total) is not False

    while waiting or batch.rows:
        if waiting and batch.takes(batch_size):
            new: list[Row] = []
            while waiting and len(new) + len(batch.rows) < batch_size:
                row = waiting.pop(0)
                if row.begin():
                    new.append(row)
                else:
                    yield row.number, row.answer()
            if new and not batch.admit(new, report):
                for row in [*batch.rows, *new, *waiting]:
                    for event in row.end("cancelled"):
                        yield row.number, event
                    yield row.number, row.answer()
                return
            read += sum(len(row.prompt) for row in new)
        yield from batch.step()


def generate_batch(
    model: Any, tokenizer: Tokenizer, prompts: Sequence[TextPrompt], **options: Any
) -> list[BatchAnswer]:
    """The answers to `prompts`, in their order. Takes and raises what `stream_batch` does.

    >>> form = {"type": "regex", "regex": "yes|no"}
    >>> [answer.text for answer in generate_batch(model, tokenizer, prompts, response_formats=form)]
    """
    events = stream_batch(model, tokenizer, prompts, **options)
    return sorted((e for _, e in events if isinstance(e, BatchAnswer)), key=lambda answer: answer.row)


# What was asked for


def _rows(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[TextPrompt],
    max_tokens: Any,
    sampling: Any,
    thinking: Any,
    tools: Sequence[dict[str, Any]],
    response_formats: Any,
) -> list[Row]:
    """A row for each prompt. Raises what `stream_batch` raises before anything is computed."""
    if isinstance(prompts, str | mx.array | Prompt | Mapping) or any(isinstance(p, int | Mapping) for p in prompts):
        raise UsageError("prompts is a list of prompts, each text, ids or messages; for a single one use [prompt]")
    count = len(prompts)
    limits, thinks = _each("max_tokens", max_tokens, count), _each("thinking", thinking, count)
    samplings, forms = _each("sampling", sampling, count), _each("response_formats", response_formats, count)
    for limit in limits:
        check_options(limit, None, None, 1)
    _check_forms(tokenizer, forms, tools)
    rows = []
    for i, (prompt, limit, given, thought, form) in enumerate(
        zip(prompts, limits, samplings, thinks, forms, strict=True)
    ):
        may_think, budget = thinking_budget(thought)
        settings = given or Sampling(temperature=0.0)
        if given is not None and given.seed is not None and isinstance(sampling, Sampling):
            settings = replace(given, seed=(given.seed + i) % 2**64)
        ids, calls = _ids(tokenizer, prompt, may_think, tools, i)
        try:
            wanted = min((n for n in (limit, settings.max_tokens) if n >= 0), default=-1)
            most = token_budget(model, None, len(ids), wanted)
        except ContextError as error:
            raise ContextError(f"prompt {i}: {error}") from None

        def make_guide(ids=ids, may_think=may_think, budget=budget, form=form) -> Guide | None:
            grammar = None if form is None else _grammar(tokenizer, form, tools)
            return None if grammar is None and budget is None else TurnGuide(tokenizer, ids, may_think, budget, grammar)

        parser = TurnParser.after_prompt(tokenizer, ids, tools or None)
        rows.append(Row(i, ids, most, settings, parser, itertools.count(calls), bool(tools), make_guide))
    return rows


def _each(name: str, given: Any, count: int) -> list[Any]:
    if not isinstance(given, list | tuple):
        return [given] * count
    if len(given) != count:
        raise UsageError(f"{name} has {len(given)} entries for {count} prompts; give one for each, or one for all")
    return list(given)


def _grammar(tokenizer: Tokenizer, form: Any, tools: Sequence[dict[str, Any]]) -> Guide:
    from .structured import grammar_for  # not before a form is asked for

    return grammar_for(tokenizer, form, tools)


def _check_forms(tokenizer: Tokenizer, forms: Sequence[Any], tools: Sequence[dict[str, Any]]) -> None:
    """Raises UsageError for a form that cannot be used; each is looked at once."""
    for i, form in {id(form): (i, form) for i, form in reversed(list(enumerate(forms))) if form is not None}.values():
        try:
            _grammar(tokenizer, form, tools)
        except UsageError as error:
            raise UsageError(f"prompt {i}: {error}") from None


def _ids(
    tokenizer: Tokenizer, prompt: Any, thinks: bool, tools: Sequence[dict[str, Any]], number: int
) -> tuple[list[int], int]:
    """(ids of a prompt, calls that are in it already)."""
    if isinstance(prompt, Prompt):
        if prompt.runs:
            raise UsageError(f"prompt {number} has pictures or sound, and batches are of text; use stream_generate")
        prompt = prompt.ids
    if isinstance(prompt, str):
        return tokenizer.encode(prompt), 0
    if isinstance(prompt, mx.array):
        prompt = prompt.tolist()
    prompt = list(prompt)  # type: ignore[arg-type]
    if prompt and all(isinstance(message, Mapping) for message in prompt):
        parts = [p for m in prompt if isinstance(m.get("content"), list | tuple) for p in m["content"]]
        if any(part.get("type") != "text" for part in parts):
            raise UsageError(f"prompt {number} has more than text, and batches are of text; use Chat for it")
        calls = sum(len(message.get("tool_calls") or ()) for message in prompt)
        return render(tokenizer, decode_arguments(prompt), thinks, tools or None), calls
    if not prompt or not all(isinstance(i, Integral) for i in prompt):
        raise UsageError(f"prompt {number} must be text, messages or at least one token id, not {prompt!r:.60}")
    return [int(i) for i in prompt], 0
