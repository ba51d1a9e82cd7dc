"""The KV codec: one row of a key or value <-> a run of small integers, 2 to 4 bits per coordinate.

Owns the formats (`codec`), the rotation, and the choice of path for encoding; the arithmetic of the reference is in
`reference/turboquant.py`, the tables in `codebooks/`. Reading tiles of a cache is `turboquant_decode.py`, attention on
codes `turboquant_attention.py`.

A row x of `width` coordinates is coded in three steps (TurboQuant, Zandieh et al. 2025, arXiv 2504.19874, algorithm 1):

1. scale: x / rms(x), with the rms kept as float16. Rows that come out of a norm without weights need none (`unit`).
2. rotate: a signed Hadamard transform, after which coordinates are close to independent standard normals.
3. quantise pairs of coordinates through a table. What the table is and how an entry is chosen is the mode:

    trellis   the default. A row is a stream of bits, `pair_bits` new ones per pair; the entry is the window of the
              last 10 bits, so that successive pairs share bits and the encoder searches the best path (Viterbi).
              Trellis-coded quantisation, Marcellin and Fischer 1990, with the bit-shift trellis of QTIP (Tseng et
              al. 2024, arXiv 2406.11235).
    pairs     the window is the newest bits alone: two-dimensional vector quantisation.
    paper     as pairs, with a table that is the product of two Lloyd-Max scalar quantisers: what the paper measures.

Layout of a row. Pair step t = (width/8)*j + f holds the rotated coordinates 8f+2j and 8f+2j+1: a lane of a simdgroup
matrix holds column pair j of every fragment f, so each lane reads one contiguous run. The stream lies little-endian in
uint32 words; the new bits of step t are bits [kv*t, kv*(t+1)), its table index bits [kv*(t+1)-L, kv*(t+1)), with zeros
before the start, for kv = `pair_bits` and L = `window_bits`.
"""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_gemma4.errors import UsageError

from . import backend
from .reference import turboquant as reference

MODES = ("trellis", "pairs", "paper")
BITS = (2, 2.5, 3, 3.5, 4)
PAPER_BITS = (1, *BITS)  # the paper's table starts at one bit
WIDTHS = (32, 64, 128, 256, 512)
TRELLIS_WINDOW = 10
# Of the encoder, one threadgroup per row: at 8 table entries a thread, no state of the trellis spans two SIMD-groups.
THREADS = 128

CODEBOOKS = Path(__file__).parent / "codebooks"


@dataclass(frozen=True)
class Codec:
    """One format. Equal and hashable by width, bits and mode, from which everything else follows."""

    width: int
    bits: float  # per coordinate
    mode: str
    pair_bits: int = field(compare=False)  # new bits per pair of coordinates
    window_bits: int = field(compare=False)  # bits of a table index
    words: int = field(compare=False)  # uint32 words per row
    signs: mx.array = field(compare=False, repr=False)  # float32 [width], each +1 or -1
    codebook: mx.array = field(compare=False, repr=False)  # float16 [2**window_bits, 2]
    # Mean squared error of a row of this width relative to its mean square, measured when the table was trained.
    distortion: float = field(compare=False)

    @property
    def key_gain(self) -> float:
        """What scores of coded keys are multiplied by: 1/sqrt(1 - distortion).

        A table of centroids shrinks a row: |decoded|^2 is (1 - distortion)|x|^2 on average. This gain restores the
        variance of the scores, so coded keys neither gain nor lose softmax mass against exact ones; the unbiased gain
        1/(1 - distortion) would let them gain, since the error adds variance of its own.
        """
        return (1.0 - self.distortion) ** -0.5

    @property
    def value_gain(self) -> float:
        """What sums of coded values are multiplied by: 1/(1 - distortion), which makes them unbiased."""
        return 1.0 / (1.0 - self.distortion)


def codec(width: int, bits: float, mode: str = "trellis") -> Codec:
    """The format for rows of `width` coordinates at `bits` per coordinate. Raises UsageError for any other value."""
    if mode not in MODES:
        raise UsageError(f"codec mode {mode!r} is not one of {', '.join(MODES)}")
    allowed = PAPER_BITS if mode == "paper" else BITS
    if isinstance(bits, bool) or not isinstance(bits, (int, float)) or bits not in allowed:
        raise UsageError(f"{bits!r} bits per coordinate: the {mode} codec has {', '.join(f'{b:g}' for b in allowed)}")
    if width not in WIDTHS:
        raise UsageError(f"rows of width {width}: the codec takes {', '.join(map(str, WIDTHS))}")
    return _codec(int(width), float(bits), mode)


