"""`gemma4 convert`: a checkpoint to quantized MLX shards.

Owns the options, the table of `--dry-run` and the closing lines. Leaves the work to
`mlx_gemma4.conversions.convert` and the progress to `tui/conversion.py`.

Exit codes are those of every command (`failures.py`): 1 failed (damaged source, lost network, read-only folder),
2 wrong usage (options, recipe, target exists), 3 no such model or no access, 4 no space, 130 Ctrl-C. After any of them
the same command goes on where it stopped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_gemma4.errors import UsageError

from .tui.conversion import meter
from .tui.status import size

if TYPE_CHECKING:
    from mlx_gemma4.conversions.calibrate import Budget
    from mlx_gemma4.conversions.convert import Prepared

_WHAT, _HOW, _WHERE = "What", "Bits", "Source and target"


def _recipes(typed: str) -> list[str]:
    from mlx_gemma4.conversions import recipe

    return [name for name in recipe.names() if name.startswith(typed)]


def command(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A folder, a Hub repository (owner/name), e2b, e4b, 26b-a4b, 31b.")
    ],
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FOLDER", help="The new folder.", rich_help_panel=_WHERE)
    ] = None,
    bits: Annotated[
        int | None, typer.Option(metavar="N", help="2, 3, 4, 5, 6, 8, or 16 to pack nothing.", rich_help_panel=_HOW)
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(metavar="N", help="Values that share a scale: 32, 64, 128.", rich_help_panel=_HOW)
    ] = None,
    mode: Annotated[
        str | None, typer.Option(metavar="MODE", help="affine, mxfp4, nvfp4 or mxfp8.", rich_help_panel=_HOW)
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="4bit, mixed-4-6, q4_0 ... or a file.toml. Default: 4bit.",
            autocompletion=_recipes,
            rich_help_panel=_HOW,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="Of what is not packed: bfloat16, float16, float32.", rich_help_panel=_HOW),
    ] = None,
    target_bits: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Instead of a recipe: bits per parameter, 4.2 or so, put where a calibration finds they count.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    target_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="The same for the size of the files: 14GB.", rich_help_panel=_HOW)
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Text for the calibration. Default: a short built-in sample.", rich_help_panel=_HOW
        ),
    ] = None,
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Leave out vision and audio.", rich_help_panel=_WHAT)
    ] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="REV", help="Branch, tag or commit on the Hub.", rich_help_panel=_WHERE)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show bits, sizes and memory; read no weights.", rich_help_panel=_WHAT)
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace the model in FOLDER once the new one is done.", rich_help_panel=_WHERE),
    ] = False,
    delete_source: Annotated[
        bool,
        typer.Option(
            "--delete-source",
            help="Remove downloaded shards once converted; never what was there before.",
            rich_help_panel=_WHERE,
        ),
    ] = False,
    upload: Annotated[
        str | None, typer.Option(metavar="REPO", help="Send the result to a Hub repository.", rich_help_panel=_WHERE)
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Progress and result as JSON lines on stdout.")] = False,
) -> None:
    """Convert a checkpoint to MLX, quantized. The same command given again goes on where one was interrupted."""
    from mlx_gemma4.conversions.calibrate import request
    from mlx_gemma4.conversions.convert import convert, prepare

    if to is None and not dry_run:
        raise UsageError("--to says which folder to write; give it, or --dry-run")
    if dry_run and upload is not None:
        raise UsageError("--dry-run makes nothing to --upload; leave one of them out")
    shown = meter(quiet, as_json)
    try:
        if dry_run:
            prepared = prepare(
                source,
                bits,
                group_size=group_size,
                mode=mode,
                recipe=recipe,
                dtype=dtype,
                text_only=text_only,
                revision=revision,
                calibration=request(target_bits, target_size, calibrate),
                progress=shown,
                dry=True,
            )
            prepared.source.close()
            _show_plan(prepared, as_json)
            return
        assert to is not None
        result = convert(
            source,
            to,
            bits,
            group_size=group_size,
            mode=mode,
            recipe=recipe,
            dtype=dtype,
            text_only=text_only,
            revision=revision,
            force=force,
            delete_source=delete_source,
            upload=upload,
            target_bits=target_bits,
            target_size=target_size,
            calibrate=calibrate,
            progress=shown,
        )
    finally:
        shown.close()
    if as_json:
        record = {"folder": str(result.folder), "bytes": result.file_bytes, "tensors": result.tensors}
        record |= {"bits_per_parameter": round(result.bits_per_parameter, 3), "q4_0_matrices": result.q4_0_matrices}
        print(json.dumps({"stage": "done", **record}))
    elif not quiet:
        print(f"{result.folder}: {size(result.file_bytes)}, {result.bits_per_parameter:.2f} bits per parameter")
        if upload is None:
            print(f"try it: gemma4 chat --model {result.folder}")


def _show_plan(prepared: Prepared, as_json: bool) -> None:
    from mlx_gemma4.conversions import estimate

    plan, config, allowed = prepared.plan, prepared.config, prepared.budget
    if as_json:
        record = estimate.as_record(plan, config) if allowed is None else estimate.budget_record(allowed, config)
        print(json.dumps({"recipe": prepared.recipe.name, **record}))
        return
    print(f"recipe {prepared.recipe.name}: {prepared.recipe.description or 'one choice for every matrix'}")
    if allowed is not None:
        _show_budget(prepared, allowed)
        return
    rows = [["weights", "parameters", "bits", "size", "stored as"]]
    for g in estimate.groups(plan):
        rows.append([g.name, f"{g.parameters:,}", f"{g.bits:.2f}", size(g.nbytes), "; ".join(g.packings)])
    _print(rows, right=(1, 2, 3))
    print(f"\nfiles: {size(sum(plan.sizes))} in {len(plan.files)}, of {size(plan.source_bytes)} read")
    _show_download_and_memory(prepared, plan.tensor_bytes)


def _show_budget(prepared: Prepared, allowed: Budget) -> None:
    """What is known without reading weights: what each kind of matrix may get, and what all of them may take."""
    from mlx_gemma4.conversions import estimate

    rows = [["weights", "parameters", "bits from", "to", "size from", "to"]]
    for low, high in estimate.ranges(allowed):
        bits = [f"{low.bits:.2f}", f"{high.bits:.2f}"]
        rows.append([low.name, f"{low.parameters:,}", *bits, size(low.nbytes), size(high.nbytes)])
    _print(rows, right=(1, 2, 3, 4, 5))
    parameters = sum(g.parameters for g, _ in estimate.ranges(allowed))
    print(
        f"\nfiles: at most {size(allowed.file_bytes)} ({allowed.file_bytes:,} bytes), "
        f"{allowed.tensor_bytes * 8 / parameters:.2f} bits per parameter, of {size(allowed.least.source_bytes)} read"
    )
    print(
        "Which matrix gets which bits is found by the calibration, which reads all weights and runs a text through "
        f"them; this dry run reads none. It keeps about {size(allowed.scratch_bytes)} beside the target meanwhile."
    )
    _show_download_and_memory(prepared, allowed.tensor_bytes)


def _show_download_and_memory(prepared: Prepared, tensor_bytes: int) -> None:
    from mlx_gemma4.conversions import estimate

    if missing := prepared.source.missing_bytes():
        print(f"to download: {size(missing)}")
    if table := estimate.resident(tensor_bytes, prepared.config):
        rows = [["in memory at", *(f"{b:g}-bit caches" for b in estimate.KV_BITS)]]
        for context, by_bits in table.items():
            rows.append([f"{context // 1024}K tokens", *("-" if v is None else size(v) for v in by_bits.values())])
        print()
        _print(rows, right=(1, 2))


def _print(rows: list[list[str]], right: tuple[int, ...]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(cells).rstrip())
