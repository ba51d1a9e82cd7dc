"""Attention over a compressed past: queries in rotated coordinates against codes, one softmax, values from codes.

Owns the arguments, the choice of path and how the context is split; rows and formats are `turboquant.py`'s, the exact
segments of a cache and their merging its caller's. The arithmetic of the reference is in
`reference/turboquant_attention.py`, that of the kernel in `metal/turboquant_attention.metal`.
"""

from dataclasses import dataclass

import mlx.core as mx

from mlx_gemma4.errors import UsageError

from . import backend
from .merge_partials import merge_partials
from .reference import turboquant_attention as reference
from .turboquant import Codec
from .turboquant_decode import turboquant_decode

# Calls of at most this many queries, and rows (queries times query heads per KV head), run on codes directly. A larger
# one decodes tiles first: its products repay that, and they fill the matrix units of a GPU as whole matrix products.
DECODE_QUERIES = 8
DECODE_ROWS = 64

# Coordinates per SIMD-group, as far as at least four SIMD-groups share a row. With 64 a lane holds 16 sums per 8 query
# rows and 32 decoded numbers: two blocks of 8 rows, besides their queries, stay within some 100 registers.
SIMD_WIDTH = 64
LEAST_GROUPS = 4
# Sums a lane holds at most; with it the blocks of 8 query rows a threadgroup takes (16 rows at width 512).
LANE_SUMS = 32
MOST_BLOCKS = 4
TILE = 32  # positions; as in the source

# Threadgroups that keep a large GPU busy: two for each of an M4 Max's 40 cores. Fewer cores run them in turns.
THREADGROUPS = 80
# A split writes one partial result of D floats per query row, which the merge reads again. At 256 positions of 3.5 bits
# and 8 rows that is a quarter of the codes read, which a GPU that would idle otherwise can afford; contexts long enough
# to fill it have longer splits.
SPLIT_POSITIONS = 256

INPUTS = (
    *("q", "q_rotary", "keys", "key_scales", "key_table", "other", "other_scales", "other_table"),
    *("span", "first", "gain"),
)
NONE, VALUES, ROTARY = range(3)  # what the other row of codes is; as in the source


@dataclass(frozen=True)
class CodedKeys:
    """Rows of codes with room for more: positions 0 .. capacity - 1 of every sequence and KV head."""

    codec: Codec
    codes: mx.array  # uint32 [B, H_kv, capacity, words]
    scales: mx.array | None  # float16 [B, H_kv, capacity]; None for rows of mean square 1


