"""MLX arrays as memory and back: Metal's type names, strides, the bytes of bfloat16.

Owns conversions. Leaves to `kernel.py` which array goes where.
"""

import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

# MLX's get_type_string, and the numpy type with the same bytes.
_TYPES = {
    mx.bool_: ("bool", np.bool_),
    mx.uint8: ("uint8_t", np.uint8),
    mx.uint16: ("uint16_t", np.uint16),
    mx.uint32: ("uint32_t", np.uint32),
    mx.uint64: ("uint64_t", np.uint64),
    mx.int8: ("int8_t", np.int8),
    mx.int16: ("int16_t", np.int16),
    mx.int32: ("int32_t", np.int32),
    mx.int64: ("int64_t", np.int64),
    mx.float16: ("float16_t", np.float16),
    mx.bfloat16: ("bfloat16_t", np.uint16),
    mx.float32: ("float", np.float32),
    mx.complex64: ("complex64_t", np.complex64),
}


def metal_type(dtype: mx.Dtype) -> str:
    """The name by which Metal source knows `dtype`, e.g. "float16_t"."""
    return _TYPES[dtype][0]


@dataclass
class Input:
    """An array as the kernel sees it. memory: its bytes in storage order; strides: in elements."""

    type: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    memory: np.ndarray
    itemsize: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def as_input(value: mx.array | float, row_contiguous: bool) -> Input:
    """`value` evaluated. Unless `row_contiguous`, a transposed or sliced array keeps its storage and strides."""
    array = value if isinstance(value, mx.array) else mx.array(value)
    view = np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array, copy=False)
    if row_contiguous:
        view = np.ascontiguousarray(view).reshape(array.shape)
    strides = tuple(stride // view.itemsize for stride in view.strides)
    if not view.size:
        memory = np.zeros(0, np.uint8)
    elif view.flags.c_contiguous:
        memory = view.reshape(-1)
    else:
        span = 1 + sum((extent - 1) * stride for extent, stride in zip(view.shape, strides, strict=True))
        memory = np.lib.stride_tricks.as_strided(view, (span,), (view.itemsize,))
    return Input(metal_type(array.dtype), tuple(array.shape), strides, memory.view(np.uint8), view.itemsize)


def new_output(shape: tuple[int, ...], dtype: mx.Dtype, value: float | None) -> np.ndarray:
    """The bytes of an output before the launch: `value` everywhere or, as in fresh memory, nothing sensible (NaN)."""
    count, numpy_type = math.prod(shape), np.dtype(_TYPES[dtype][1])
    if value is not None:
        filled = mx.full((count,), value, dtype=dtype)
        return np.array(filled.view(mx.uint16) if dtype == mx.bfloat16 else filled).view(np.uint8)
    return np.full(count * numpy_type.itemsize, 1 if dtype == mx.bool_ else 0xFF, np.uint8)


def as_array(memory: np.ndarray, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """The output's bytes as an array of MLX."""
    array = mx.array(memory.view(_TYPES[dtype][1]).reshape(shape))
    return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array
