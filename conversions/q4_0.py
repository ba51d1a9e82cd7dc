"""Weights trained onto the Q4_0 lattice: told by looking at every value, and packed without changing one.

Owns the test and the mapping. A group of 32 values lies on the lattice when there is one number d such that each value
is d * q with a whole q from -8 to 7, rounded to the type the checkpoint stores (a bfloat16 checkpoint cannot hold most
multiples of a bfloat16 number, so its values are rounded ones). d must be a number of the stored type, and of float16
or bfloat16 where that type is float32, because scales are cast to what a model computes in. MLX's affine packing then
has scale d, bias -8 d and code q + 8: in float32 it gives d * q exactly, which rounds to the stored value again.

Source: block_q4_0 in llama.cpp (32 values, d = extremum / -8), the format Google's `-qat-q4_0-` checkpoints train for.
"""

from typing import Any

import mlx.core as mx
import numpy as np

GROUP = 32


def numbers(value: Any) -> np.ndarray:
    """A view on an array; not of bfloat16, which numpy does not have."""
    return np.asarray(memoryview(value))


def scales(value: mx.array) -> np.ndarray | None:
    """d per group, float32 [rows, columns / 32], or None unless every group lies on the lattice.

    value: [rows, columns] in the type stored; columns are a multiple of 32.
    """
    dtype = value.dtype
    groups = numbers(value.astype(mx.float32)).reshape(-1, GROUP)
    extremum = np.take_along_axis(groups, np.abs(groups).argmax(1)[:, None], 1)[:, 0]
    found = np.zeros_like(extremum)
    open_ = np.flatnonzero(extremum)  # a group of zeros has d = 0
    # -8 is what Q4_0 makes of an extremum. A group whose extremum is no -8 has it at 7 or less, of either sign.
    for code in (-8, 7, 6, 5, 4, 3, 2, 1):
        for nudge in (0, 1, -1):
            if not open_.size:
                return found.reshape(value.shape[0], -1)
            if nudge and (dtype == mx.float32 or code in (-8, 4, 2, 1)):
                continue  # the division is exact: a lattice in float32 has no rounding, nor has a power of two
            d = _nudged(extremum[open_] / np.float32(code), dtype, nudge)
            q = np.rint(groups[open_] / d[:, None])
            fits = (q >= -8) & (q <= 7) & (_rounded(d[:, None] * q, dtype) == groups[open_])
            good = fits.all(1) & _fine(d, dtype)
            found[open_[good]] = d[good]
            open_ = open_[~good]
    return None if open_.size else found.reshape(value.shape[0], -1)


def pack(value: mx.array, dtype: mx.Dtype) -> list[np.ndarray]:
    """(words uint32 [rows, columns / 8], scales, biases [rows, columns / 32]) of rows that lie on the lattice.

    dtype: of scales and biases; bfloat16 and float16 come as their bits (uint16). Raises ValueError when a row is off
    the lattice, or when unpacking does not give back every value.
    """
    d = scales(value)
    if d is None:
        raise ValueError("a group is not on the Q4_0 lattice")
    rows = value.shape[0]
    values = numbers(value.astype(mx.float32)).reshape(rows, -1, GROUP)
    safe = np.where(d == 0, np.float32(1), d)[..., None]
    codes = (np.rint(values / safe) + 8).astype(np.uint32).reshape(rows, -1, 8)
    words = (codes << (4 * np.arange(8, dtype=np.uint32))).sum(-1, dtype=np.uint32)
    kept, bias = mx.array(d).astype(dtype), mx.array(-8 * d).astype(dtype)
    back = mx.dequantize(mx.array(words), kept.astype(mx.float32), bias.astype(mx.float32), GROUP, 4)
    if not mx.array_equal(back.astype(value.dtype), value).item():
        raise ValueError(f"the lattice's scales are no {str(dtype).removeprefix('mlx.core.')} numbers")
    return [words, *(numbers(a if dtype == mx.float32 else a.view(mx.uint16)) for a in (kept, bias))]


def _rounded(x: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """float32 numbers rounded to `dtype`."""
    if dtype == mx.float32:
        return x
    return numbers(mx.array(x).astype(dtype).astype(mx.float32))


def _nudged(x: np.ndarray, dtype: mx.Dtype, steps: int) -> np.ndarray:
    """The number of `dtype` nearest to x, or so many steps further from zero."""
    rounded: Any = mx.array(x).astype(dtype)
    if steps:
        rounded = (rounded.view(mx.uint16) + mx.array(steps % 65536, mx.uint16)).view(dtype)
    return numbers(rounded.astype(mx.float32))


def _fine(d: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """Whether each d survives the types a model computes in."""
    finite = np.isfinite(d) & (d != 0)
    if dtype != mx.float32:
        return finite
    return finite & ((_rounded(d, mx.float16) == d) | (_rounded(d, mx.bfloat16) == d))
