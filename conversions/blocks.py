"""One item of a plan, row block by row block: read, renamed halves put together, unpacked, cast, packed.

Owns the numbers between the source's bytes and the result's, and the bound on memory: a block is at most `BLOCK` bytes
of source, whatever the matrix. Rows are packed independently, so blocks of any size give the same bytes. Leaves what
goes where to `plan.py` and files to `sources.py` and `partial.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gemma4.conversions import q4_0
from mlx_gemma4.conversions.plan import Item, Stored, stored_as
from mlx_gemma4.errors import WeightsError

BLOCK = 32 << 20

_MLX = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
# How numpy, which has no bfloat16, holds a stored type.
_NUMPY: dict[str, Any] = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32, "U32": np.uint32, "U8": np.uint8}
# Sign bit off, a float from here on is infinite or no number.
_INFINITE = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}


@dataclass(frozen=True)
class Raw:
    """Rows [begin, end) of an item as the source stores them: one array of bytes per source tensor."""

    item: Item
    begin: int
    end: int
    parts: tuple[np.ndarray, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def ranges(item: Item, block: int = BLOCK) -> Iterator[tuple[int, int]]:
    """The row blocks of an item: [begin, end). A permuted tensor is one block; those are small convolutions."""
    rows = item.rows
    step = rows if item.axes is not None else max(1, block // max(1, item.source_bytes // max(1, rows)))
    for begin in range(0, rows, step):
        yield begin, min(begin + step, rows)


def spans(item: Item, begin: int, end: int) -> list[list[tuple[int, int]]]:
    """Per source tensor, the (offset, length) in bytes that rows [begin, end) take, from the tensor's start."""
    kinds = stored_as(item.name, item.shape, item.source_dtype, item.stored)
    rows = [(begin, end)]
    if item.part is not None:
        # [.., 2F, K] holds the gate's F rows, then the up projection's F rows, for each expert.
        height, shift = item.shape[-2], item.shape[-2] if item.part == "up" else 0
        rows, at = [], begin
        while at < end:
            expert, row = divmod(at, height)
            count = min(height - row, end - at)
            first = expert * 2 * height + shift + row
            rows.append((first, first + count))
            at += count
    out = []
    for kind in kinds:
        width = kind.nbytes // max(1, item.rows)
        out.append([(a * width, (b - a) * width) for a, b in rows])
    return out


def check_finite(raw: Raw) -> None:
    """Raises WeightsError when plain values, or the scales of packed ones, hold NaN or infinity."""
    item = raw.item
    limit = _INFINITE.get(item.source_dtype)
    floats = raw.parts if item.stored is None else raw.parts[1:]
    if limit is None or (item.stored is not None and item.stored.mode != "affine"):
        return
    if item.name.endswith(("_min", "_max")):
        return  # the clip ranges of a tower, where infinity means no clipping
    kind = _NUMPY[item.source_dtype]
    for part in floats:
        if part.size and int((part.view(kind) & kind(np.iinfo(kind).max >> 1)).max()) >= limit:
            file, name = item.sources[0]
            raise WeightsError(f"{file}: tensor {name} holds NaN or infinite values; download it again")


def convert(raw: Raw) -> list[np.ndarray]:
    """The bytes of these rows in each of the item's output tensors, as uint8 arrays."""
    item = raw.item
    if item.stored == item.packing and item.axes is None and not item.q4_0:
        kinds = stored_as(item.name, item.shape, item.source_dtype, item.stored)
        return [
            part if had.dtype == want.dtype else _bytes(_array(part, had).astype(_MLX[want.dtype]))
            for part, had, want in zip(raw.parts, kinds, item.outputs, strict=True)
        ]
    value = plain(raw)
    if item.q4_0:
        return [_as_bytes(part) for part in q4_0.pack(value, _MLX[item.dtype])]
    value = value.astype(_MLX[item.dtype])
    if item.packing is None:
        if item.axes is not None:
            value = mx.contiguous(value)
        return [_bytes(value)]
    return [_bytes(part) for part in mx.quantize(value, **item.packing.as_dict())]


def plain(raw: Raw) -> mx.array:
    """The rows unpacked: [rows, columns] as stored, or float32 where the source packs them; permuted if need be."""
    item, count = raw.item, raw.end - raw.begin
    kinds = stored_as(item.name, item.shape, item.source_dtype, item.stored)
    if item.axes is not None:
        before = tuple(item.shape[item.axes.index(a)] for a in range(len(item.axes)))
        return _array(raw.parts[0], kinds[0]).reshape(before).transpose(item.axes)
    arrays = [_array(part, kind).reshape(count, -1) for part, kind in zip(raw.parts, kinds, strict=True)]
    if item.stored is None:
        return arrays[0]
    if item.stored.mode == "affine":
        # In float32, so that unpacking rounds once, at the end.
        arrays[1:] = [a.astype(mx.float32) for a in arrays[1:]]
    settings: Any = item.stored.as_dict()
    scales_and_biases: Any = arrays[1:]
    return mx.dequantize(arrays[0], *scales_and_biases, **settings, dtype=mx.float32)


def _array(part: np.ndarray, kind: Stored) -> mx.array:
    value = mx.array(part.view(_NUMPY.get(kind.dtype, np.uint8)))
    return value.view(_MLX[kind.dtype]) if kind.dtype in _MLX else value


def _bytes(value: mx.array) -> np.ndarray:
    """A copy-free view on an evaluated array."""
    mx.eval(value)
    if value.dtype in (mx.bfloat16, mx.float16):
        value = value.view(mx.uint16)
    return _as_bytes(q4_0.numbers(value))


def _as_bytes(value: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8)
