"""Windowed attention of a few queries over a ring: the Metal source, and its reference, against float64."""

from contextlib import nullcontext

import metal_cpu
import mlx.core as mx
import numpy as np
import pytest
from sliding_truth import DTYPES, check, draw, seen

from mlx_gemma4.cache import SlidingCache
from mlx_gemma4.kernels import backend, sliding_attention
from mlx_gemma4.kernels.sliding_decode import sliding_decode

WINDOW = 40


def run(*, newest, L=1, capacity=WINDOW, window=WINDOW, kv_heads=1, G=2, D=64, dtype=mx.float32, first=None, scale=0.2):
    """One call over a ring with `capacity` slots whose unused ones hold infinities, compared; -> slots used."""
    B = 1 if first is None else len(first)
    used = min(newest + 1, capacity)
    q, keys, values = draw(newest, dtype, (B, kv_heads * G, L, D), (B, kv_heads, used, D), (B, kv_heads, used, D))
    positions = np.arange(newest + 1 - used, newest + 1)
    slots = mx.array(positions % capacity)
    rings = []
    for x in (keys, values):
        ring = mx.full((B, kv_heads, capacity, D), float("inf"), dtype)
        ring[:, :, slots] = x
        rings.append(ring)
    visible = None if first is None else mx.array(first)
    found = sliding_decode(
        q,
        *rings,
        scale=scale,
        newest=newest,
        newest_slot=newest % capacity,
        used=used,
        window=window,
        first_visible=visible,
    )
    mask = seen(np.arange(newest + 1 - L, newest + 1), positions, window, first)
    check(found, [q, keys, values], np.broadcast_to(mask, (B, L, used)), scale)
    return used


EDGES = {
    "one token": dict(newest=0),
    "window - 1": dict(newest=WINDOW - 2),
    "window": dict(newest=WINDOW - 1),
    "window + 1: the first slot is written over": dict(newest=WINDOW),
    "ring wrapped twice": dict(newest=2 * WINDOW + 13),
    "a ring still growing": dict(newest=9, capacity=16),
    "slots older than the window": dict(newest=100, capacity=64),
    "window of 1": dict(newest=9, window=1, capacity=1),
    "a tile exactly": dict(newest=31, capacity=32, window=32),
    "a tile + 1": dict(newest=32, capacity=33, window=33),
    "ragged batch": dict(newest=30, first=[0, 7, 30], kv_heads=2),
    "ragged batch, wrapped": dict(newest=50, first=[0, 12, 45], kv_heads=2),
    "7 queries": dict(newest=70, L=7, capacity=WINDOW + 6),
    "8 queries": dict(newest=70, L=8, capacity=WINDOW + 7),
    "8 queries, the first of all": dict(newest=7, L=8),
    "5 queries, ragged": dict(newest=60, L=5, capacity=WINDOW + 4, first=[0, 58, 30]),
}


@pytest.mark.parametrize("case", EDGES.values(), ids=EDGES.keys())
def test_edges(metal, case):
    run(**case)
    if metal is not None:
        assert metal.last.errors == [] and metal.last.unwritten == 0


@pytest.mark.parametrize("case", EDGES.values(), ids=EDGES.keys())
def test_reference(case):
    with backend.forced("reference"):
        run(**case)


@pytest.mark.parametrize("G", [1, 2, 4, 8, 16])
def test_heads_per_kv_head(metal, G):
    run(newest=90, G=G, kv_heads=2)


@pytest.mark.parametrize("G", [4, 8])
def test_eight_queries(metal, G):
    """32 rows of one threadgroup; 64, in two."""
    run(newest=90, L=8, G=G, capacity=WINDOW + 7)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_types(metal, dtype):
    run(newest=90, dtype=dtype, kv_heads=2)


@pytest.mark.parametrize(("D", "dtype"), [(32, "float16"), (128, "bfloat16"), (256, "bfloat16"), (256, "float32")])
def test_widths(metal, D, dtype):
    """Two tiles of rows: half the columns for each simdgroup."""
    run(newest=90, L=8, D=D, dtype=DTYPES[dtype], scale=0.1, capacity=WINDOW + 7)


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("L", [1, 8])
def test_execution_order(metal, L, order):
    with nullcontext() if metal is None else metal_cpu.session(order=order, seed=3):
        run(newest=200, L=L, capacity=107, window=100, kv_heads=2)


def test_large_scores(metal):
    run(newest=90, scale=1000.0)


@pytest.mark.parametrize(("L", "G"), [(1, 8), (1, 16), (8, 4)])
def test_traffic(metal, L, G):
    """Every byte of a used key and value is read once for all queries and heads; unused slots not at all."""
    used = run(newest=49, L=L, G=G, capacity=64, window=64)
    if metal is not None:
        buffers = metal.last.buffers
        for name in ("keys", "values"):
            assert buffers[name].read == buffers[name].read_unique == used * 64 * 4
        assert buffers["q"].read == buffers["q"].size
        assert buffers["out"].written == buffers["out"].written_unique == buffers["out"].size


def feed(left_padding, steps) -> list[mx.array]:
    """What a cache of window 20 answers to steps of these lengths."""
    rng = np.random.default_rng(8)
    cache = SlidingCache(20, left_padding)
    out = []
    for L in steps:
        q, k, v = (mx.array(rng.standard_normal((len(left_padding), h, L, 64), np.float32)) for h in (4, 2, 2))
        out.append(cache.append(k, v).attend(q, 0.3))
    return out


def test_cache_on_kernels(metal):
    """A padded batch through prefill, single tokens past the wrap, a draft being verified: as the reference answers."""
    steps = [13, 1, 1, 9, 1, 1, 5, 1, 1, 8]
    padding = [0, 4, 11]
    found = feed(padding, steps)
    mx.eval(found)
    if metal is not None:
        assert {r.name.removeprefix("gemma4_") for r in metal.reports} == {"sliding_prefill", "sliding_decode"}
        assert len(metal.reports) == len(steps)
    with backend.forced("reference"):
        expected = feed(padding, steps)
    position = 0
    for L, a, b in zip(steps, found, expected, strict=True):
        for row, first in enumerate(padding):
            hidden = max(0, min(L, first - position))
            assert mx.abs(a - b)[row, :, hidden:].max().item() <= 1e-5 if hidden < L else True
        position += L


def test_plain_query_takes_the_fused_kernel_of_mlx(monkeypatch):
    """On Metal, one query over a ring without padding is MLX's business."""
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(sliding_attention.decode, "sliding_decode", lambda *a, **k: pytest.fail("not this one"))
    q, keys = mx.zeros((1, 2, 1, 64)), mx.zeros((1, 1, 40, 64))
    assert sliding_attention.attend_ring(q, keys, keys, newest=50, window=40).shape == q.shape


def mutation_check() -> None:
    """One small launch that needs every barrier: four groups of two simdgroups, several rounds of slots, a merge."""
    run(newest=150, L=8, capacity=127, window=120)
