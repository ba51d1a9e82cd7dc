"""Tile decode: the Metal source against the reference, and the reference against whole rows."""

from contextlib import nullcontext

import metal_cpu
import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma4.errors import UsageError
from mlx_gemma4.kernels import backend
from mlx_gemma4.kernels.turboquant import BITS, MODES, WIDTHS, codec, decode, encode
from mlx_gemma4.kernels.turboquant_decode import ROWS, turboquant_decode

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def buffer(c, *heads: int, capacity: int, unit: bool = False) -> tuple[mx.array, mx.array | None]:
    """Codes and scales [*heads, capacity, ...] of random rows, any bits being a valid row but after its end."""
    rng = np.random.default_rng(5)
    words = rng.integers(0, 1 << 32, (*heads, capacity, c.words), dtype=np.uint64)
    words[..., -1] >>= np.uint64(32 * c.words - c.width * c.pair_bits // 2)
    scales = None if unit else mx.array(rng.uniform(0.5, 20, (*heads, capacity)).astype(np.float16))
    return mx.array(words.astype(np.uint32)), scales


def compare(c, codes, scales, start, stop, dtype=mx.float32, gain=1.0) -> None:
    out = turboquant_decode(c, codes, scales, start, stop, dtype, gain)
    mx.eval(out)
    with backend.forced("reference"):
        expected = turboquant_decode(c, codes, scales, start, stop, dtype, gain)
    assert out.shape == (*codes.shape[:2], stop - start, c.width) and out.dtype == dtype
    exact = decode(c, codes, scales)[:, :, start:stop] * gain
    ours, plain = (mx.abs(x.astype(mx.float32) - exact).max().item() for x in (out, expected))
    assert ours <= 2 * plain + 1e-5


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("mode", MODES)
def test_every_format(metal, mode, bits):
    c = codec(64, bits, mode)
    compare(c, *buffer(c, 1, 2, capacity=8), 2, 7)
    if metal is not None:
        assert metal.last.errors == [] and metal.last.unwritten == 0


@pytest.mark.parametrize("width", WIDTHS)
def test_every_width(metal, width):
    c = codec(width, 3.5)
    compare(c, *buffer(c, 1, 1, capacity=ROWS[width] + 3), 1, ROWS[width] + 2)


@pytest.mark.parametrize("unit", [False, True], ids=["scales", "unit rows"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_every_output_type(metal, dtype, unit):
    c = codec(128, 3)
    compare(c, *buffer(c, 2, 2, capacity=10, unit=unit), 3, 8, dtype, gain=1.25)


N = ROWS[128]
TILES = {
    "one row": (5, 6),
    "the first row": (0, 1),
    "the last row": (3 * N - 1, 3 * N),
    "one threadgroup": (N, 2 * N),
    "one row more than a threadgroup": (1, N + 2),
    "one row less": (1, N),
    "the whole buffer": (0, 3 * N),
    "nothing": (4, 4),
}


@pytest.mark.parametrize(("start", "stop"), TILES.values(), ids=TILES.keys())
def test_tiles_within_a_buffer(metal, start, stop):
    c = codec(128, 2.5, "pairs")
    if start == stop:
        assert turboquant_decode(c, *buffer(c, 2, 2, capacity=8), start, stop, mx.float32).shape == (2, 2, 0, 128)
    else:
        compare(c, *buffer(c, 2, 2, capacity=3 * N), start, stop)


def test_codes_of_encoded_rows(metal):
    c = codec(64, 4)
    x = mx.random.normal((1, 2, 6, 64), key=mx.random.key(1))
    compare(c, *encode(c, x), 0, 6)


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_any_order_of_threads(metal, order):
    c = codec(64, 3)
    with metal_cpu.session(order=order, seed=1) if metal is not None else nullcontext():
        compare(c, *buffer(c, 1, 2, capacity=6), 1, 6)


def test_only_the_rows_asked_for_are_read(metal):
    c = codec(128, 3.5)
    codes, scales = buffer(c, 2, 3, capacity=64)
    compare(c, codes, scales, 10, 26, mx.float16)
    if metal is not None:
        read = metal.last.buffers
        assert read["codes"].size == codes.nbytes, "the buffer was copied"
        assert read["codes"].read_unique == codes.nbytes * 16 // 64
        assert read["scales"].read_unique == scales.nbytes * 16 // 64


BAD = {
    "beyond the buffer": (3, 9, "rows 3 to 9 of a buffer of 8"),
    "backwards": (4, 3, "rows 4 to 3"),
    "before its start": (-1, 3, "rows -1 to 3"),
}


@pytest.mark.parametrize(("start", "stop", "message"), BAD.values(), ids=BAD.keys())
def test_rows_outside_the_buffer_are_refused(start, stop, message):
    c = codec(64, 2)
    with pytest.raises(UsageError, match=message):
        turboquant_decode(c, *buffer(c, 1, 1, capacity=8), start, stop, mx.float32)


def test_codes_of_another_format_are_refused():
    with pytest.raises(UsageError, match="codes of 4 words a row, but this codec has 7"):
        turboquant_decode(codec(64, 3.5), *buffer(codec(64, 2), 1, 1, capacity=8), 0, 1, mx.float32)


def mutation_check() -> None:
    """One launch of two threadgroups, the second with a row less."""
    c = codec(128, 3.5)
    compare(c, *buffer(c, 1, 1, capacity=ROWS[128] + 3), 1, ROWS[128] + 2)
