"""The look at every weight that `--check` asks for.

Owns: finding values that are no numbers, and matrices whose bits were declared as the wrong type: both load
and run, and print nonsense. Leaves everything that headers, names and shapes can tell to `loading.py`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from .errors import WeightsError
from .ple_disk import PATH, DiskTable

if TYPE_CHECKING:
    from .models.gemma4 import Model

ROWS = 8192  # looked at in one go, so that memory stays bounded


def check_values(model: "Model", weights: dict[str, mx.array], files: dict[str, Path]) -> None:
    """Looks at all values of a loaded model, packed matrices as what they stand for.

    weights: the model's tensors by path; files: where each came from. Raises WeightsError for the first
    tensor that holds NaN or infinity, or whose values have the distribution of numbers read as the wrong
    16-bit type.
    """
    modules = dict(model.named_modules())
    for name, value in weights.items():
        path, _, leaf = name.rpartition(".")
        module = modules.get(path)
        if module is None or "scales" not in module:
            _check(name, value.dtype, _rows(value), files[name], matrix=value.ndim > 1)
        elif leaf == "weight":
            # Scales and biases are looked at through the numbers they make.
            _check(name, value.dtype, _unpacked(module), files[name], matrix=False)
    if model.disk_table is not None:
        _check_table(model.disk_table)


def _check_table(table: DiskTable) -> None:
    matrix = not table.is_packed
    _check(f"{PATH}.weight", table.stored_dtype, table.blocks(ROWS), table.file, matrix)


def _check(name: str, dtype: mx.Dtype, parts: Iterator[mx.array], file: Path, matrix: bool) -> None:
    count, nonzero, tiny, square, small = 0, 0.0, 0.0, 0.0, 0.0
    for part in parts:
        part = mx.abs(part.astype(mx.float32))
        # A tower's ranges may be infinite: those clip nothing.
        good = ~mx.isnan(part) if name.endswith(("put_min", "put_max")) else mx.isfinite(part)
        if not mx.all(good).item():
            raise WeightsError(f"{file}: tensor {name} holds NaN or infinite values; download it again")
        # The root mean square of what was seen so far stands in for the whole matrix's.
        count, square = count + part.size, square + _total(mx.square(part))
        rms = (square / max(count, 1)) ** 0.5
        nonzero += _total(part > 0)
        tiny += _total((part > 0) & (part < 1e-8))
        small += _total(part < 0.1 * rms)
    if not matrix or nonzero < 1024:
        return
    # float16 bits read as bfloat16 spread over dozens of powers of ten, nearly all far below any trained
    # weight; bfloat16 bits read as float16 crowd around 1 and leave out small values, which are 8 % of a
    # bell curve.
    if tiny > nonzero / 4 or small < count / 200:
        raise WeightsError(
            f"{file}: the values of tensor {name} are spread as no model's are; was it saved as another type than "
            f"{str(dtype).removeprefix('mlx.core.')}? Download or convert it again"
        )


def _total(values: mx.array) -> float:
    return float(mx.sum(values).item())  # pyright: ignore[reportArgumentType]


def _rows(value: mx.array) -> Iterator[mx.array]:
    flat = value.reshape(-1, value.shape[-1]) if value.ndim > 1 else value.reshape(1, -1)
    for i in range(0, flat.shape[0], ROWS):
        yield flat[i : i + ROWS]


def _unpacked(module: nn.Module) -> Iterator[mx.array]:
    """The matrix a packed module stands for."""
    parts = [_rows(module[key]) for key in ("weight", "scales", "biases") if key in module]
    settings = {key: vars(module)[key] for key in ("group_size", "bits", "mode")}
    for weight, scales, *biases in zip(*parts, strict=True):
        yield mx.dequantize(weight, scales, *biases, **settings)