def turboquant_attention(
    q: mx.array,
    keys: CodedKeys,
    values: CodedKeys | None,
    rotary: CodedKeys | None,
    q_rotary: mx.array | None,
    *,
    scale: float,
    start: int,
    length: int,
    first: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """(out float32 [B, H, L, D], lse float32 [B, H, L]): a partial over coded positions, for `merge_partials`.

    q [B, H, L, D] is rotated for the codec of the keys; gains are applied here. Without `values` one vector serves as
    key and value. `rotary`, a second coded row per position, adds its product with q_rotary [B, H, L, D_rotary],
    rotated for its codec, to the score:

        score = scale * (key_gain q.k + rotary_gain q_rotary.k_rotary)

    out is the weighted mean of the value rows times their gain, still rotated for the codec of the values: rotate back
    once, after merging. Row b of the batch sees positions max(start, first[b]) <= t < length (`first` int32 [B] or None
    for no padding); every query sees all of them, since codes lie in the past of a step. A row that sees nothing has
    out 0 and lse MASKED.
    """
    _check(q, keys, values, rotary, q_rotary, start, length)
    _, H, L, _ = q.shape
    rows = H // keys.codes.shape[1] * L
    small = L <= DECODE_QUERIES and rows <= DECODE_ROWS
    if length <= start or not (small and backend.use_metal("turboquant_attention")):
        # Tiles are decoded by their own kernel where there is Metal.
        return reference.turboquant_attention(
            q,
            keys,
            values,
            rotary,
            q_rotary,
            scale=scale,
            start=start,
            length=length,
            first=first,
            decode=turboquant_decode,
        )
    return _launch(q, keys, values, rotary, q_rotary, scale, start, length, first)


def split_positions(positions: int, threadgroups: int) -> int:
    """Positions per split of a context of `positions`, of which each split costs `threadgroups`: a multiple of TILE.

    As many splits as keep the GPU busy, but none shorter than SPLIT_POSITIONS unless it is the only one: beyond that
    partial results cost more than they gain.
    """
    splits = max(1, min(THREADGROUPS // threadgroups, positions // SPLIT_POSITIONS))
    return -(-positions // (splits * TILE)) * TILE


def _check(
    q: mx.array,
    keys: CodedKeys,
    values: CodedKeys | None,
    rotary: CodedKeys | None,
    q_rotary: mx.array | None,
    start: int,
    length: int,
) -> None:
    if (rotary is None) != (q_rotary is None):
        raise UsageError("rotary codes and rotated queries come together")
    if values is None and keys.scales is not None:
        raise UsageError("one vector for key and value is coded without scales")
    if values is not None and (rotary is not None or values.codec.width != keys.codec.width):
        raise UsageError("separate values are as wide as the keys and have no rotary codes beside them")
    if q.shape[-1] != keys.codec.width or q.shape[1] % keys.codes.shape[1]:
        raise UsageError(f"queries {q.shape} do not fit codes {keys.codes.shape} of width {keys.codec.width}")
    for rows in (values, rotary):
        if rows is not None and rows.codes.shape[:3] != keys.codes.shape[:3]:
            raise UsageError(f"codes {rows.codes.shape} lie beside keys {keys.codes.shape}: other heads or capacity")
    if rotary is not None and q_rotary is not None and q_rotary.shape != (*q.shape[:3], rotary.codec.width):
        raise UsageError(f"rotated queries {q_rotary.shape} do not fit codes of width {rotary.codec.width}")
    if start < 0 or length > keys.codes.shape[2]:
        raise UsageError(f"positions {start} to {length} of a buffer of {keys.codes.shape[2]}")


def _launch(
    q: mx.array,
    keys: CodedKeys,
    values: CodedKeys | None,
    rotary: CodedKeys | None,
    q_rotary: mx.array | None,
    scale: float,
    start: int,
    length: int,
    first: mx.array | None,
) -> tuple[mx.array, mx.array]:
    B, H, L, D = q.shape
    kv_heads = keys.codes.shape[1]
    rows = H // kv_heads * L
    # Half holds what bfloat16 queries hold, more precisely, up to 65504; they come out of a norm.
    T = mx.float32 if q.dtype == mx.float32 else mx.float16

    def prepared(x: mx.array, codec: Codec) -> mx.array:
        return (x.astype(mx.float32) * (scale * codec.key_gain)).astype(T)

    groups = max(LEAST_GROUPS, D // SIMD_WIDTH)
    blocks = min(-(-rows // 8), MOST_BLOCKS, LANE_SUMS * groups * 4 // D)
    row_groups = -(-rows // (8 * blocks))
    per_split = split_positions(length - start, row_groups * kv_heads * B)
    splits = -(-(length - start) // per_split)

    one = keys if values is None else values
    kind, other = (VALUES, values) if values is not None else (ROTARY, rotary) if rotary is not None else (NONE, keys)
    assert other is not None
    if kind == ROTARY and other.codec.width % (8 * groups):
        raise UsageError(f"rotary codes of width {other.codec.width} beside keys of width {D}")
    unused = mx.zeros((1,), dtype=mx.float16)
    kernel = backend.metal_kernel(
        "turboquant_attention", INPUTS, ["out", "lse"], ["turboquant", "turboquant_attention"]
    )
    out, lse = kernel(
        inputs=[
            prepared(q, keys.codec),
            unused if rotary is None or q_rotary is None else prepared(q_rotary, rotary.codec),
            keys.codes,
            unused if keys.scales is None else keys.scales,
            keys.codec.codebook,
            other.codes,
            unused if other.scales is None else other.scales,
            other.codec.codebook,
            mx.array([start, length, per_split, rows], dtype=mx.int32),
            mx.zeros((1,), dtype=mx.int32) if first is None else first,
            mx.array([one.codec.value_gain], dtype=mx.float32),
        ],
        template=[
            ("T", T),
            ("D", D),
            ("KV", keys.codec.pair_bits),
            ("L", keys.codec.window_bits),
            ("KEY_SCALED", keys.scales is not None),
            ("OTHER", kind),
            ("OTHER_D", other.codec.width),
            ("OTHER_KV", other.codec.pair_bits),
            ("OTHER_L", other.codec.window_bits),
            ("OTHER_SCALED", other.scales is not None),
            ("OWN_TABLE", (other.codec.bits, other.codec.mode) != (keys.codec.bits, keys.codec.mode)),
            ("FIRST", first is not None),
            ("GROUPS", groups),
            ("ROW_BLOCKS", blocks),
        ],
        grid=(splits * 32 * groups, kv_heads, B * row_groups),
        threadgroup=(32 * groups, 1, 1),
        output_shapes=[(splits, B, H, L, D), (splits, B, H, L)],
        output_dtypes=[mx.float32, mx.float32],
    )
    return (out[0], lse[0]) if splits == 1 else merge_partials(out, lse)
