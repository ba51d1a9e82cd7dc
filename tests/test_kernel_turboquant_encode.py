"""The encoder's Metal source against its reference: same scales, and rows coded as well.

Compared by error, not by bits: two paths of one row can be equally good to the last bit of float32.
"""

from contextlib import nullcontext

import metal_cpu
import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma4.kernels import backend
from mlx_gemma4.kernels.turboquant import BITS, MODES, WIDTHS, codec, decode, encode, rotate

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def rows(*shape: int, dtype=mx.float32) -> mx.array:
    return (3 * mx.random.normal(shape, key=mx.random.key(7))).astype(dtype)


def errors(c, x: mx.array, codes: mx.array, scales: mx.array | None) -> np.ndarray:
    """Squared error of each row in float32."""
    return np.array(mx.square(decode(c, codes, scales) - rotate(c, x)).sum(axis=-1))


def compare(c, x: mx.array, unit: bool = False) -> None:
    codes, scales = encode(c, x, unit)
    mx.eval(codes)
    with backend.forced("reference"):
        expected, expected_scales = encode(c, x, unit)
    assert codes.shape == expected.shape and codes.dtype == mx.uint32
    if unit:
        assert scales is None
    else:
        # The order of a sum may move the last bit of a float16.
        assert np.allclose(scales, expected_scales, rtol=1e-3) and scales.shape == x.shape[:-1]
    best = errors(c, x, expected, expected_scales)
    assert (errors(c, x, codes, scales) <= 1.001 * best + 1e-6).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("mode", MODES)
def test_every_format(metal, mode, bits):
    compare(codec(64, bits, mode), rows(3, 64))
    if metal is not None:
        assert metal.last.errors == [] and metal.last.unwritten == 0


def test_one_bit_of_the_paper(metal):
    compare(codec(64, 1, "paper"), rows(3, 64))


@pytest.mark.parametrize("width", WIDTHS)
def test_every_width(metal, width):
    compare(codec(width, 3.5), rows(2, width))


@pytest.mark.parametrize("mode", ["trellis", "pairs"])
def test_widest_row_at_the_lowest_rate(metal, mode):
    # The most threadgroup memory: 64 states over 256 steps.
    compare(codec(512, 2, mode), rows(1, 512))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_every_input_type(metal, dtype):
    compare(codec(128, 3.5), rows(2, 128, dtype=dtype))


@pytest.mark.parametrize("mode", ["trellis", "pairs"])
def test_unit_rows(metal, mode):
    compare(codec(64, 3, mode), rows(3, 64) / 3, unit=True)


@pytest.mark.parametrize("mode", ["trellis", "pairs"])
def test_a_row_of_zeros_among_others(metal, mode):
    c = codec(64, 2.5, mode)
    x = mx.concatenate([rows(1, 64), mx.zeros((1, 64)), rows(1, 64)])
    compare(c, x)
    assert not np.array(decode(c, *encode(c, x)))[1].any()


def test_heads_of_a_transposed_projection(metal):
    # As a layer hands them over: [B, L, H, D] seen as [B, H, L, D].
    compare(codec(64, 2), rows(2, 3, 2, 64).swapaxes(1, 2))


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize(("mode", "bits"), [("trellis", 2), ("trellis", 4), ("pairs", 2)])
def test_any_order_of_threads_gives_the_same_codes(metal, mode, bits, order):
    c, x = codec(64, bits, mode), rows(2, 64)
    first, _ = encode(c, x)
    mx.eval(first)
    with metal_cpu.session(order=order, seed=1) if metal is not None else nullcontext():
        again, _ = encode(c, x)
        mx.eval(again)
    assert mx.array_equal(first, again)


def test_each_row_is_read_and_written_once(metal):
    x, c = rows(4, 128), codec(128, 3)
    compare(c, x)
    if metal is not None:
        buffers = metal.last.buffers
        assert buffers["x"].read == x.nbytes
        assert buffers["codes"].written == 4 * c.words * 4
        assert buffers["scales"].written == 4 * 2


def mutation_check() -> None:
    """Launches that need every barrier: the path search, and the memoryless tables with rows of several SIMD-groups."""
    compare(codec(64, 3.5), rows(3, 64))
    compare(codec(256, 3.5, "pairs"), rows(2, 256))
    compare(codec(512, 2), rows(1, 512))
