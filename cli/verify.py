"""`gemma4 verify`: whether a model folder is what it should be.

Owns the lines printed. Leaves the looks to `mlx_gemma4.conversions.verify`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .tui.status import busy


def command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A model folder, converted by anyone.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="Headers, names, shapes and lengths only; no weights are read.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a model folder: recorded hashes, shapes, NaN, and a token computed. Exit code 1 if it is not sound."""
    from mlx_gemma4.conversions.verify import verify

    done: list[dict[str, str]] = []
    with busy(f"checking {folder}"):
        for name, what in verify(folder, quick=quick):
            done.append({"check": name, "found": what})
    if as_json:
        print(json.dumps({"folder": str(folder), "sound": True, "checks": done}))
        return
    for check in done:
        print(f"{check['check']:<10} {check['found']}")
    print(f"{folder} is sound")
