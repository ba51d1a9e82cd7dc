"""Tiled attention against a float64 brute force, and its scratch in counted bytes."""

import brute_force
import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma4.cache import KeyForm, OneVectorCache
from mlx_gemma4.config import RopeConfig
from mlx_gemma4.kernels import flash_attention as chooser
from mlx_gemma4.kernels.reference import flash_attention as reference
from mlx_gemma4.kernels.reference.flash_attention import (
    Reader,
    flash_attention,
    plain_reader,
    scratch_bound,
    tile_sizes,
)
from mlx_gemma4.models.rope import Rope


def draw(rng, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 keys and a few queries, so that little work crosses many of them."""
    monkeypatch.setattr(reference, "KEY_TILE", 16)
    monkeypatch.setattr(reference, "MAX_QUERY_TILE", 8)
    monkeypatch.setattr(reference, "MIN_WINDOWED_TILE", 4)
    monkeypatch.setattr(reference, "TILE_ELEMENTS", 1 << 10)


@pytest.mark.parametrize("seed", range(40))
def test_against_brute_force(seed, small_tiles):
    """Shapes, offsets, windows and padding by lot."""
    rng = np.random.default_rng(seed)
    B, kv_heads, G = int(rng.integers(1, 4)), int(rng.choice([1, 2, 4])), int(rng.choice([1, 2, 4, 8]))
    D, L, past = int(rng.choice([4, 8, 20])), int(rng.integers(1, 40)), int(rng.integers(0, 60))
    window = int(rng.integers(1, 40)) if rng.random() < 0.5 else None
    k_start = int(rng.integers(0, past - min(past, window - 1) + 1)) if window else 0
    first_visible = rng.integers(0, past + 1, B).tolist() if rng.random() < 0.5 else None
    scale = float(rng.choice([1.0, 0.5]))
    q = draw(rng, B, kv_heads * G, L, D)
    keys, values = draw(rng, B, kv_heads, past + L - k_start, D), draw(rng, B, kv_heads, past + L - k_start, D)
    options = {"q_start": past, "k_start": k_start, "window": window, "scale": scale}
    truth = brute_force.attention(q, keys, values, first_visible=first_visible, **options)
    visible = None if first_visible is None else mx.array(first_visible)
    arrays = (mx.array(q), mx.array(keys), mx.array(values))
    found = chooser.attend(*arrays, first_visible=visible, **options)
    assert np.abs(np.array(found) - truth).max() <= 1e-5


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("window", [None, 20])
def test_half_precision(dtype, window, small_tiles):
    """At most twice the error of MLX's own attention in the same dtype (the rule of FlashAttention's tests)."""
    rng = np.random.default_rng(1)
    q, keys, values = (mx.array(draw(rng, 2, h, 64, 32)).astype(dtype) for h in (8, 2, 2))
    # The inputs are rounded already, so that only the arithmetic is compared.
    arrays = (np.array(x.astype(mx.float32)) for x in (q, keys, values))
    truth = brute_force.attention(*arrays, q_start=0, window=window)
    p, t = mx.arange(64)[:, None], mx.arange(64)[None]
    mask = (t <= p) if window is None else (t <= p) & (t > p - window)
    theirs = mx.fast.scaled_dot_product_attention(q, keys, values, scale=1.0, mask=mask)
    ours = flash_attention(q, plain_reader(keys, values), q_start=0, window=window)
    assert ours.dtype == dtype
    errors = [np.abs(np.array(x.astype(mx.float32)) - truth).max() for x in (ours, theirs)]
    assert errors[0] <= 2 * errors[1]


def test_real_tile_sizes():
    """More keys and queries than one tile of the published constants holds."""
    rng = np.random.default_rng(2)
    T, L = 2 * reference.KEY_TILE + 300, reference.MAX_QUERY_TILE + 200
    q, keys, values = draw(rng, 1, 2, L, 8), draw(rng, 1, 1, T, 8), draw(rng, 1, 1, T, 8)
    for window in (None, 500):
        truth = brute_force.attention(q, keys, values, q_start=T - L, window=window)
        arrays = (mx.array(q), plain_reader(mx.array(keys), mx.array(values)))
        found = flash_attention(*arrays, q_start=T - L, window=window)
        assert np.abs(np.array(found) - truth).max() <= 1e-5


def test_large_scores():
    """Scores of thousands: exponentials are taken of differences only."""
    rng = np.random.default_rng(3)
    q, keys, values = 40 * draw(rng, 1, 2, 50, 16), 40 * draw(rng, 1, 1, 50, 16), draw(rng, 1, 1, 50, 16)
    truth = brute_force.attention(q, keys, values, q_start=0)
    found = np.array(flash_attention(mx.array(q), plain_reader(mx.array(keys), mx.array(values)), q_start=0))
    assert np.abs(found - truth).max() <= 1e-3


def test_rows_with_nothing_to_see_are_finite(small_tiles):
    """Queries in the padding: their numbers mean nothing, but they are numbers."""
    rng = np.random.default_rng(4)
    q, keys, values = (mx.array(draw(rng, 2, 2, 40, 8)) for _ in range(3))
    found = np.array(flash_attention(q, plain_reader(keys, values), q_start=0, first_visible=mx.array([39, 0])))
    assert np.isfinite(found).all()
    truth = brute_force.attention(*(np.array(x) for x in (q, keys, values)), q_start=0, first_visible=[39, 0])
    assert np.abs(found[0, :, 39:] - truth[0, :, 39:]).max() <= 1e-5
    assert np.abs(found[1] - truth[1]).max() <= 1e-5


def test_keys_in_parts(small_tiles):
    """A reader may hand out each key in pieces, whose products add up."""
    rng = np.random.default_rng(6)
    q, keys, values = (mx.array(draw(rng, 1, h, 50, 12)) for h in (4, 2, 2))
    whole = flash_attention(q, plain_reader(keys, values), q_start=0)
    reader = Reader(
        split=lambda x: (x[..., :5], x[..., 5:]),
        read=lambda a, b, after: ((keys[:, :, a:b, :5], keys[:, :, a:b, 5:]), values[:, :, a:b]),
        length=50,
        kv_heads=2,
    )
    assert mx.abs(flash_attention(q, reader, q_start=0) - whole).max().item() <= 1e-5


def test_gradients_go_through_tiles(small_tiles, monkeypatch):
    """Training on rows longer than a tile: the gradients of one tile that holds everything."""
    rng = np.random.default_rng(9)
    arrays = [mx.array(draw(rng, 1, h, 50, 8)) for h in (4, 2, 2)]
    weight = mx.array(draw(rng, 1, 4, 50, 8))

    def total(q, keys, values):
        return (flash_attention(q, plain_reader(keys, values), q_start=0, window=30) * weight).sum()

    tiled = mx.grad(total, argnums=(0, 1, 2))(*arrays)
    mx.eval(tiled)
    monkeypatch.undo()
    for a, b in zip(tiled, mx.grad(total, argnums=(0, 1, 2))(*arrays), strict=True):
        assert mx.abs(b).max().item() > 0.1
        assert mx.abs(a - b).max().item() <= 1e-4


# ---- scratch: what is allocated besides inputs and output


def scratch(make_reader, heads: int, rows: int, context: int, width: int, dtype: mx.Dtype) -> int:
    """Bytes at the peak of a prefill chunk of `rows` queries at the end of `context`."""
    q = mx.random.normal((1, heads, rows, width)).astype(dtype)
    reader, held = make_reader(context)
    mx.eval(q, *held)
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    out = flash_attention(q, reader, q_start=context - rows)
    mx.eval(out)
    mx.synchronize()
    return mx.get_peak_memory() - before - out.nbytes


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1)], ids=["mha", "gqa4"])
def test_scratch_does_not_grow(monkeypatch, dtype, heads, kv_heads):
    """Tiles made small, so that contexts sixteen times apart take seconds on a CPU; the bound scales with them."""
    monkeypatch.setattr(reference, "TILE_ELEMENTS", 1 << 15)
    monkeypatch.setattr(reference, "KEY_TILE", 128)
    monkeypatch.setattr(reference, "MAX_QUERY_TILE", 64)

    def make_reader(context):
        keys, values = (mx.random.normal((1, kv_heads, context, 64)).astype(dtype) for _ in range(2))
        return plain_reader(keys, values), (keys, values)

    found = {context: scratch(make_reader, heads, 256, context, 64, dtype) for context in (512, 2048, 8192)}
    bound = scratch_bound(1, heads, kv_heads, 64, 256)
    assert max(found.values()) <= bound, found
    assert found[8192] <= 1.25 * found[2048] + (64 << 10), found
    # The bound says something: all scores at once would break it.
    assert 4 * heads * 256 * 8192 > 2 * bound


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_scratch_of_a_whole_chunk(dtype):
    """A chunk of 2,048 rows with the published constants, narrow heads, contexts to 32K, where all scores of one
    chunk are 537 MB.

    Regression: the sums of the weights were left for the end, and the weights of all tiles waited for them.
    """

    def make_reader(context):
        keys, values = (mx.random.normal((1, 1, context, 8)).astype(dtype) for _ in range(2))
        return plain_reader(keys, values), (keys, values)

    found = {context: scratch(make_reader, 2, 2048, context, 8, dtype) for context in (8192, 32768)}
    assert max(found.values()) <= scratch_bound(1, 2, 1, 8, 2048), found
    assert found[32768] <= 1.25 * found[8192], found


def one_vector_scratch(heads: int, kv_heads: int, rows: int, context: int, dtype: mx.Dtype) -> int:
    """As `scratch`, through the view of a one-vector cache of 512-wide heads."""
    form = KeyForm(mx.ones((512,)), Rope(RopeConfig(1e6, "proportional", 0.25), 512))
    cache = OneVectorCache()
    cache.append(mx.random.normal((1, kv_heads, context - rows, 512)).astype(dtype), form)
    view = cache.append(mx.random.normal((1, kv_heads, rows, 512)).astype(dtype), form)
    q = mx.random.normal((1, heads, rows, 512)).astype(dtype)
    form.rope.table(context)  # kept for all layers: no scratch
    mx.eval(q, cache.state)
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    out = view.attend(q)
    mx.eval(out)
    mx.synchronize()
    return mx.get_peak_memory() - before - out.nbytes


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_scratch_at_512_wide_heads(dtype):
    """The width of global layers, one-vector form, keys rebuilt tile by tile, contexts 4K and 16K."""
    heads, rows = 2, 64
    found = {context: one_vector_scratch(heads, 1, rows, context, dtype) for context in (4096, 16384)}
    assert max(found.values()) <= scratch_bound(1, heads, 1, 512, rows), found
    assert found[16384] <= 1.25 * found[4096], found
    # All keys rebuilt at once would be 33 MB in float32.
    assert found[16384] < 16384 * 512 * 4, found


def test_scratch_of_31b():
    """A global layer of 31B, 32 query heads over 4 KV heads of 512: at most 300 MB for a chunk of 2,048 at any context.

    Counted with all of the heads, the published tiles and the queries that share a tile, at 4K, where one tile has
    followed another often enough: 174 MB, and the same at 16K. 128K would take this CPU an hour.
    That the tiles of a chunk's queries follow each other, too, is `test_scratch_of_a_whole_chunk`.
    """
    rows, keys = tile_sizes(2048, 1, 32, None, None)
    assert (rows, keys) == (128, 1024)
    bound = scratch_bound(1, 32, 4, 512, 2048)
    assert one_vector_scratch(32, 4, rows, 4 * keys, mx.float32) <= bound <= 300e6
