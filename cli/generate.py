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

from mlx_gemma4.errors import Gemma4Error, UsageError

from . import failures, options
from .tui import status
from .tui.pending import Pending, attached
from .tui.stream import open_view
from .tui.toolbox import declared_in
from .tui.turn import show_turn

if TYPE_CHECKING:
    from mlx_gemma4.chat import Chat
    from mlx_gemma4.events import ChatEvent, Malformed, Stats, ToolCall
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
    think: options.Think = None,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Continue the text itself: no chat template, no turns.", rich_help_panel="Model"),
    ] = False,
    schema: options.Schema = None,
    regex: options.Regex = None,
    tools: options.Declared = None,
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
        typer.Option(
            "--json", help="Print one JSON object: text, thought, tool calls, counts, rates.", rich_help_panel="Screen"
        ),
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
    thinking = options.thinking(think)
    form = options.form(schema, regex)
    turns_only = {"--system": system, "--think": think, "--schema": schema, "--regex": regex, "--tools": tools}
    if raw and (given := [name for name, value in turns_only.items() if value is not None]):
        raise UsageError(f"--raw has no turns, so {' and '.join(given)} mean nothing with it; leave one of them out")
    if tools and not as_json:
        raise UsageError("calls are printed with --json only; add it, or use gemma4 chat --tools, which runs them")
    declared = [tool for file in tools or () for tool in declared_in(file)]
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
            loaded,
            tokenizer,
            system,
            thinking or False,
            sampling,
            tools=declared,
            prefill_step_size=prefill_step_size,
            media=settings,
            **kv,
        )
        message = _with_files(answerer, files, text, verbose=stats or sys.stderr.isatty())
    kept = _Kept()
    # A raw continuation is text, not necessarily markdown; a form is no markdown.
    markdown = not (no_markdown or raw or form)
    view = kept if as_json else open_view(markdown=markdown, show_thoughts=bool(thinking) and not hide_thinking)
    done = show_turn(
        answerer, message, view, patient=False, on_call=kept.call if as_json else None, response_format=form
    )
    if as_json:
        print(json.dumps(kept.record(model, done.stats), ensure_ascii=False), flush=True)
    if stats:
        status.dim(status.turn_line(done.stats))
    if form and done.reason in ("length", "repetition"):
        raise Gemma4Error(f"the answer was cut off ({done.reason}) before its form was complete")
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


# What of a call is printed: of one that cannot be read its text and what is wrong with it.
_OF_CALLS = ("id", "name", "arguments", "notes", "error")


class _Kept:
    """A view that keeps the answer instead of showing it."""

    def __init__(self) -> None:
        self.thoughts: list[str] = []
        self.texts: list[str] = []
        self.calls: list[dict[str, Any]] = []

    def call(self, event: ToolCall | Malformed) -> None:
        shown = dataclasses.asdict(event)
        self.calls.append({name: value for name, value in shown.items() if name in _OF_CALLS and value})

    def record(self, model: str, stats: Stats) -> dict[str, Any]:
        said = {"model": model, "text": "".join(self.texts), "thought": "".join(self.thoughts)}
        return said | {"tool_calls": self.calls} | dataclasses.asdict(stats)

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
        from mlx_gemma4.events import Done, Stats, Text
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
