"""Calibration: from a size and a text to a recipe that names the bits of every matrix, and to matrices packed by GPTQ.

Owns the request (`Calibration`), the order of things and the byte budget. Leaves measuring to `sensitivity.py`,
choosing to `allocation.py`, packing to `compensate.py`, and writing the result to the converter, which takes a `Recipe`
and a `Source` as always.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_gemma4.config import Gemma4Config
from mlx_gemma4.conversions.allocation import Allocation, choose, parse_size, recipe_of
from mlx_gemma4.conversions.calibration_text import token_rows
from mlx_gemma4.conversions.compensate import Overlay, compensate
from mlx_gemma4.conversions.layers import LayerStream
from mlx_gemma4.conversions.plan import build
from mlx_gemma4.conversions.sensitivity import Option, measure
from mlx_gemma4.conversions.sources import Folder, Source
from mlx_gemma4.errors import UsageError
from mlx_gemma4.tokenizer import Tokenizer

# What MLX may keep of freed buffers meanwhile.
_MLX_CACHE = 128 << 20

# progress(stage, done, total, path): stage is "measure" or "compensate", counts are bytes of matrices.
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
    """The recipe that loses least on `text` at a size. Nothing is written; the weights are read layer by layer.

    source: a folder in the Hub's or MLX's layout, or a `Source`. dtype, text_only: as the converter will be given them.
    progress: called after each matrix. Raises UsageError when the size cannot be had, WeightsError, TokenizerError.
    """
    wanted = Calibration(target_bits, target_size, text)
    opened: Source = Folder(Path(source)) if isinstance(source, str | os.PathLike) else source
    config = Gemma4Config.from_folder(opened.folder)
    stream = LayerStream(opened, config, dtype)
    try:
        with _bounded_cache():
            return _allocate(wanted, opened, config, stream, dtype, text_only, progress or _silent)
    finally:
        stream.close()


def calibrated(
    wanted: Calibration,
    source: Source,
    config: Gemma4Config,
    work: Path,
    *,
    dtype: str | None = None,
    text_only: bool = False,
    progress: Progress | None = None,
) -> tuple[Overlay, Allocation]:
    """What to convert from and the recipe to do it with: linear maps packed by GPTQ at the bits that `allocate` chose.

    work: an empty folder for the packed matrices, to be kept until the conversion is over. Errors as of `allocate`.
    """
    report = progress or _silent
    stream = LayerStream(source, config, dtype)
    try:
        with _bounded_cache():
            recipe = _allocate(wanted, source, config, stream, dtype, text_only, report)
            tokens = token_rows(Tokenizer.from_folder(source.folder), wanted.text)
            files = compensate(stream, tokens, recipe.packings, work, lambda *at: report("compensate", *at))
        return Overlay(source, stream, files), recipe
    finally:
        stream.close()


@contextmanager
def work_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside `target` while a calibrated conversion runs; what a killed one left there goes first."""
    folder = target.parent / f".{target.name}.calibration"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
    except OSError as e:
        raise UsageError(f"{target.parent} cannot be written ({e.strerror}); choose another folder") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _allocate(
    wanted: Calibration,
    source: Source,
    config: Gemma4Config,
    stream: LayerStream,
    dtype: str | None,
    text_only: bool,
    progress: Progress,
) -> Allocation:
    tokens = token_rows(Tokenizer.from_folder(source.folder), wanted.text)
    plain = build(source.headers, config, lambda path: None, None, dtype=dtype, text_only=text_only)
    if wanted.target_bits is not None:
        budget = int(wanted.target_bits * sum(item.rows * item.columns for item in plain.items) / 8)
    else:
        assert wanted.target_size is not None
        budget = wanted.target_size
    matrices = {name.removesuffix(".weight") for name in stream.items}
    options = measure(stream, tokens, lambda *at: progress("measure", *at))
    fixed = sum(o.nbytes for i in plain.items if i.path not in matrices or i.path not in options for o in i.outputs)
    recipe = _chosen(wanted, options, budget - fixed)
    if wanted.target_size is not None:
        # The files have headers, too: known once the choice is made, and all but the same for the next.
        made = build(
            source.headers, config, lambda p: recipe.choose(p, config.text), recipe.default,
            dtype=dtype, text_only=text_only,
        )  # fmt: skip
        recipe = _chosen(wanted, options, budget - fixed - (sum(made.sizes) - made.tensor_bytes) - _HEADER_SLACK)
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
