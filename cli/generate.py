"""`gemma4 generate`: one prompt in, one answer out, made for pipes.

Owns where prompt and answer come from and go to, `--raw` and `--json`. Leaves the turn itself to
`mlx_gemma4.chat.Chat`, plain continuation to `mlx_gemma4.generation`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_gemma4.errors import UsageError

from . import failures, options
from .tui import status
from .tui.pending import Pending, attached
from .tui.stream import open_view
from .tui.turn import show_turn

if TYPE_CHECKING:
    from mlx_gemma4.chat import Chat, ChatEvent
    from mlx_gemma4.sampling import Sampling


def command(
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="What is piped in follows it after an empty line."),
    ] = None,
    model: options.Model = options.DEMO,
    revision: options.Revision = None,
    dtype: options.Dtype = None,
    check: options.Check = False,
    system: options.System = None,
    think: options.Think = False,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Continue the text itself: no chat template, no turns.", rich_help_panel="Model"),
    ] = False,
    image: options.Images = None,
    audio: options.Audio = None,
    video: options.Videos = None,
    image_tokens: options.ImageTokens = None,
    video_tokens: options.VideoTokens = None,
    fps: options.Fps = None,
    max_frames: options.MaxFrames = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    context: options.Context = None,
    kv_bits: options.KvBits = None,
    kv_key_bits: options.KvKeyBits = None,
    kv_value_bits: options.KvValueBits = None,
    kv_bits_sliding: options.KvBitsSliding = None,
    kv_mode: options.KvMode = None,
    ple: options.Ple = "memory",
    prefill_step_size: options.PrefillStepSize = 2048,
    hide_thinking: options.HideThinking = False,
    no_markdown: options.NoMarkdown = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="What it cost, in one line on stderr.", rich_help_panel="Screen")
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON object: text, thought, counts, rates.", rich_help_panel="Screen"),
    ] = False,
) -> int:
    """Answer one prompt, from the argument, from stdin or from both, on stdout.

    In a pipe the answer is plain text, thoughts are left out, and everything else goes to stderr.
    """
    kv = options.kv_options(kv_bits, kv_key_bits, kv_value_bits, kv_bits_sliding, kv_mode)
    changes = options.sampling_changes(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    if raw and (system is not None or think):
        raise UsageError("--raw has no turns, so --system and --think mean nothing with it; leave one of them out")
    files = options.media_files(image, audio, video)
    settings = options.media_settings(image_tokens, video_tokens, fps, max_frames)
    if raw and files:
        raise UsageError("--raw has no turns, in which pictures, sound or video could stand; leave --raw out")
    text = _whole_prompt(prompt, options.piped_input(), raw)
    if system is not None:
        system = options.checked_text(system, "--system")

    from mlx_gemma4.chat import Chat
    from mlx_gemma4.sampling import Sampling

    from . import loader

    loaded, tokenizer = loader.open_model(
        model, revision=revision, dtype=dtype, check=check, context=context, ple=ple, towers=bool(files)
    )
    if model == options.DEMO and sys.stderr.isatty():
        status.dim(loader.demo_notice())
    sampling = Sampling.from_defaults(tokenizer.generation_defaults, **changes)
    message: str | list[dict[str, Any]] = text
    if raw:
        answerer: Any = Continuation(loaded, tokenizer, sampling, prefill_step_size, loaded.make_cache(**kv))
    else:
        answerer = Chat(
            loaded, tokenizer, system, think, sampling, prefill_step_size=prefill_step_size, media=settings, **kv
        )
        message = _with_files(answerer, files, text, verbose=stats or sys.stderr.isatty())
    kept = _Kept()
    # A raw continuation is text, not necessarily markdown.
    view = kept if as_json else open_view(markdown=not (no_markdown or raw), show_thoughts=think and not hide_thinking)
    done = show_turn(answerer, message, view, patient=False)
    if as_json:
        record = {"model": model, "text": "".join(kept.texts), "thought": "".join(kept.thoughts)}
        print(json.dumps(record | dataclasses.asdict(done.stats), ensure_ascii=False), flush=True)
    if stats:
        status.dim(status.turn_line(done.stats))
    return failures.INTERRUPTED if done.reason == "cancelled" else 0


def _whole_prompt(argument: str | None, piped: str | None, raw: bool) -> str:
    """Argument and stdin as one prompt. Raises UsageError if there is nothing in either."""
    if argument is not None:
        options.checked_text(argument, "the prompt")
    if piped is not None and not raw:
        piped = piped.strip("\n")
    parts = [part for part in (argument, piped) if part is not None and part.strip()]
    if not parts:
        raise UsageError('no prompt: give one as argument, gemma4 generate "Why?", or pipe one in')
    return "\n\n".join(parts)


def _with_files(chat: Chat, files: list[tuple[str, str]], text: str, *, verbose: bool) -> str | list[dict[str, Any]]:
    """The message of the files and the text. Says what was done to a file, and if `verbose` also what it costs."""
    pending = Pending()
    for kind, source in files:
        for item in pending.add(chat.senses, kind, source):
            for line in attached([item]) if verbose else item.notes:
                status.dim(line)
    return pending.message(text)


class _Kept:
    """A view that keeps the answer instead of showing it."""

    def __init__(self) -> None:
        self.thoughts: list[str] = []
        self.texts: list[str] = []

    def thought(self, text: str) -> None:
        self.thoughts.append(text)

    def text(self, text: str) -> None:
        self.texts.append(text)

    def finish(self) -> None:
        """Nothing is open."""


class Continuation:
    """Plain continuation of a text behind the two methods of `Chat` that a turn on the screen needs; for one text."""

    def __init__(self, model: Any, tokenizer: Any, sampling: Sampling, prefill_step_size: int, cache: list[Any]):
        self._model = model
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._step = prefill_step_size
        self._cache = cache
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True

    def stream(self, text: str, *, progress: Callable[[int, int], Any] | None = None) -> Iterator[ChatEvent]:
        from mlx_gemma4.chat import Done, Stats, Text
        from mlx_gemma4.generation import cache_offset, context_limit, stream_generate

        def watch(done: int, total: int) -> bool:
            wanted = progress(done, total) if progress else True
            return wanted is not False and not self._cancelled

        cache = self._cache
        response = None
        for response in stream_generate(
            self._model,
            self._tokenizer,
            text,
            max_tokens=self._sampling.max_tokens,
            sampler=self._sampling.sampler(),
            logits_processors=self._sampling.logits_processors(),
            prompt_cache=cache,
            prefill_step_size=self._step,
            prompt_progress_callback=watch,
        ):
            if response.text:
                yield Text(response.text)
            if self._cancelled:
                break
        assert response is not None, "stream_generate yields at least its closing response"
        reason = response.finish_reason or "cancelled"
        yield Done(
            Stats(
                prompt_tokens=response.prompt_tokens,
                cached_tokens=0,
                prompt_tps=response.prompt_tps,
                generation_tokens=response.generation_tokens,
                generation_tps=response.generation_tps,
                context_used=cache_offset(cache),
                context_limit=context_limit(self._model),
                cache_bytes=sum(c.nbytes for c in cache),
                peak_memory=int(response.peak_memory * 1e9),
                finish_reason=reason,
            ),
            reason,
        )
