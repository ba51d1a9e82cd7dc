"""`gemma4 detect`: what is where in a picture, as JSON in pixels and drawn into a copy.

Owns the two outputs and where the copy may be written. Leaves asking, reading the answer and drawing to
`mlx_gemma4.detect`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_gemma4.errors import Gemma4Error, UsageError

from . import options
from .tui import status
from .tui.attachments import plain
from .tui.stream import printable

if TYPE_CHECKING:
    from mlx_gemma4.detect import Detection

MARK = "-detected"
_FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def command(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="A picture, or its URL.")],
    what: Annotated[str, typer.Argument(metavar="WHAT", help="What to look for, e.g. 'person and bicycle'.")],
    model: options.Model = options.DEMO,
    revision: options.Revision = None,
    dtype: options.Dtype = None,
    check: options.Check = False,
    image_tokens: options.ImageTokens = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help=f"The copy with the boxes drawn; its suffix says the format. Default: NAME{MARK}.png, here.",
            rich_help_panel="Screen",
        ),
    ] = None,
    no_picture: Annotated[
        bool, typer.Option("--no-picture", help="JSON only, no copy.", rich_help_panel="Screen")
    ] = False,
    ple: options.Ple = "memory",
) -> None:
    """Find things in a picture: prints one JSON object with boxes in pixels, and writes a copy with them drawn.

    Boxes are x1, y1, x2, y2 from the upper left corner of the picture as it is shown. Finding nothing is no error.
    """
    if no_picture and out is not None:
        raise UsageError("--no-picture and --out contradict each other; leave one of them out")
    settings = options.media_settings(image_tokens)
    options.media_files([image], None, None)
    target = None if no_picture else _target(image, out)

    from mlx_gemma4.detect import detect, draw, prompt

    prompt(options.checked_text(what, "what to look for"))

    import numpy as np

    from mlx_gemma4.media.images import open_image

    from . import loader

    picture = open_image(image, allow_urls=True)  # an error now, not after a model was loaded
    loaded, tokenizer = loader.open_model(model, revision=revision, dtype=dtype, check=check, ple=ple, towers=True)
    if model == options.DEMO and sys.stderr.isatty():
        status.dim(loader.demo_notice())
    with status.busy(f"looking for {printable(what)}"):
        found = detect(loaded, tokenizer, np.asarray(picture), what, image_tokens=settings.image_tokens)
    failed = _write(draw(found.picture, found.boxes), target) if target is not None else None
    record = _record(image, what, found, None if failed else target)
    print(printable(json.dumps(record, ensure_ascii=False)), flush=True)
    if failed:
        raise failed


def _record(image: str, what: str, found: Detection, target: Path | None) -> dict[str, Any]:
    return {
        "image": image,
        "what": what,
        "width": found.width,
        "height": found.height,
        "boxes": [dataclasses.asdict(box) for box in found.boxes],
        "picture": str(target) if target is not None else None,
    }


def _target(image: str, out: str | None) -> Path:
    """Where the copy goes. Raises UsageError for a place where it must not, or cannot."""
    name = re.split(r"[?#]", image)[0] if "://" in image[:10] else image
    stem = Path(name).stem if not image.startswith("data:") else ""
    default = f"{stem or 'picture'}{MARK}.png"
    path = Path(out).expanduser() if out is not None else Path(default)
    if path.is_dir():
        path /= default
    if path.suffix.lower() not in _FORMATS:
        raise UsageError(f"--out takes a file that ends in {', '.join(_FORMATS)}, or a folder; not {out}")
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent}; make it first, or give --out another place")
    if path.exists():
        source = Path(plain(image))
        if source.exists() and path.samefile(source):
            raise UsageError(f"{path} is the picture itself, which stays as it is; give --out another name")
        if not path.stem.endswith(MARK):  # ours from last time may go; anything else may be dear to somebody
            raise UsageError(f"{path} exists; give --out another name, or delete it first")
    return path


def _write(picture: Any, target: Path) -> Gemma4Error | None:
    """Why it could not be written, or None: the boxes are printed in any case."""
    try:
        picture.save(target)
    except OSError as e:
        return Gemma4Error(f"{target} cannot be written ({e.strerror or e}); give --out another place")
    return None
