"""The codec in plain MLX ops: path search, packing, unpacking. Rows in, rows out; the formats are `turboquant.py`'s.

Viterbi's algorithm on a shift register. The window of L bits at a step splits three ways: its low L - kv bits
(`carried`) are the high bits of the window before, its high L - kv bits are what the next step will carry, and in
between lie bits that no neighbour sees. The best entry over those is found for every step at once; only the carried
bits need a step by step search, over 2**(L - kv) partial paths.
"""

from functools import cache
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from .flash_attention import wait_for

if TYPE_CHECKING:
    from ..turboquant import Codec

# Rows searched at a time. Bounds scratch: at width 512 and 2 bits, the most, costs of 1,024 entries over 256 steps are
# 67 MB.
ROWS = 64
# Slabs that may wait to be computed: each is a graph of some thousand operations, which takes memory as well.
LAZY_SLABS = 16
LARGEST_SCALE = 65504.0  # of float16


def encode(codec: "Codec", x: mx.array, unit: bool) -> tuple[mx.array, mx.array | None]:
    """As `turboquant.encode`."""
    from ..turboquant import rotate

    shape = x.shape[:-1]
    if x.size == 0:
        return mx.zeros((*shape, codec.words), dtype=mx.uint32), None if unit else mx.zeros(shape, dtype=mx.float16)
    x = x.reshape(-1, codec.width).astype(mx.float32)
    scales = None
    if not unit:
        scales = mx.minimum(mx.sqrt(mx.square(x).mean(axis=-1)), LARGEST_SCALE).astype(mx.float16)
        divisor = scales.astype(mx.float32)[:, None]
        x = mx.where(divisor > 0, x / mx.where(divisor > 0, divisor, 1.0), 0.0)
        scales = scales.reshape(shape)
    # Coordinates 8f + 2j + c in the order of the stream: j, f, c.
    pairs = rotate(codec, x).reshape(-1, codec.width // 8, 4, 2).swapaxes(1, 2).reshape(-1, codec.width // 2, 2)
    slabs = []
    for start in range(0, pairs.shape[0], ROWS):
        slab = wait_for(pairs[start : start + ROWS], slabs[-1] if slabs else None)
        slabs.append(pack(codec, best_path(slab, codec.codebook, codec.pair_bits)))
        if len(slabs) % LAZY_SLABS == 0:
            mx.eval(slabs[-1])
    return mx.concatenate(slabs).reshape(*shape, codec.words), scales


def best_path(pairs: mx.array, codebook: mx.array, pair_bits: int) -> mx.array:
    """The table indices whose entries lie closest to pairs [R, T, 2] among all paths: uint32 [R, T].

    Rows are the last axis of everything below, so that each minimum over entries runs along whole vectors of rows.
    """
    table = codebook.astype(mx.float32)
    window = table.shape[0].bit_length() - 1
    carried, new = window - pair_bits, pair_bits
    rows, steps, _ = pairs.shape
    # |x - c|^2 without |x|^2, which no choice changes.
    affine = mx.concatenate([-2.0 * table, mx.square(table).sum(-1, keepdims=True)], axis=1)
    inputs = mx.concatenate([pairs, mx.ones((rows, steps, 1))], axis=-1)
    if carried == 0:
        return mx.argmin(inputs @ affine.T, axis=-1).astype(mx.uint32)
    inputs = inputs.transpose(1, 2, 0)
    states, low = 1 << carried, 1 << min(carried, new)
    free = (1 << window) // (states * low)  # entries that differ only in bits no neighbour sees
    best = mx.concatenate([mx.zeros((1, rows)), mx.full((states - 1, rows), 1e30)])
    costs, before = [], []
    for t in range(steps):
        cost = (affine @ inputs[t]).reshape(states, free, low, rows)
        cost = cost.min(axis=1) if free > 1 else cost[:, 0]
        costs.append(cost)
        before.append(best)
        # The state a window came from is its low `carried` bits, of which `low` counts the lowest.
        came = best.reshape(1, -1, low, rows)
        best = (cost.reshape(-1, came.shape[1], low, rows) + came).min(axis=2).reshape(states, rows)
    state = mx.argmin(best, axis=0, keepdims=True)
    left, taken = [], []  # per step, last first: the state left behind, the lowest bits of the window
    for t in reversed(range(steps)):
        cost, came = mx.take_along_axis(costs[t], state[None], axis=0)[0], before[t]
        if states > low:
            above = state % (states // low) * low
            came = mx.take_along_axis(came, above + mx.arange(low, dtype=mx.uint32)[:, None], axis=0)
        choice = mx.argmin(cost + came, axis=0, keepdims=True)
        left.append(state)
        taken.append(choice)
        state = choice if states == low else above + choice
    high, lowest = (mx.concatenate(bits[::-1]).T for bits in (left, taken))
    if free == 1:
        return high * low + lowest
    subsets = table.reshape(states, free, low, 2).transpose(0, 2, 3, 1).reshape(-1, 2, free)
    distance = mx.square(pairs[:, :, :, None] - subsets[high * low + lowest]).sum(axis=2)
    return (high * free + mx.argmin(distance, axis=-1)) * low + lowest


def pack(codec: "Codec", windows: mx.array) -> mx.array:
    """Table indices [R, T] -> rows of the stream, uint32 [R, words]."""
    new = windows >> (codec.window_bits - codec.pair_bits)
    bits = (new[:, :, None] >> mx.arange(codec.pair_bits, dtype=mx.uint32)) & 1
    bits = mx.pad(bits.reshape(new.shape[0], -1), [(0, 0), (0, 32 * codec.words - codec.width * codec.pair_bits // 2)])
    return (bits.reshape(-1, codec.words, 32) << mx.arange(32, dtype=mx.uint32)).sum(axis=-1)


def decode(codec: "Codec", codes: mx.array, scales: mx.array | None, dtype: mx.Dtype, gain: float = 1.0) -> mx.array:
    """As `turboquant.decode`; `gain` multiplies every coordinate."""
    words, shifts = _places(codec)
    # For each word the 64 bits that end with it; before the first lie zeros.
    before = mx.pad(codes[..., :-1], [(0, 0)] * (codes.ndim - 1) + [(1, 0)])
    bits = before.astype(mx.uint64) | (codes.astype(mx.uint64) << 32)
    # take_along_axis rather than take: a tenth of the time on a CPU.
    bits = mx.take_along_axis(bits, words.reshape((1,) * (codes.ndim - 1) + (-1,)), axis=-1)
    windows = ((bits >> shifts).astype(mx.uint16) & ((1 << codec.window_bits) - 1)).flatten()
    # Both halves of an entry in one gather, in the type in which they are wanted or scaled.
    table = (codec.codebook.astype(mx.float32) * gain).astype(dtype if scales is None else mx.float32)
    entries = table.view(mx.uint64 if table.dtype == mx.float32 else mx.uint32)[:, 0]
    rows = mx.take_along_axis(entries, windows, axis=0).view(table.dtype).reshape(*codes.shape[:-1], codec.width)
    if scales is None:
        return rows
    return (rows * scales[..., None].astype(mx.float32)).astype(dtype)


@cache
def _places(codec: "Codec") -> tuple[mx.array, mx.array]:
    """For each pair in coordinate order: the word its window ends in, and where in the 64 bits up to there."""
    pair = np.arange(codec.width // 2)
    end = codec.pair_bits * (codec.width // 8 * (pair % 4) + pair // 4 + 1)
    word = (end - 1) // 32
    return mx.array(word.astype(np.uint32)), mx.array((32 + end - 32 * word - codec.window_bits).astype(np.uint64))