@cache
def _codec(width: int, bits: float, mode: str) -> Codec:
    pair_bits = int(2 * bits)
    name = f"{mode}-{bits:g}"
    return Codec(
        width=width,
        bits=bits,
        mode=mode,
        pair_bits=pair_bits,
        window_bits=TRELLIS_WINDOW if mode == "trellis" else pair_bits,
        words=-(-width * pair_bits // 64),
        signs=_signs(width),
        codebook=_codebooks()[name],
        distortion=_distortions()[name][str(width)],
    )


@cache
def _codebooks() -> dict[str, mx.array]:
    tables = mx.load(str(CODEBOOKS / "codebooks.safetensors"))
    assert isinstance(tables, dict)
    # Read now, by the thread that asked: arrays that wait in a file can only be read by the thread that opened it.
    mx.eval(tables)
    return tables


@cache
def _distortions() -> dict[str, dict[str, float]]:
    return json.loads((CODEBOOKS / "distortion.json").read_text(encoding="utf-8"))


def _signs(width: int) -> mx.array:
    # From a hash, not from a random generator: codes are saved, and no release may change them.
    seed = hashlib.shake_256(b"mlx-gemma4 turboquant signs").digest(width // 8)
    return mx.array(1.0 - 2.0 * np.unpackbits(np.frombuffer(seed, np.uint8)).astype(np.float32))


def rotate(codec: Codec, x: mx.array) -> mx.array:
    """hadamard(signs * x) / sqrt(width), orthonormal. x [..., width] of any float type -> float32."""
    _check_width(codec, x)
    return mx.hadamard_transform(x.astype(mx.float32) * codec.signs, scale=codec.width**-0.5)


def unrotate(codec: Codec, y: mx.array) -> mx.array:
    """The inverse of `rotate`. y [..., width] -> float32."""
    _check_width(codec, y)
    return mx.hadamard_transform(y.astype(mx.float32), scale=codec.width**-0.5) * codec.signs


def encode(codec: Codec, x: mx.array, unit: bool = False) -> tuple[mx.array, mx.array | None]:
    """Codes of x [..., width], any float type, not yet rotated -> (uint32 [..., words], scales float16 [...] or None).

    unit: rows have mean square 1 by construction (a norm without weights), so no scale is stored. Otherwise the scale
    is the root mean square of the row; a row of zeros gets scale 0 and decodes to zeros. Scales saturate at 65504.
    """
    _check_width(codec, x)
    if x.size == 0 or not backend.use_metal("turboquant_encode"):
        return reference.encode(codec, x, unit)
    kernel = backend.metal_kernel(
        "turboquant_encode", ("x", "signs", "codebook"), ("codes", "scales"), includes=("turboquant",)
    )
    rows = x.size // codec.width
    codes, scales = kernel(
        inputs=[x.reshape(rows, codec.width), codec.signs, codec.codebook],
        template=[
            ("D", codec.width),
            ("KV", codec.pair_bits),
            ("L", codec.window_bits),
            ("WORDS", codec.words),
            ("UNIT", unit),
            ("THREADS", THREADS),
        ],
        grid=(THREADS, rows, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(rows, codec.words), (rows,)],
        output_dtypes=[mx.uint32, mx.float16],
    )
    codes = codes.reshape(*x.shape[:-1], codec.words)
    return codes, None if unit else scales.reshape(x.shape[:-1])


def decode(codec: Codec, codes: mx.array, scales: mx.array | None = None, dtype: mx.Dtype = mx.float32) -> mx.array:
    """Rows from codes [..., words] and scales [...]: [..., width] in rotated coordinates, without any gain."""
    if codes.shape[-1] != codec.words:
        raise UsageError(f"codes of {codes.shape[-1]} words a row, but this codec has {codec.words}")
    return reference.decode(codec, codes, scales, dtype)


def _check_width(codec: Codec, x: mx.array) -> None:
    if x.shape[-1] != codec.width:
        raise UsageError(f"rows of width {x.shape[-1]} given to a codec of width {codec.width}")
