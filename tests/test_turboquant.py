"""The KV codec: layout of a row, path search, rotation, gains, and the distortion every table was promised to have.

The kernels of the same codec are in test_kernel_turboquant_encode.py and test_kernel_turboquant_decode.py.
"""

import itertools
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma4.errors import UsageError
from mlx_gemma4.kernels import turboquant
from mlx_gemma4.kernels.codebooks import train
from mlx_gemma4.kernels.reference.turboquant import best_path
from mlx_gemma4.kernels.turboquant import codec, decode, encode, rotate, unrotate

FORMATS = [(mode, bits) for mode in turboquant.MODES for bits in turboquant.BITS] + [("paper", 1)]
every_format = pytest.mark.parametrize(("mode", "bits"), FORMATS, ids=[f"{m}-{b:g}" for m, b in FORMATS])


def rows(n: int, width: int, seed: int = 0) -> mx.array:
    """n normal rows of root mean square 1."""
    x = mx.random.normal((n, width), key=mx.random.key(seed))
    return x * mx.rsqrt(mx.square(x).mean(axis=-1, keepdims=True))


def error(c: turboquant.Codec, x: mx.array) -> float:
    """Squared error of coding x, relative to x."""
    codes, scales = encode(c, x)
    return (mx.square(decode(c, codes, scales) - rotate(c, x)).sum() / mx.square(x).sum()).item()


