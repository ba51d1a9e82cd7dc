"""`gemma4 chat`: a conversation in the terminal.

Owns the options and the order of things: tools, model, a conversation new or resumed, then the dialogue or one turn.
Leaves the conversation to `mlx_gemma4.chat.Chat`, the dialogue to `tui/session.py`, tools to `tui/toolbox.py`.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_gemma4.errors import UsageError

from . import options
from .tui.session import ChatSession
from .tui.toolbox import open_toolbox

if TYPE_CHECKING:
    from mlx_gemma4.chat import Chat


def command(
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="Answered first; without a terminal the command then ends."),
    ] = None,
    model: options.Model = options.DEMO,
    revision: options.Revision = None,
    dtype: options.Dtype = None,
    check: options.Check = False,
    system: options.System = None,
    think: options.Think = None,
    resume: options.Resume = None,
    tools: options.Tools = None,
    mcp: options.Mcp = None,
    yes: options.Yes = False,
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
    on_full: options.OnFull = None,
    ple: options.Ple = "memory",
    prefill_step_size: options.PrefillStepSize = 2048,
    hide_thinking: options.HideThinking = False,
    no_markdown: options.NoMarkdown = False,
    stats: Annotated[
        bool,
        typer.Option("--stats", help="The long figures after each turn.", rich_help_panel="Screen"),
    ] = False,
) -> int:
    """Talk to a model. /help inside lists what you can do there; files may be dragged into the line.

    Without a terminal on stdin there is one turn: the prompt given, or else all of stdin.
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
    files = options.media_files(image, audio, video)
    settings = options.media_settings(image_tokens, video_tokens, fps, max_frames)
    interactive = sys.stdin is not None and sys.stdin.isatty()
    if prompt is None and not interactive:
        prompt = options.piped_input()
    if prompt is not None:
        prompt = options.checked_text(prompt, "the prompt").strip()
    if not prompt and not interactive:
        raise UsageError("nothing to answer: give a prompt, pipe one in, or start gemma4 chat in a terminal")
    if system is not None:
        system = options.checked_text(system, "--system")

    thinking = options.thinking(think)
    full = options.on_full(on_full)

    with open_toolbox(tools, mcp, yes) as toolbox:
        from mlx_gemma4.chat import Chat
        from mlx_gemma4.sampling import Sampling

        from . import loader

        loaded, tokenizer = loader.open_model(
            model,
            revision=revision,
            dtype=dtype,
            check=check,
            context=context,
            ple=ple,
            towers=interactive or bool(files) or bool(toolbox.tools),
        )
        kept = {
            "prefill_step_size": prefill_step_size,
            "media": settings,
            "on_full": full or "stop",
            "tools": toolbox.tools,
        }

        def load(path: str, **given: Any) -> Chat:
            chat = Chat.load(path, loaded, tokenizer, **kept, **given)
            chat.sampling = dataclasses.replace(chat.sampling, **changes)
            return chat

        if resume is not None:
            asked = {"system": system, "thinking": thinking}
            conversation = load(resume, **kv, **{name: value for name, value in asked.items() if value is not None})
        else:
            sampling = Sampling.from_defaults(tokenizer.generation_defaults, **changes)
            conversation = Chat(loaded, tokenizer, system, thinking or False, sampling, **kept, **kv)
        session = ChatSession(
            conversation,
            loader.introduction(model, loaded, kv) if interactive else [],
            markdown=not no_markdown,
            show_thoughts=not hide_thinking,
            long_stats=stats,
            toolbox=toolbox,
            open_file=load,
            file=resume,
            offer_room=interactive and full is None,
        )
        if interactive:
            return session.talk(prompt, files)
        if model == options.DEMO:
            session.say(loader.demo_notice())
        return session.once(prompt or "", files)
