"""Attention over segments of the keys: partial results and their log-sum-exp, against a float64 brute force."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma4.kernels.flash_attention import attend_partial
from mlx_gemma4.kernels.reference import flash_attention as reference
from mlx_gemma4.kernels.reference.flash_attention import MASKED


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 keys and a few queries, so that little work crosses many of them."""
    monkeypatch.setattr(reference, "KEY_TILE", 16)
    monkeypatch.setattr(reference, "MAX_QUERY_TILE", 8)
    monkeypatch.setattr(reference, "MIN_WINDOWED_TILE", 4)
    monkeypatch.setattr(reference, "TILE_ELEMENTS", 1 << 10)


def slow_partial(q, keys, values, *, q_start, k_start=0, window=None, first_visible=None, visible=None, scale=1.0):
    """(out, lse) in float64, all scores at once; -inf and 0 for a row that sees nothing."""
    B, H, L, _ = q.shape
    G, T = H // keys.shape[1], keys.shape[2]
    keys, values = (np.repeat(x.astype(np.float64), G, axis=1) for x in (keys, values))
    p, t = q_start + np.arange(L)[:, None], k_start + np.arange(T)[None]
    seen = np.broadcast_to(t <= p, (B, 1, L, T)).copy()
    if window is not None:
        seen &= t > p - window
    if first_visible is not None:
        seen &= (t[0] >= np.array(first_visible)[:, None])[:, None, None]
    if visible is not None:
        seen &= visible[:, None, None]
    seen = np.broadcast_to(seen, (B, H, L, T))
    scores = scale * q.astype(np.float64) @ keys.swapaxes(-1, -2)
    weights = np.where(seen, np.exp(scores), 0)  # drawn scores are small enough for plain exponentials
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        return weights @ values / np.where(total > 0, total, 1), np.log(total[..., 0])


@pytest.mark.parametrize("seed", range(24))
def test_against_brute_force(seed, small_tiles):
    """Shapes, offsets, windows, padding and hidden positions by lot; rows that see nothing among them."""
    rng = np.random.default_rng(seed)
    B, kv_heads, G = int(rng.integers(1, 4)), int(rng.choice([1, 2])), int(rng.choice([1, 2, 8]))
    D, L, past = int(rng.choice([4, 20])), int(rng.integers(1, 30)), int(rng.integers(0, 60))
    T, k_start = int(rng.integers(1, 50)), int(rng.integers(0, past + L + 3))
    options = {
        "q_start": past,
        "k_start": k_start,
        "window": int(rng.integers(1, 40)) if rng.random() < 0.5 else None,
        "scale": float(rng.choice([1.0, 0.5])),
    }
    first = rng.integers(0, past + L + 1, B).astype(np.int32) if rng.random() < 0.5 else None
    visible = rng.random((B, T)) < 0.6 if rng.random() < 0.5 else None
    q, keys, values = (
        rng.standard_normal(s, np.float32) for s in ((B, kv_heads * G, L, D), *2 * ((B, kv_heads, T, D),))
    )
    true_out, true_lse = slow_partial(q, keys, values, first_visible=first, visible=visible, **options)
    out, lse = attend_partial(
        *(mx.array(x) for x in (q, keys, values)),
        first_visible=None if first is None else mx.array(first),
        visible=None if visible is None else mx.array(visible),
        **options,
    )
    assert out.dtype == lse.dtype == mx.float32
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    out, lse = np.array(out), np.array(lse)
    blind = np.isinf(true_lse)
    assert (lse[blind] == np.float32(MASKED)).all() and (out[blind] == 0).all()
    assert np.abs(lse[~blind] - true_lse[~blind]).max(initial=0) <= 1e-5
    assert np.abs(out - true_out).max() <= 1e-5


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_segments_merge_to_the_whole(dtype):
    """Sinks, middle and tail, each seen on its own and weighed by exp(lse), are attention over everything."""
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal((2, h, n, 16), np.float32) for h, n in ((4, 5), (2, 60), (2, 60))]
    q, keys, values = (mx.array(x).astype(dtype) for x in arrays)
    first = mx.array([0, 20])
    exact = [np.array(x.astype(mx.float32)) for x in (q, keys, values)]
    truth, _ = slow_partial(*exact, q_start=55, first_visible=np.array(first))
    parts = [
        attend_partial(q, keys[:, :, a:b], values[:, :, a:b], q_start=55, k_start=a, first_visible=first)
        for a, b in ((0, 16), (16, 16), (16, 50), (50, 60))
    ]
    outs, lses = (mx.stack(x) for x in zip(*parts, strict=True))
    weights = mx.softmax(lses, axis=0)[..., None]
    found = np.array((weights * outs).sum(axis=0))
    p, t = 55 + mx.arange(5)[:, None], mx.arange(60)
    mask = (t <= p) & (t >= first[:, None, None, None])
    whole = mx.fast.scaled_dot_product_attention(q, keys, values, scale=1.0, mask=mask)
    theirs = np.abs(np.array(whole.astype(mx.float32)) - truth).max()
    assert np.abs(found - truth).max() <= 2 * theirs + 1e-6
    # Row 1 sees neither the sixteen first positions nor any of the empty segment.
    assert (np.array(lses[0, 1]) == np.float32(MASKED)).all() and (np.array(lses[1]) == np.float32(MASKED)).all()


def test_scratch_of_a_partial_does_not_grow(monkeypatch):
    """The same bound as for whole attention: what is allocated follows the tile, not the context."""
    monkeypatch.setattr(reference, "TILE_ELEMENTS", 1 << 15)
    monkeypatch.setattr(reference, "KEY_TILE", 128)
    monkeypatch.setattr(reference, "MAX_QUERY_TILE", 64)
    found = {}
    for context in (2048, 8192):
        q = mx.random.normal((1, 4, 256, 64))
        keys, values = (mx.random.normal((1, 1, context, 64)) for _ in range(2))
        mx.eval(q, keys, values)
        mx.synchronize()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        out, lse = attend_partial(q, keys, values, q_start=context - 256)
        mx.eval(out, lse)
        mx.synchronize()
        found[context] = mx.get_peak_memory() - before - out.nbytes - lse.nbytes
    assert max(found.values()) <= reference.scratch_bound(1, 4, 1, 64, 256), found
    assert found[8192] <= 1.25 * found[2048] + (64 << 10), found