def slow_row(c: turboquant.Codec, words: np.ndarray) -> np.ndarray:
    """One row bit by bit, as the docstring of turboquant.py describes the stream."""
    bits = [int(word) >> i & 1 for word in words for i in range(32)]
    table, out = np.array(c.codebook), np.zeros(c.width, np.float32)
    for t in range(c.width // 2):
        end = c.pair_bits * (t + 1)
        window = [bits[i] if i >= 0 else 0 for i in range(end - c.window_bits, end)]
        j, f = divmod(t, c.width // 8)
        out[8 * f + 2 * j : 8 * f + 2 * j + 2] = table[sum(bit << i for i, bit in enumerate(window))]
    return out


def random_codes(c: turboquant.Codec, n: int) -> mx.array:
    """Any bits are a valid row, but for those after its end."""
    words = np.random.default_rng(3).integers(0, 1 << 32, (n, c.words), dtype=np.uint64)
    spare = 32 * c.words - c.width * c.pair_bits // 2
    words[:, -1] >>= np.uint64(spare)
    return mx.array(words.astype(np.uint32))


def test_a_row_of_pairs_at_four_bits_is_a_byte_per_step():
    c = codec(32, 4, "pairs")
    row = mx.array(np.arange(16, dtype=np.uint8)).view(mx.uint32)
    # Byte 4j + f is the pair at coordinates 8f + 2j: the bytes of one fragment are 0, 4, 8, 12.
    steps = np.array([0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15])
    assert np.array_equal(np.array(decode(c, row)).reshape(16, 2), np.array(c.codebook)[steps])


def test_a_window_holds_the_newest_bits_highest():
    c = codec(32, 2)
    # Steps 0, 1, 2 bring the nibbles 0xC, 0x5, 0x9; all later ones are 0.
    row = mx.array([0x95C, 0], dtype=mx.uint32)
    first = np.array(decode(c, row)).reshape(4, 4, 2)[:3, 0]  # steps 0, 1, 2: fragments 0, 1, 2 of column pair 0
    assert np.array_equal(first, np.array(c.codebook)[[0xC << 6, 0x5 << 6 | 0xC << 2, 0x9 << 6 | 0x5 << 2 | 0xC >> 2]])


@every_format
@pytest.mark.parametrize("width", [32, 64, 128])
def test_decoding_agrees_with_the_stream_read_bit_by_bit(mode, bits, width):
    c = codec(width, bits, mode)
    codes = random_codes(c, 3)
    assert np.array_equal(np.array(decode(c, codes)), np.stack([slow_row(c, row) for row in np.array(codes)]))


@every_format
def test_a_row_that_is_a_path_is_coded_without_error(mode, bits):
    c = codec(64, bits, mode)
    path = decode(c, random_codes(c, 5))
    codes, scales = encode(c, unrotate(c, path), unit=True)
    assert scales is None
    assert np.abs(np.array(decode(c, codes) - path)).max() < 1e-5


SMALL = {"carries less than is new": (4, 3), "carries as much": (4, 2), "carries more": (3, 1), "nothing": (2, 2)}


@pytest.mark.parametrize(("window", "new"), SMALL.values(), ids=SMALL.keys())
def test_no_path_is_better_than_the_one_found(window, new):
    rng = np.random.default_rng(window * new)
    table = rng.standard_normal((1 << window, 2)).astype(np.float32)
    pairs = rng.standard_normal((6, 4, 2)).astype(np.float32)
    costs = []
    for bits in itertools.product(range(1 << new), repeat=4):
        stream = sum(b << (new * t) for t, b in enumerate(bits)) << window  # zeros before the start
        index = [stream >> (new * (t + 1)) & ((1 << window) - 1) for t in range(4)]
        costs.append(np.square(pairs - table[index]).sum(axis=(1, 2)))
    found = np.array(best_path(mx.array(pairs), mx.array(table), new))
    assert np.allclose(np.square(pairs - table[found]).sum(axis=(1, 2)), np.min(costs, axis=0), rtol=1e-5)


@pytest.mark.parametrize("width", turboquant.WIDTHS)
def test_rotation_is_orthonormal_and_undone(width):
    c = codec(width, 2)
    matrix = np.array(rotate(c, mx.eye(width)))
    assert np.allclose(matrix @ matrix.T, np.eye(width), atol=1e-5)
    # A signed Hadamard transform: every coordinate of the result takes equally from every coordinate.
    assert np.allclose(np.abs(matrix), width**-0.5, rtol=1e-5)
    x = rows(3, width)
    assert np.allclose(unrotate(c, rotate(c, x)), x, atol=1e-5)


def test_the_signs_of_saved_codes_stay():
    assert np.array(codec(32, 2).signs).astype(int).tolist() == SIGNS


# Saved caches hold codes that only these signs undo.
SIGNS = [
    -1,
    -1,
    1,
    1,
    -1,
    -1,
    1,
    1,
    -1,
    -1,
    -1,
    1,
    1,
    1,
    1,
    -1,
    1,
    1,
    1,
    1,
    -1,
    -1,
    -1,
    1,
    -1,
    -1,
    1,
    1,
    -1,
    -1,
    -1,
    -1,
]


def test_unit_rows_store_no_scale_and_others_their_root_mean_square():
    c = codec(64, 3)
    x = rows(4, 64) * mx.array([[0.01], [1.0], [7.0], [300.0]])
    _, scales = encode(c, x)
    assert scales is not None and scales.dtype == mx.float16
    assert np.allclose(scales, [0.01, 1.0, 7.0, 300.0], rtol=2e-3)
    assert encode(c, rows(4, 64), unit=True)[1] is None


@every_format
def test_error_does_not_depend_on_the_size_of_a_row(mode, bits):
    c = codec(64, bits, mode)
    x = rows(16, 64)
    assert error(c, x * 500.0) == pytest.approx(error(c, x), rel=0.02)
    assert error(c, x * 1e-3) == pytest.approx(error(c, x), rel=0.02)


def test_a_row_of_zeros_decodes_to_zeros():
    c = codec(64, 3.5)
    codes, scales = encode(c, mx.concatenate([mx.zeros((1, 64)), rows(1, 64)]))
    out = np.array(decode(c, codes, scales))
    assert scales is not None and scales[0].item() == 0 and not out[0].any() and out[1].any()


def test_a_scale_beyond_float16_saturates():
    c = codec(64, 4)
    codes, scales = encode(c, rows(1, 64) * 1e6)
    assert scales is not None and scales.item() == 65504
    assert mx.isfinite(decode(c, codes, scales)).all().item()


def test_no_rows_give_no_codes():
    c = codec(64, 3.5)
    codes, scales = encode(c, mx.zeros((2, 0, 64)))
    assert codes.shape == (2, 0, c.words) and scales is not None and scales.shape == (2, 0)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=["float32", "float16", "bfloat16"])
def test_any_float_type_goes_in_and_comes_out(dtype):
    c = codec(128, 3.5)
    x = rows(3, 128).astype(mx.bfloat16)  # exact in all three, but for float16's range
    codes, scales = encode(c, x.astype(dtype))
    expected, expected_scales = encode(c, x.astype(mx.float32))
    assert mx.array_equal(codes, expected) and scales is not None and mx.array_equal(scales, expected_scales)
    out = decode(c, codes, scales, dtype)
    assert out.dtype == dtype
    exact = decode(c, codes, scales)
    assert np.allclose(out.astype(mx.float32), exact, rtol=2e-7 if dtype == mx.float32 else 5e-3, atol=1e-6)


def test_leading_axes_are_kept():
    c = codec(32, 2.5)
    x = rows(12, 32).reshape(2, 3, 2, 32)
    codes, scales = encode(c, x)
    assert codes.shape == (2, 3, 2, c.words) and scales is not None and scales.shape == (2, 3, 2)
    alone, _ = encode(c, x[1, 2, 1])
    assert mx.array_equal(alone, codes[1, 2, 1])


@pytest.mark.parametrize("bits", turboquant.BITS)
def test_gains_make_values_unbiased_and_keep_the_size_of_scores(bits):
    c = codec(128, bits)
    x = rows(512, 128, seed=int(10 * bits))
    coded, exact = decode(c, *encode(c, x, unit=True)), rotate(c, x)
    along = (coded * exact).sum().item() / mx.square(exact).sum().item()
    size = mx.square(coded).sum().item() / mx.square(exact).sum().item()
    # Four standard deviations of the sample; without the gains both would be off by the distortion.
    slack = 4 * (c.distortion / x.size) ** 0.5
    assert 2 * slack < c.distortion
    assert along * c.value_gain == pytest.approx(1, abs=slack)
    assert size * c.key_gain**2 == pytest.approx(1, abs=2 * slack)


def test_searching_many_rows_takes_bounded_memory():
    c = codec(512, 2)
    x = rows(4 * 64, 512)
    mx.eval(x)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(encode(c, x))
    assert mx.get_peak_memory() - before < 160e6


# What the default mode promises, on rows of root mean square 1.
LIMITS = {2: 0.080, 2.5: 0.042, 3: 0.022, 3.5: 0.0115, 4: 0.0063}


@pytest.mark.parametrize("width", [256, 512])
@pytest.mark.parametrize("bits", LIMITS)
def test_distortion_of_the_trellis(bits, width):
    c = codec(width, bits)
    measured = error(c, rows(16384 // width, width))
    assert measured <= LIMITS[bits]
    assert measured == pytest.approx(c.distortion, rel=0.04)


# The best that was found for a two-dimensional normal at each rate.
PAIRS = {2: 0.1075, 2.5: 0.0570, 3: 0.0297, 3.5: 0.0153, 4: 0.0078}


@pytest.mark.parametrize("bits", PAIRS)
def test_distortion_of_pairs(bits):
    assert error(codec(512, bits, "pairs"), rows(256, 512)) <= 1.03 * PAIRS[bits]


# TurboQuant, theorem 1: relative errors at 1 to 4 bits as printed there, and Max's (1960) exact ones for a normal.
PAPER = {1: (0.36, 0.3634), 2: (0.117, 0.1175), 3: (0.03, 0.03454), 4: (0.009, 0.009497)}


@pytest.mark.parametrize("bits", PAPER)
def test_paper_mode_reproduces_the_table_of_the_paper(bits):
    printed, exact = PAPER[bits]
    measured = error(codec(512, bits, "paper"), rows(256, 512))
    assert measured == pytest.approx(exact, rel=0.015)
    assert measured == pytest.approx(printed, abs=0.005 if printed >= 0.01 else 0.0006)


def test_lloyd_max_levels_are_those_of_max_1960():
    assert np.allclose(train.lloyd_max(4), [-1.510, -0.4528, 0.4528, 1.510], atol=5e-4)


def test_retraining_a_table_from_scratch_reaches_the_stored_distortion():
    table = train.trained(4, 4, starts=8, passes=100, rows=16)
    again = train.distortion(mx.array(table).astype(mx.float16), 4, 512, rows=256)
    assert again == pytest.approx(codec(512, 2, "pairs").distortion, rel=0.03)


def test_one_pass_of_training_finds_nothing_to_gain_in_the_stored_trellis():
    c = codec(512, 2)
    stored = np.array(c.codebook.astype(mx.float32))
    again, _ = train.refine(stored, 4, np.random.default_rng(9), passes=1, rows=64)
    assert not np.array_equal(again, stored)
    assert train.distortion(mx.array(again), 4, 512, rows=64) == pytest.approx(c.distortion, rel=0.02)


def test_tables_are_small():
    assert sum(f.stat().st_size for f in Path(turboquant.CODEBOOKS).iterdir() if f.suffix != ".py") < 40_000


def test_formats_are_equal_and_hashable_by_what_names_them():
    assert codec(64, 3) == codec(64, 3.0, "trellis") and len({codec(64, 3), codec(64, 3.0), codec(64, 2)}) == 2


BAD = {
    "a rate between": (lambda: codec(512, 3.3), "3.3 bits per coordinate: the trellis codec has 2, 2.5, 3, 3.5, 4"),
    "one bit outside paper mode": (lambda: codec(512, 1), "1 bits per coordinate"),
    "not a number": (lambda: codec(512, "abc"), "'abc' bits per coordinate"),
    "a mode": (lambda: codec(512, 2, "polar"), "codec mode 'polar' is not one of trellis, pairs, paper"),
    "a width": (lambda: codec(96, 2), "rows of width 96: the codec takes 32, 64, 128, 256, 512"),
    "rows of another width": (lambda: encode(codec(64, 2), mx.zeros((2, 32))), "rows of width 32"),
    "a rotation of another width": (lambda: rotate(codec(64, 2), mx.zeros((2, 32))), "rows of width 32"),
    "codes of another format": (lambda: decode(codec(64, 2), mx.zeros((1, 5), mx.uint32)), "codes of 5 words"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD.keys())
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        call()


def test_codebooks_of_one_thread_serve_all(clean_python):
    """Regression: a codebook that nobody had used was still in its file when another thread wanted it."""
    code = (
        "import threading, mlx.core as mx\n"
        "from mlx_gemma4.kernels.turboquant import codec\n"
        "first = threading.Thread(target=lambda: mx.eval(codec(64, 4).codebook))\n"
        "first.start(); first.join()\n"
        "print(codec(64, 2).codebook.sum().item() is not None)"
    )
    assert clean_python(code).strip() == "True"
