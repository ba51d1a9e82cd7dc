"""Calibration: from a size and a text to a recipe that names the bits of every matrix, and to matrices packed by GPTQ.

Owns the request (`Calibration`), what a size allows before anything is read (`Budget`), the order of things and the
byte budget. Leaves measuring to `sensitivity.py`, choosing to `allocation.py`, packing to `compensate.py`, what is kept
for a run that was interrupted to `scratch.py`, and writing the result to the converter, which takes a `Recipe` and a
`Source` as always.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gemma4.config import Gemma4Config
from mlx_gemma4.conversions.allocation import Allocation, choose, parse_size, recipe_of
from mlx_gemma4.conversions.calibration_text import LENGTH, ROWS, token_rows
from mlx_gemma4.conversions.compensate import Overlay, compensate
from mlx_gemma4.conversions.hub_source import HubRepo, check_disk
from mlx_gemma4.conversions.layers import LayerStream
from mlx_gemma4.conversions.plan import Chooser, Plan, build
from mlx_gemma4.conversions.recipe import Packing
from mlx_gemma4.conversions.scratch import Scratch
from mlx_gemma4.conversions.sensitivity import Option, measure, scratch_bytes, sizes
from mlx_gemma4.conversions.sources import Folder, Source
from mlx_gemma4.errors import UsageError
from mlx_gemma4.tokenizer import Tokenizer

# What MLX may keep of freed buffers meanwhile.
_MLX_CACHE = 128 << 20

# progress(stage, done, total, path): stage is "measure" or "compensate", counts are bytes of matrices; or "note", with
# what it has to say in the place of the path; or "download", with bytes of a shard.
Progress = Callable[[str, int, int, str], Any]


@dataclass(frozen=True)
class Calibration:
    """What is asked for: a size, in one of two ways, and the text to measure on (None: the built-in sample)."""

    target_bits: float | None = None  # per parameter of the whole checkpoint, as the converter prints them
    target_size: int | None = None  # bytes of all shards
    text: str | None = None

    def __post_init__(self) -> None:
        if (self.target_bits is None) == (self.target_size is None):
            raise UsageError("give either --target-bits or --target-size")
        if self.target_bits is not None and not 1 < self.target_bits <= 32:
            raise UsageError(f"--target-bits {self.target_bits:g} is out of range: bits per parameter, e.g. 4.2")
        if self.target_size is not None and self.target_size < 1:
            raise UsageError(f"--target-size {self.target_size} is out of range: bytes, e.g. 14GB")

    @property
    def name(self) -> str:
        if self.target_bits is not None:
            return f"target-{self.target_bits:g}-bits"
        return f"target-{self.target_size}-bytes"


def request(
    target_bits: float | None, target_size: str | int | None, calibrate: str | os.PathLike[str] | None
) -> Calibration | None:
    """The options `--target-bits`, `--target-size` and `--calibrate FILE` as one; None when none is given.

    Raises UsageError.
    """
    if target_bits is None and target_size is None:
        if calibrate is not None:
            raise UsageError("--calibrate measures for a size; give --target-bits or --target-size with it")
        return None
    text = None
    if calibrate is not None:
        try:
            text = Path(calibrate).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise UsageError(f"the calibration text {os.fspath(calibrate)} cannot be read ({e})") from None
    size = parse_size(target_size) if isinstance(target_size, str) else target_size
    return Calibration(target_bits, size, text)


@dataclass(frozen=True)
class Budget:
    """What a request comes to, from headers alone; which matrix gets which bits only the calibration finds."""

    tensor_bytes: int  # of the result, at most
    file_bytes: int  # the same with headers
    least: Plan  # every matrix as small as it may get
    most: Plan  # and as large
    scratch_bytes: int  # on disk beside the target while the calibration runs, about
    plan: Callable[[Chooser, Packing | None], Plan]  # of a choice and its default


def budget(
    wanted: Calibration, source: Source, config: Gemma4Config, dtype: str | None = None, text_only: bool = False
) -> Budget:
    """Raises UsageError when the size cannot be had."""

    def plan(choose: Chooser, default: Packing | None = None) -> Plan:
        return build(source.headers, config, choose, default, dtype=dtype, text_only=text_only)

    plain = plan(lambda path: None)
    allowed = {item.path: sorted(sizes(item), key=lambda s: s[1]) for item in plain.items if item.path in plain.plain}
    least, most = (plan({path: found[at][0] for path, found in allowed.items()}.__getitem__) for at in (0, -1))
    headers = sum(least.sizes) - least.tensor_bytes
    if wanted.target_bits is not None:
        tensors = int(wanted.target_bits * sum(item.rows * item.columns for item in plain.items) / 8)
    else:
        assert wanted.target_size is not None
        tensors = wanted.target_size - headers - _HEADER_SLACK
    if least.tensor_bytes > tensors:
        raise UsageError(
            f"this model takes {least.tensor_bytes:,} bytes at the least, and the size asked for comes to "
            f"{max(0, tensors):,}; ask for more"
        )
    tensors = min(tensors, most.tensor_bytes)
    kept = scratch_bytes(config.text, len(allowed), ROWS * LENGTH)
    return Budget(tensors, tensors + headers, least, most, kept, plan)


def allocate(
    source: Source | str | os.PathLike[str],
    text: str | None = None,
    *,
    target_bits: float | None = None,
    target_size: int | None = None,
    dtype: str | None = None,
    text_only: bool = False,
    progress: Progress | None = None,
) -> Allocation:
    """The recipe that loses least on `text` at a size. The weights are read layer by layer; nothing of it stays.

    source: a folder in the Hub's or MLX's layout, or a `Source`. dtype, text_only: as the converter will be given them.
    progress: called after each matrix. Raises UsageError when the size cannot be had, WeightsError, TokenizerError.
    """
    wanted = Calibration(target_bits, target_size, text)
    opened: Source = Folder(Path(source)) if isinstance(source, str | os.PathLike) else source
    config = Gemma4Config.from_folder(opened.folder)
    allowed = budget(wanted, opened, config, dtype, text_only)
    tokens = token_rows(Tokenizer.from_folder(opened.folder), text)
    stream = LayerStream(opened, config, dtype)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Scratch(Path(folder))
        try:
            with _bounded_cache():
                return _allocate(wanted, allowed, stream, tokens, scratch, progress or _silent)
        finally:
            stream.close()
            scratch.close()


def calibrated(
    wanted: Calibration,
    source: Source,
    config: Gemma4Config,
    folder: Path,
    *,
    dtype: str | None = None,
    text_only: bool = False,
    progress: Progress | None = None,
) -> tuple[Overlay, Allocation, Scratch]:
    """What to convert from and the recipe to do it with: linear maps packed by GPTQ at the bits that `allocate` chose.

    folder: where what is found is kept, and an earlier run's taken up; the `Scratch` of it is returned, to be removed
    when the conversion is over. Raises DoesNotFitError and as `allocate`.
    """
    report = progress or _silent
    allowed = budget(wanted, source, config, dtype, text_only)
    tokens = token_rows(Tokenizer.from_folder(source.folder), wanted.text)
    identity = [source.identity(), wanted.name, hashlib.sha256(tokens.tobytes()).hexdigest(), dtype, text_only]
    # Sums may differ between versions and devices; figures of two kinds must not meet.
    identity += [metadata.version("mlx"), metadata.version("mlx-gemma4"), str(mx.default_device())]
    if not folder.exists():
        check_disk(source, folder, allowed.scratch_bytes + allowed.file_bytes)
    scratch = Scratch(folder, identity)
    if scratch.fresh:
        report("note", 0, 0, scratch.fresh)
    elif scratch.resumed:
        report("note", 0, 0, "going on with an interrupted calibration")
    if isinstance(source, HubRepo):
        source.mine |= set(scratch.found("fetched"))
        source.on_fetched = lambda file: scratch.note(fetched=file)
        source.progress = lambda done, size: report("download", done, size, "")
    stream = LayerStream(source, config, dtype)
    try:
        with _bounded_cache():
            recipe = _allocate(wanted, allowed, stream, tokens, scratch, report)
            files = compensate(stream, tokens, recipe.packings, scratch, lambda *at: report("compensate", *at))
        return Overlay(source, stream, files), recipe, scratch
    except BaseException:
        scratch.close()
        raise
    finally:
        stream.close()


def folder_of(target: Path) -> Path:
    """Where a calibration for `target` keeps what it has found."""
    return target.parent / f".{target.name}.calibration"


def _allocate(
    wanted: Calibration,
    allowed: Budget,
    stream: LayerStream,
    tokens: np.ndarray,
    scratch: Scratch,
    progress: Progress,
) -> Allocation:
    options = measure(stream, tokens, scratch, lambda *at: progress("measure", *at))
    smallest = {path: min(o.nbytes for o in found) for path, found in options.items()}
    fixed = allowed.least.tensor_bytes - sum(smallest.values())
    recipe = _chosen(wanted, options, allowed.tensor_bytes - fixed)
    if wanted.target_size is not None:
        # The files have headers, too: known once the choice is made, and all but the same for the next.
        made = allowed.plan(recipe.packings.get, recipe.default)
        left = wanted.target_size - (sum(made.sizes) - made.tensor_bytes) - _HEADER_SLACK
        recipe = _chosen(wanted, options, left - fixed)
    return recipe


# Bytes by which headers of two choices may differ: longer offsets, a matrix plain in one and packed in the other.
_HEADER_SLACK = 16_384


def _chosen(wanted: Calibration, options: dict[str, list[Option]], budget: int) -> Allocation:
    what = "the built-in sample" if wanted.text is None else "a text of the user's"
    recipe = recipe_of(choose(options, budget), wanted.name, what)
    return replace(recipe, description=f"{recipe.description} Estimated loss {recipe.loss:.2g} nats per token.")


@contextmanager
def _bounded_cache() -> Iterator[None]:
    previous = mx.set_cache_limit(_MLX_CACHE)
    try:
        yield
    finally:
        mx.set_cache_limit(previous)


def _silent(stage: str, done: int, total: int, path: str) -> None:
    """Nobody watches."""
