"""The options that several commands share, and their checks.

Owns names, help texts and what is refused before a model is loaded. Leaves ranges of sampling values to
`mlx_gemma4.sampling.Sampling` and model names to `mlx_gemma4.loading`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_gemma4 import kv_bits as kv
from mlx_gemma4.errors import UsageError

if TYPE_CHECKING:
    from mlx_gemma4.media.items import MediaSettings

DEMO = "demo"

_MODEL, _MEDIA, _SAMPLING = "Model", "Pictures, sound, video", "Sampling"
_TOOLS, _ANSWER, _MEMORY, _SCREEN = "Tools", "Form of the answer", "Memory and speed", "Screen"


def _model_names(typed: str) -> list[str]:
    from mlx_gemma4 import catalog

    return [name for name in catalog.names() if name.startswith(typed)]


Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        envvar="GEMMA4_MODEL",
        metavar="NAME",
        help="A folder, a Hub repository (owner/name, owner/name@revision), e2b, e4b, 26b-a4b, 31b (-base "
        "for the pretrained ones), or demo: the small model in this package.",
        autocompletion=_model_names,
        rich_help_panel=_MODEL,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(metavar="REV", help="Branch, tag or commit of the Hub repository.", rich_help_panel=_MODEL),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE",
        help="Compute type: bfloat16, float16 or float32. Default: bfloat16 on Metal, float32 on a CPU.",
        rich_help_panel=_MODEL,
    ),
]
Check = Annotated[
    bool,
    typer.Option("--check", help="Look for NaN and infinity in the weights first.", rich_help_panel=_MODEL),
]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.", rich_help_panel=_MODEL)]
Think = Annotated[
    str | None,
    typer.Option(
        "--think",
        metavar="HOW",
        help="Whether the model thinks before it answers: off, on, or at most low, medium, high or N tokens. "
        "Default: off.",
        rich_help_panel=_MODEL,
    ),
]
Tools = Annotated[
    list[str] | None,
    typer.Option(
        "--tools",
        metavar="FILE",
        help="Functions the model may call: a Python file with type hints and docstrings. May be given several times.",
        rich_help_panel=_TOOLS,
    ),
]
Mcp = Annotated[
    list[str] | None,
    typer.Option(
        "--mcp",
        metavar="COMMAND",
        help="A server of tools (Model Context Protocol over stdio), as you would start it. Several times, too.",
        rich_help_panel=_TOOLS,
    ),
]
Yes = Annotated[
    bool, typer.Option("--yes", "-y", help="Run calls without asking for each tool first.", rich_help_panel=_TOOLS)
]
Declared = Annotated[
    list[str] | None,
    typer.Option(
        "--tools",
        metavar="FILE",
        help="Tools the model is told of, a Python file or a JSON list of declarations. Calls are printed, not run; "
        "with --json.",
        rich_help_panel=_ANSWER,
    ),
]
Schema = Annotated[
    str | None,
    typer.Option(
        "--schema",
        metavar="FILE",
        help="The answer is JSON of this schema: a file, or the schema itself.",
        rich_help_panel=_ANSWER,
    ),
]
Regex = Annotated[
    str | None,
    typer.Option("--regex", metavar="REGEX", help="The answer matches this, as a whole.", rich_help_panel=_ANSWER),
]
OnFull = Annotated[
    str | None,
    typer.Option(
        "--on-full",
        metavar="HOW",
        help="When the context is full: stop, drop the oldest turns, or summarize them. Default: ask.",
        rich_help_panel=_MEMORY,
    ),
]
Resume = Annotated[
    str | None,
    typer.Option("--resume", metavar="FILE", help="Go on with a conversation that /save kept.", rich_help_panel=_MODEL),
]
HideThinking = Annotated[bool, typer.Option("--hide-thinking", help="Do not show thoughts.", rich_help_panel=_SCREEN)]
NoMarkdown = Annotated[bool, typer.Option("--no-markdown", help="Show the text as it comes.", rich_help_panel=_SCREEN)]

_FILES = "May be given several times; comes before the text."
Images = Annotated[
    list[str] | None,
    typer.Option("--image", metavar="FILE", help=f"A picture, or its URL. {_FILES}", rich_help_panel=_MEDIA),
]
Audio = Annotated[
    list[str] | None,
    typer.Option("--audio", metavar="FILE", help=f"A sound (E2B, E4B). {_FILES}", rich_help_panel=_MEDIA),
]
Videos = Annotated[
    list[str] | None,
    typer.Option("--video", metavar="FILE", help=f"A clip; E2B and E4B hear it, too. {_FILES}", rich_help_panel=_MEDIA),
]
ImageTokens = Annotated[
    str | None,
    typer.Option(
        metavar="N",
        help="Tokens for a picture at most: 70, 140, 280, 560, 1120, or auto, enough for all its pixels. "
        "Default: the model's own, 280 for all published ones.",
        rich_help_panel=_MEDIA,
    ),
]
VideoTokens = Annotated[
    int | None,
    typer.Option(metavar="N", help="The same for each frame of a video. Default: 70.", rich_help_panel=_MEDIA),
]
Fps = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Frames of a video a second. Default: up to 32 frames spread over the clip.",
        rich_help_panel=_MEDIA,
    ),
]
MaxFrames = Annotated[int | None, typer.Option(metavar="N", help="Frames of a video at most.", rich_help_panel=_MEDIA)]

_FROM_MODEL = "Default: the model's own."
MaxTokens = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Longest answer, in tokens. Default: until the model stops or the context is full.",
        rich_help_panel=_SAMPLING,
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(metavar="X", help=f"0 takes the likeliest token each time. {_FROM_MODEL}", rich_help_panel=_SAMPLING),
]
TopP = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help=f"Sample from the likeliest tokens that make up this share. {_FROM_MODEL}",
        rich_help_panel=_SAMPLING,
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help=f"Sample from the N likeliest tokens; 0: all. {_FROM_MODEL}",
        rich_help_panel=_SAMPLING,
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Leave out tokens less likely than X times the likeliest.",
        rich_help_panel=_SAMPLING,
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(metavar="X", help="Above 1: repeat less.", rich_help_panel=_SAMPLING),
]
Seed = Annotated[
    int | None,
    typer.Option(metavar="N", help="The same seed gives the same answer.", rich_help_panel=_SAMPLING),
]
_BITS = f"{', '.join(f'{b:g}' for b in kv.BITS[:-1])} or {kv.BITS[-1]:g}"
KvBits = Annotated[
    str | None,
    typer.Option(
        envvar="GEMMA4_KV_BITS",
        metavar="BITS",
        help=f"Bits per number that global layers remember: {_BITS}. 16 is exact; 3.5 fits most.",
        rich_help_panel=_MEMORY,
    ),
]
KvKeyBits = Annotated[
    str | None, typer.Option(metavar="BITS", help="The same for keys alone.", rich_help_panel=_MEMORY)
]
KvValueBits = Annotated[
    str | None, typer.Option(metavar="BITS", help="The same for values alone.", rich_help_panel=_MEMORY)
]
KvBitsSliding = Annotated[
    str | None,
    typer.Option(metavar="BITS", help="The same for sliding layers. Default: 16, exact.", rich_help_panel=_MEMORY),
]
KvMode = Annotated[
    str | None,
    typer.Option(
        metavar="MODE",
        help=f"How codes are found: {', '.join(kv.MODES)}. Default: {kv.MODES[0]}, the most exact.",
        rich_help_panel=_MEMORY,
    ),
]
Ple = Annotated[
    str,
    typer.Option(
        metavar="WHERE",
        help="memory, or disk: E2B's and E4B's table of per-layer embeddings stays in its file, which frees its size.",
        rich_help_panel=_MEMORY,
    ),
]
Context = Annotated[
    str | None,
    typer.Option(
        metavar="N",
        help="Most tokens a conversation may hold, e.g. 8192 or 8k. Default: the model's.",
        rich_help_panel=_MEMORY,
    ),
]
PrefillStepSize = Annotated[
    int,
    typer.Option(metavar="N", min=1, help="Tokens of a prompt computed at a time.", rich_help_panel=_MEMORY),
]


def sampling_changes(**flags: Any) -> dict[str, Any]:
    """The sampling values given on the command line. Raises UsageError naming the allowed range."""
    from mlx_gemma4.sampling import Sampling

    given = {name: value for name, value in flags.items() if value is not None}
    Sampling(**given)
    return given


def thinking(text: str | None, option: str = "--think") -> bool | int | str | None:
    """As `Chat` takes it; None stays None. Raises UsageError."""
    if text is None:
        return None
    from mlx_gemma4.guides import LEVELS, thinking_budget

    given = text.strip().lower()
    try:
        thinking_budget(given)
    except (ValueError, UsageError):
        raise UsageError(f"{option} takes off, on, {', '.join(LEVELS)} or a number of tokens, not {text!r}") from None
    if given in ("on", "off"):
        return given == "on"
    return int(given) if given.isdecimal() else given


def form(schema: str | None, regex: str | None) -> dict[str, Any] | None:
    """The response format asked for. Raises UsageError."""
    if schema is not None and regex is not None:
        raise UsageError("--schema and --regex are two forms of one answer; leave one out")
    if regex is not None:
        return {"type": "regex", "regex": checked_text(regex, "--regex")}
    if schema is None:
        return None
    given = schema.strip()
    inline = given.startswith("{")
    where = "--schema" if inline else f"--schema {schema}"
    try:
        found = json.loads(given if inline else Path(schema).expanduser().read_bytes())
    except OSError as e:
        raise UsageError(f"{where} cannot be read: {e.strerror}") from None
    except ValueError as e:
        raise UsageError(f"{where} is no JSON: {e}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{where} is no schema: it must be a JSON object")
    return {"type": "json_schema", "schema": found}


def on_full(text: str | None) -> Any:
    """Raises UsageError."""
    from mlx_gemma4.room import ON_FULL

    if text not in (None, *ON_FULL):
        raise UsageError(f"--on-full takes {', '.join(ON_FULL)}, not {text!r}")
    return text


def kv_request(
    kv_bits: str | None, keys: str | None, values: str | None, sliding: str | None, mode: str | None
) -> kv.KvBits:
    """What the kv options ask for. Raises UsageError for a bad value."""
    return kv.request(kv_bits, keys, values, sliding, mode, option="--kv-bits")


def kv_options(
    kv_bits: str | None, keys: str | None, values: str | None, sliding: str | None, mode: str | None
) -> dict[str, Any]:
    """Those given, as arguments of `Chat` and `make_cache`. Raises UsageError for a bad value."""
    kv_request(kv_bits, keys, values, sliding, mode)
    bits = {"kv_bits": kv_bits, "kv_key_bits": keys, "kv_value_bits": values, "kv_bits_sliding": sliding}
    given: dict[str, Any] = {name: float(text) for name, text in bits.items() if text is not None}
    return given if mode is None else given | {"kv_mode": mode}


def media_files(images: list[str] | None, audio: list[str] | None, videos: list[str] | None) -> list[tuple[str, str]]:
    """(kind, source) of the files given: pictures, then videos, then sounds, each in their order.

    Raises MediaError for one that is not there: now, not after a model was loaded.
    """
    from mlx_gemma4.media.sources import MediaError

    given = [
        *(("image", source) for source in images or ()),
        *(("video", source) for source in videos or ()),
        *(("audio", source) for source in audio or ()),
    ]
    for _, source in given:
        if not re.match(r"[a-z]{2,}:", source, re.IGNORECASE) and not os.path.exists(os.path.expanduser(source)):
            raise MediaError(f"there is no file {source}")
    return given


def media_settings(
    image_tokens: str | None = None,
    video_tokens: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
) -> MediaSettings:
    """What the options say about media. URLs are fetched: here somebody wrote them. Raises UsageError."""
    from mlx_gemma4.media.images import TOKEN_BUDGETS
    from mlx_gemma4.media.items import MediaSettings

    allowed = ", ".join(map(str, TOKEN_BUDGETS[:-1]))
    budget: Any = image_tokens.strip().lower() if image_tokens is not None else None
    if budget not in (None, "auto"):
        budget = int(budget) if budget.isdecimal() else None
        if budget not in TOKEN_BUDGETS:
            raise UsageError(f"--image-tokens takes {allowed}, {TOKEN_BUDGETS[-1]} or auto, not {image_tokens}")
    if video_tokens not in (None, *TOKEN_BUDGETS):
        raise UsageError(f"--video-tokens takes {allowed} or {TOKEN_BUDGETS[-1]}, not {video_tokens}")
    if fps is not None and not 0 < fps <= 1000:
        raise UsageError(f"--fps takes a number above 0, not {fps:g}")
    if max_frames is not None and max_frames < 1:
        raise UsageError(f"--max-frames takes 1 or more, not {max_frames}")
    return MediaSettings(budget, video_tokens, fps, max_frames, allow_urls=True)


def token_count(text: str, option: str) -> int:
    """`8192`, `8k` (1k = 1,024) or `1m` as a number. Raises UsageError."""
    match = re.fullmatch(r"([0-9]{1,12})([km]?)", text.strip().lower().replace(",", "").replace("_", ""))
    count = int(match[1]) * {"": 1, "k": 1024, "m": 1024 * 1024}[match[2]] if match else 0
    if count < 1:
        raise UsageError(f"{option} takes a number of tokens such as 8192 or 8k, not {text!r}")
    return count


def checked_text(text: str, name: str) -> str:
    """`text` if it can be encoded. Raises UsageError when the terminal passed bytes that are not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"{name} is not UTF-8 text") from None
    return text


def piped_input() -> str | None:
    """All of stdin when something is piped or redirected into it; None for a terminal. Raises UsageError."""
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        return None
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as e:
        raise UsageError(f"stdin is not UTF-8 text (byte {e.start}); convert it first") from None
