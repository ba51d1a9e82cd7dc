"""The tokens of one answer, while a memory learns what the cache holds.

Owns the order of computing: the prompt up to each boundary, with a way back there, then the answer. Leaves chunks and
steps to `generation.py`, what to keep to `reuse.py`, turns to `chat.py`.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any

import mlx.core as mx

from .generation import generate_step, prefill
from .media.prompt import Prompt
from .reuse import PromptMemory
from .senses import Senses


def answer_tokens(
    model: Any,
    prompt: Prompt,
    memory: PromptMemory,
    senses: Senses,
    *,
    cached: int,
    boundaries: Sequence[int],
    going: Callable[[], bool],
    report: Callable[[int], bool],
    step: int,
    **options: Any,
) -> Generator[int, None, None]:
    """Yields generated tokens; ends early once `going()` or `report(position)` is False.

    memory: holds the first `cached` positions of the prompt. boundaries: positions worth a way back, in order. step:
    positions per prefill chunk. options: `generate_step`'s.

    Whatever happens, the memory then agrees with its cache; when a step was torn apart, it is empty.
    """
    tokens: list[int] = []
    try:
        # The towers run after the first report: an answer that was cancelled does not wait for them.
        media = senses.encode(prompt, cached) if report(cached) else None
        for boundary in boundaries:
            if boundary <= cached or not going():
                continue
            begin = cached
            part = mx.array(prompt.ids[begin:boundary])
            cached += prefill(model, part, memory.cache, step, lambda n, at=begin: report(at + n), media)
            memory.hold(prompt.keys)
            media = media and media.after(cached - begin)
            if cached == boundary:
                memory.mark()
        if not going():
            return
        steps = generate_step(
            mx.array(prompt.ids[cached:]),
            model,
            prompt_cache=memory.cache,
            prior_tokens=prompt.ids[:cached],
            media=media,
            prefill_step_size=step,
            prompt_progress_callback=lambda n, _: report(cached + n),
            **options,
        )
        with closing(steps):
            for token, _ in steps:
                tokens.append(token)
                yield token
                if not going():
                    return
    except (Exception, KeyboardInterrupt):
        # The step was torn apart, or what the cache holds is the reason (NaN): neither is worth keeping.
        memory.forget()
        raise
    finally:
        memory.hold([*prompt.keys, *tokens])
