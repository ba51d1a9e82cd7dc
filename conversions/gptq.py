"""GPTQ on MLX's affine packing: a matrix packed so that its outputs, not its values, change least.

Owns the algorithm for one matrix and the packing of codes into words. Leaves inputs to `compensate.py`.

Columns are rounded in turn; what a column loses is made up for by the columns still to come, weighted by how inputs go
together (the inverse of H = X'X). Each group's scale and bias are fixed when its first column comes, on the values as
they are by then: of a few ranges up to the full one, a row takes the one that loses least where H says it counts.
Scales and biases are rounded to the type they are stored in before any value is coded, so that this error is made up
for too.

Wide matrices are taken in parts of at most `COLUMNS` columns, which do not make up for one another: H of 21,504 inputs
alone would be 1.8 GB. Rows are independent, so blocks of rows give the same codes.

Source: E. Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv:2210.17323, with the inverse's Cholesky factor (section 3.3, step 3) and lazy updates by group (step 2).
"""

from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gemma4.conversions.recipe import Packing

# Added to H's diagonal, as a share of its mean: the paper's own figure. Ten times more where that is not enough.
DAMPING = 0.01
# Shares of a group's range; clipping the ends is worth it where it makes the steps finer.
RANGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)
# Columns that make up for one another, at most: the factor of so many is 67 MB, and making it takes five times that.
COLUMNS = 4096
# Groups of any size fit into parts of so many columns.
_STEP = 128


def factors(inputs: mx.array) -> list[np.ndarray]:
    """What `quantize` needs of the inputs, float32 [rows, in]: the factor of each part of columns, in order.

    Raises ValueError when they hold no usable numbers.
    """
    columns = inputs.shape[-1]
    count = -(-columns // COLUMNS)
    step = -(-columns // (count * _STEP)) * _STEP
    out = []
    for begin in range(0, columns, step):
        part = inputs[:, begin : begin + step]
        hessian = np.array(part.T @ part)
        out.append(factor_of(hessian))
        del hessian
        mx.clear_cache()
    return out


def factor_of(hessian: np.ndarray) -> np.ndarray:
    """The factor of X'X, float32 [in, in] of inputs of any scale. Raises ValueError as `factors`."""
    return _factor(hessian, np.diag(hessian) == 0)  # inputs that never came: nothing is known, so plain rounding


def quantize(weight: np.ndarray, factors: list[np.ndarray], packing: Packing, dtype: mx.Dtype) -> list[mx.array]:
    """[words uint32 [out, in * bits / 32], scales, biases [out, in / group_size]], as `mx.quantize` lays them out.

    weight: float32 [out, in]. factors: of its inputs, `factors`. packing: affine. dtype: of scales and biases.
    """
    parts, at = [], 0
    for factor in factors:
        end = at + len(factor)
        parts.append(_quantize(weight[:, at:end], factor, packing, dtype))
        at = end
    if len(parts) == 1:
        return parts[0]
    return [mx.concatenate(list(kind), axis=-1) for kind in zip(*parts, strict=True)]


def _quantize(weight: np.ndarray, factor: np.ndarray, packing: Packing, dtype: mx.Dtype) -> list[mx.array]:
    weight = np.array(weight, np.float32)
    group, top = packing.group_size, 2**packing.bits - 1
    codes = np.empty(weight.shape, np.uint32)
    scales, biases = (np.empty((weight.shape[0], weight.shape[1] // group), np.float32) for _ in range(2))
    for number, begin in enumerate(range(0, weight.shape[1], group)):
        end = begin + group
        part = weight[:, begin:end]
        scale, bias = _range(part, np.diag(factor)[begin:end], top, dtype)
        scales[:, number], biases[:, number] = scale, bias
        errors = np.empty_like(part)
        for i in range(group):
            code = np.clip(np.rint((part[:, i] - bias) / scale), 0, top)
            codes[:, begin + i] = code
            row = factor[begin + i, begin + i : end]
            errors[:, i] = (part[:, i] - (scale * code + bias)) / row[0]
            part[:, i:] -= np.outer(errors[:, i], row)
        weight[:, end:] -= errors @ factor[begin:end, end:]
    return [mx.array(pack_codes(codes, packing.bits)), mx.array(scales).astype(dtype), mx.array(biases).astype(dtype)]


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [rows, columns] as MLX packs them: one stream of bits per row, lowest first, in 32-bit words."""
    rows, columns = codes.shape
    out = np.empty((rows, columns * bits // 32), "<u4")
    step = max(1, (1 << 20) // columns)  # a number per bit takes many bytes
    for begin in range(0, rows, step):
        stream = (codes[begin : begin + step, :, None] >> np.arange(bits, dtype=np.uint32)) & 1
        stream = stream.astype(np.uint8).reshape(len(stream), -1)
        out[begin : begin + step] = np.packbits(stream, axis=1, bitorder="little").view("<u4")
    return out


def _factor(hessian: np.ndarray, dead: np.ndarray) -> np.ndarray:
    """The upper Cholesky factor of the damped inverse. Raises ValueError when H holds no usable numbers."""
    mean = float(np.mean(np.diag(hessian)))
    damping = DAMPING
    while damping <= 1 and np.isfinite(mean) and mean > 0:
        diagonal = np.diag(hessian) + np.float32(damping * mean)
        diagonal[dead] = mean
        with mx.stream(mx.cpu):
            # One at a time: of a wide part each of these is large.
            matrix = mx.array(hessian)
            matrix[mx.arange(len(diagonal)), mx.arange(len(diagonal))] = mx.array(diagonal)
            matrix = mx.linalg.cholesky(matrix)
            mx.eval(matrix)
            matrix = mx.linalg.cholesky_inv(matrix)
            mx.eval(matrix)
            matrix = (matrix + matrix.T) / 2
            mx.eval(matrix)
            factor = np.array(mx.linalg.cholesky(matrix, upper=True))
        if np.isfinite(factor).all() and (np.diag(factor) > 0).all():
            return factor
        damping *= 10
    raise ValueError("the calibration's inputs hold no usable numbers")


def _range(part: np.ndarray, diagonal: np.ndarray, top: int, dtype: mx.Dtype) -> tuple[np.ndarray, np.ndarray]:
    """Scale and bias per row of a group [out, group_size], as they will be stored, float32 [out] each."""
    # A range always includes 0, so that what is zero stays zero.
    low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
    best: Any = None
    for share in RANGES:
        scale = _stored(np.where(high > low, (high - low) * share / top, 1.0), dtype)
        zero = np.rint(-low * share / scale)
        bias = _stored(-zero * scale, dtype)
        code = np.clip(np.rint((part - bias[:, None]) / scale[:, None]), 0, top)
        lost = (((part - (scale[:, None] * code + bias[:, None])) / diagonal) ** 2).sum(1)
        if best is None:
            best = [lost, scale, bias]
            continue
        better = lost < best[0]
        for kept, new in zip(best, (lost, scale, bias), strict=True):
            kept[better] = new[better]
    return best[1], best[2]


def _stored(values: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """float32 numbers rounded to `dtype`; a scale too small for float16 becomes its smallest number, never zero."""
    rounded = np.array(mx.array(values.astype(np.float32)).astype(dtype).astype(mx.float32))
    return np.where((rounded == 0) & (values > 0), np.float32(2.0**-24), rounded)
