"""Attention in plain MLX ops, a tile at a time with an online softmax. [B, H, L, D] in, the same out.

This is the reference of the flash-attention kernels and what runs where no fused kernel serves: on CPU and CUDA
builds of MLX, and on Metal for 512-wide heads. It owns tiling, masking and the softmax; how keys and values are stored
is the reader's business (`Reader`), so plain, one-vector and compressed caches share it.

Online softmax: Milakov and Gimelshein 2018, as in FlashAttention (Dao et al. 2022, algorithm 1).

Memory. Scratch is a handful of float32 tiles of at most TILE_ELEMENTS scores, whatever the context length:
`scratch_bound` gives the bytes, and a test counts them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

# Scores per tile, over batch and heads: 2^22 float32 values are 16.8 MB.
TILE_ELEMENTS = 1 << 22
# Keys per tile at least. Large enough that the matmul dominates, small enough that many query rows share a tile.
KEY_TILE = 1024
MAX_QUERY_TILE = 1024
# Query rows per tile in a sliding layer: a tile computes window + rows scores per query, of which window count.
MIN_WINDOWED_TILE = 64

# Rows for which `dot_products` turns the product round on a CPU.
NARROW = range(8, 64)

# A masked score. Finite, so that a row with nothing to see (padding) gives numbers, never NaN.
MASKED = -1e30


@dataclass(frozen=True)
class Reader:
    """How attention reads what a layer remembers.

    The score of query row i with key j is sum over parts p of queries[p][i] . keys[p][j]: one part for ordinary keys,
    two for the one-vector cache, whose rotated dimensions are rebuilt and whose others are read as they lie.
    """

    # q [B, H, L, D] -> one query array per part, each [B, H, L, D_p]
    split: Callable[[mx.array], Sequence[mx.array]]
    # (start, stop) within what is stored -> (one key array [B, H_kv, n, D_p] per part, values [B, H_kv, n, D]).
    # A reader that computes its keys lets them wait for the third argument (`wait_for`), the tile before.
    read: Callable[[int, int, mx.array | None], tuple[Sequence[mx.array], mx.array]]
    # positions stored
    length: int
    kv_heads: int
    # Numbers per key and KV head that `read` computes rather than hands out; they count as scratch.
    rebuilt: int = 0


def wait_for(x: mx.array, earlier: mx.array | None) -> mx.array:
    """x, to be computed after `earlier`.

    MLX orders independent work breadth first: without this, all tiles would be in memory at once.
    """
    return x if earlier is None else mx.depends([x], [earlier])[0]


def on_cpu() -> bool:
    return mx.default_device() == mx.Device(mx.cpu)


def dot_products(q: mx.array, k: mx.array) -> mx.array:
    """Every row of q [..., M, D] with every row of k [..., n, D]: float32 [..., M, n]."""
    if q.shape[-2] in NARROW and on_cpu():
        # The same numbers; in this order the BLAS of MLX's CPU build takes a fifth less time.
        return (k @ mx.contiguous(q.swapaxes(-1, -2))).swapaxes(-1, -2).astype(mx.float32)
    return (q @ k.swapaxes(-1, -2)).astype(mx.float32)


def plain_reader(keys: mx.array, values: mx.array) -> Reader:
    """Keys and values as they are, each [B, H_kv, T, D]."""
    return Reader(
        split=lambda q: (q,),
        read=lambda start, stop, after: ((keys[:, :, start:stop],), values[:, :, start:stop]),
        length=keys.shape[2],
        kv_heads=keys.shape[1],
    )


def tile_sizes(rows: int, batch: int, heads: int, reader: Reader | None, window: int | None) -> tuple[int, int]:
    """(query rows, keys) per tile: batch * heads * rows * keys scores, and what the reader rebuilds, stay within
    TILE_ELEMENTS, as far as one row and KEY_TILE keys allow.
    """
    rows = min(rows, MAX_QUERY_TILE, max(1, TILE_ELEMENTS // (batch * heads * KEY_TILE)))
    if window is not None:
        # r rows compute window + r scores each: few waste least, but many small tiles cost a GPU more.
        rows = min(rows, MIN_WINDOWED_TILE if on_cpu() else max(MIN_WINDOWED_TILE, window // 2))
        if window <= 2 * KEY_TILE:
            # All that these rows see in one tile, so that one softmax serves.
            return max(1, min(rows, TILE_ELEMENTS // (batch * heads * (window + rows)))), window + rows
    if on_cpu():
        # A tile that stays in the processor's cache: one query over 8,192 keys is a third faster than in one piece.
        return rows, KEY_TILE
    # On a GPU fewer, larger kernels: one query takes all its keys in one tile if it can.
    keys = TILE_ELEMENTS // (batch * heads * rows)
    if reader is not None and reader.rebuilt:
        keys = min(keys, TILE_ELEMENTS // (batch * reader.kv_heads * reader.rebuilt))
    return rows, max(KEY_TILE, keys)


def scratch_bound(batch: int, heads: int, kv_heads: int, head_dim: int, rows: int) -> int:
    """Upper bound in bytes of what `flash_attention` allocates besides its inputs and output, for `rows` queries.

    Six float32 tiles of scores, six of keys being rebuilt and eight accumulators; MLX runs operations ahead of their
    turn, so more than the two or three that the formulas need are alive at once (counted on its CPU build). Independent
    of the context length: 268 MB for one sequence of any published size.
    """
    scores = max(TILE_ELEMENTS, batch * heads * KEY_TILE)
    rebuilt = max(TILE_ELEMENTS, batch * kv_heads * KEY_TILE * head_dim)
    lq, _ = tile_sizes(rows, batch, heads, None, None)
    return 4 * (6 * scores + 6 * rebuilt + 8 * batch * heads * lq * head_dim)


def flash_attention(
    q: mx.array,
    reader: Reader,
    *,
    scale: float = 1.0,
    q_start: int,
    k_start: int = 0,
    window: int | None = None,
    first_visible: mx.array | None = None,
) -> mx.array:
    """Causal attention of q [B, H, L, D] at positions q_start + i over stored positions k_start + j.

    Query p sees key t when t <= p, t > p - window (if a window is given) and t >= first_visible[b] (int [B], the left
    padding of each row, if given). Scores and softmax statistics are float32; products are taken in the stored dtype.
    """
    sees = Sight(q_start, k_start, window, first_visible)
    out: list[mx.array] = []
    for tile, lo, hi, keys, at in _query_tiles(q, reader, sees, out):
        out.append(_attend_tile(tile, reader, scale, at, lo, hi, keys)[0].astype(q.dtype))
    return out[0] if len(out) == 1 else mx.concatenate(out, axis=2)


def flash_attention_partial(
    q: mx.array,
    reader: Reader,
    *,
    scale: float = 1.0,
    q_start: int,
    k_start: int = 0,
    window: int | None = None,
    first_visible: mx.array | None = None,
    visible: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """As `flash_attention`, over some of the keys: (out float32 [B, H, L, D], lse float32 [B, H, L]) to be merged.

    out is normalised over what was seen here, lse = log(sum(exp(score))). A query that sees nothing has out 0 and lse
    MASKED. `visible`, boolean [B, T], hides stored positions from every query.
    """
    sees = Sight(q_start, k_start, window, first_visible, visible)
    out: list[mx.array] = []
    lse: list[mx.array] = []
    for tile, lo, hi, keys, at in _query_tiles(q, reader, sees, out):
        if hi > lo:
            tile_out, tile_lse = _attend_tile(tile, reader, scale, at, lo, hi, keys, with_lse=True)
            assert tile_lse is not None
            blind = tile_lse <= MASKED / 2
            tile_out = mx.where(blind[..., None], 0.0, tile_out.astype(mx.float32))
            tile_lse = mx.where(blind, MASKED, tile_lse)
        else:
            tile_out, tile_lse = mx.zeros(tile.shape, mx.float32), mx.full(tile.shape[:-1], MASKED, mx.float32)
        out.append(tile_out)
        lse.append(tile_lse)
    return (out[0], lse[0]) if len(out) == 1 else (mx.concatenate(out, axis=2), mx.concatenate(lse, axis=2))


@dataclass(frozen=True)
class Sight:
    """Which keys the queries from position q_start on may see; the keys are those from position k_start on."""

    q_start: int
    k_start: int
    window: int | None = None
    first_visible: mx.array | None = None  # int [B]
    visible: mx.array | None = None  # boolean [B, T]

    def mask(self, L: int, start: int, stop: int) -> mx.array | None:
        """Of stored keys start .. stop: boolean, broadcastable to [B, H_kv, G, L, n]; None when all L see them all."""
        first, last = self.k_start + start, self.k_start + stop - 1
        causal = last > self.q_start
        windowed = self.window is not None and first <= self.q_start + L - 1 - self.window
        mask = None
        if causal or windowed:
            q_pos = mx.arange(self.q_start, self.q_start + L)[:, None]
            k_pos = mx.arange(first, last + 1)[None]
            mask = k_pos <= q_pos
            if self.window is not None:
                mask = mask & (k_pos + self.window > q_pos)
        if self.first_visible is not None:
            real = mx.arange(first, last + 1) >= self.first_visible[:, None]  # [B, n]
            mask = _and(mask, real[:, None, None, None, :])
        if self.visible is not None:
            mask = _and(mask, self.visible[:, None, None, None, start:stop])
        return mask


def _and(a: mx.array | None, b: mx.array) -> mx.array:
    return b if a is None else a & b


def _query_tiles(
    q: mx.array, reader: Reader, sees: Sight, done: Sequence[mx.array]
) -> Iterator[tuple[mx.array, int, int, int, Sight]]:
    """(queries, first and last stored key they may see, keys per tile, their `Sight`), each after the last `done`."""
    B, H, L, _ = q.shape
    rows, keys = tile_sizes(L, B, H, reader, sees.window)
    # Keys at or after this index are in the future of every query.
    stop = min(reader.length, sees.q_start + L - sees.k_start)
    for i in range(0, L, rows):
        tile = wait_for(q[:, :, i : i + rows], done[-1] if done else None)
        p0, p1 = sees.q_start + i, sees.q_start + min(i + rows, L)  # positions of this tile
        lo = 0 if sees.window is None else max(0, p0 - sees.window + 1 - sees.k_start)
        yield tile, lo, min(stop, p1 - sees.k_start), keys, replace(sees, q_start=p0)


def _attend_tile(
    q: mx.array, reader: Reader, scale: float, sees: Sight, lo: int, hi: int, key_tile: int, with_lse: bool = False
) -> tuple[mx.array, mx.array | None]:
    """(out [B, H, L, D], lse float32 [B, H, L] if asked for) of one tile of queries over stored keys lo .. hi."""
    B, H, L, _ = q.shape
    G = H // reader.kv_heads
    # Query heads of one KV head become rows of one matmul: [B, H_kv, G*L, D_p].
    parts = [(p * scale if scale != 1.0 else p).reshape(B, reader.kv_heads, G * L, -1) for p in reader.split(q)]

    peak: mx.array | None = None
    total = acc = earlier = None
    for start in range(lo, hi, key_tile):
        end = min(start + key_tile, hi)
        keys, values = reader.read(start, end, earlier)
        scores = dot_products(wait_for(parts[0], earlier), keys[0])
        for p, k in zip(parts[1:], keys[1:], strict=True):
            scores = scores + dot_products(p, k)
        visible = sees.mask(L, start, end)
        if visible is not None:
            scores = scores.reshape(B, reader.kv_heads, G, L, end - start)
            scores = mx.where(visible, scores, MASKED).reshape(B, reader.kv_heads, G * L, end - start)
        if hi - lo <= key_tile and not with_lse:
            weights = mx.softmax(scores, axis=-1).astype(values.dtype)
            return (weights @ values).reshape(B, H, L, -1), None
        tile_peak = scores.max(axis=-1, keepdims=True)
        new_peak = tile_peak if peak is None else mx.maximum(peak, tile_peak)
        weights = mx.exp(scores - new_peak)
        tile_total = weights.sum(axis=-1, keepdims=True)
        tile_acc = (weights.astype(values.dtype) @ values).astype(mx.float32)
        if peak is None or total is None or acc is None:
            total, acc = tile_total, tile_acc
        else:
            shrink = mx.exp(peak - new_peak)
            total = total * shrink + tile_total
            acc = acc * shrink + tile_acc
        peak = new_peak
        # The sums, too, before the next tile, or the weights of every tile would wait in memory for them.
        earlier = acc = wait_for(acc, total)
    assert acc is not None and total is not None and peak is not None
    return (acc / total).reshape(B, H, L, -1), (peak + mx.log(total)).reshape(B, H, L) if with_lse else None
