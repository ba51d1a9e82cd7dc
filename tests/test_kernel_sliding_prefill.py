"""Windowed attention of many queries: the Metal source, and its reference, against float64."""

from contextlib import nullcontext

import metal_cpu
import mlx.core as mx
import numpy as np
import pytest
from sliding_truth import DTYPES, check, draw, seen

from mlx_gemma4.kernels import backend
from mlx_gemma4.kernels.reference import sliding_prefill as reference
from mlx_gemma4.kernels.sliding_prefill import KEY_TILES, fits_kernel, sliding_prefill

WINDOW = 20


def run(*, L, past=0, k_start=0, window=WINDOW, kv_heads=1, G=2, D=64, dtype=mx.float32, first=None, scale=0.2):
    """One call, compared; -> (B, T)."""
    B = 1 if first is None else len(first)
    T = past + L - k_start
    arrays = draw(L + past, dtype, (B, kv_heads * G, L, D), (B, kv_heads, T, D), (B, kv_heads, T, D))
    visible = None if first is None else mx.array(first)
    found = sliding_prefill(*arrays, scale=scale, q_start=past, k_start=k_start, window=window, first_visible=visible)
    mask = seen(np.arange(past, past + L), np.arange(k_start, past + L), window, first)
    check(found, arrays, np.broadcast_to(mask, (B, L, T)), scale)
    return B, T


EDGES = {
    "one token": dict(L=1),
    "one token late": dict(L=1, past=50, k_start=31),
    "window - 1": dict(L=WINDOW - 1),
    "window": dict(L=WINDOW),
    "window + 1": dict(L=WINDOW + 1),
    "window of 1": dict(L=21, window=1),
    "window wider than all": dict(L=21, window=1000),
    "7 after a full window": dict(L=7, past=60, k_start=41),
    "33 after a full window": dict(L=33, past=60, k_start=41),
    "keys older than any window": dict(L=33, past=40),
    "tile boundary": dict(L=16, past=16, window=16),
    "tile boundary + 1": dict(L=17, past=16, window=16),
    "ragged batch": dict(L=20, past=25, first=[0, 5, 29], kv_heads=2),
    "padding ends at the window's edge": dict(L=20, past=25, first=[5, 6, 7]),
    "all but the last is padding": dict(L=20, first=[19, 0]),
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
    run(L=9, past=13, G=G, kv_heads=2)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_types(metal, dtype):
    run(L=33, past=10, dtype=dtype, kv_heads=2)


@pytest.mark.parametrize(("D", "dtype"), [(32, "float16"), (128, "bfloat16"), (256, "bfloat16"), (256, "float32")])
def test_widths(metal, D, dtype):
    """256 wide at float32: half the rows per threadgroup."""
    run(L=21, past=10, D=D, dtype=DTYPES[dtype], scale=0.1)


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_execution_order(metal, order):
    with nullcontext() if metal is None else metal_cpu.session(order=order, seed=3):
        run(L=33, past=60, k_start=41, kv_heads=2)


def test_large_scores(metal):
    """Scores of thousands: exponentials are taken of differences only."""
    run(L=20, scale=1000.0)


def test_traffic(metal):
    """Queries are read once, keys and values once per tile of rows and only within its window."""
    L, G, D = 64, 2, 64
    _, T = run(L=L, past=100, k_start=0, G=G, D=D)
    if metal is None:
        return
    buffers = metal.last.buffers
    tiles = L * G // 32
    rows_seen = WINDOW + 32 // G - 1  # keys that the 16 positions of one tile see
    for name in ("keys", "values"):
        assert buffers[name].read == tiles * rows_seen * D * 4
        assert buffers[name].read_unique == (WINDOW + L - 1) * D * 4 < T * D * 4
    assert buffers["q"].read == buffers["q"].size
    assert buffers["out"].written == buffers["out"].written_unique == buffers["out"].size


def test_gradients(metal):
    """Training goes through the kernel: the gradients of the reference."""
    arrays = draw(1, mx.float32, (1, 2, 20, 64), (1, 1, 20, 64), (1, 1, 20, 64))

    def total(*x):
        return sliding_prefill(*x, scale=0.2, q_start=0, window=7).square().sum()

    found = mx.grad(total, argnums=(0, 1, 2))(*arrays)
    with backend.forced("reference"):
        expected = mx.grad(total, argnums=(0, 1, 2))(*arrays)
    for a, b in zip(found, expected, strict=True):
        assert mx.abs(b).max().item() > 0.01
        assert mx.allclose(a, b, atol=1e-4).item()


def test_other_shapes_take_the_reference(metal):
    """Widths of test models; a float32 query over bfloat16 keys."""
    q = mx.zeros((1, 2, 5, 80))
    assert not fits_kernel(q, q) and not fits_kernel(q[..., :64], q[..., :64].astype(mx.bfloat16))
    run(L=5, D=80)


def test_tiles_of_the_reference(monkeypatch):
    """Many tiles of queries, with and without images."""
    monkeypatch.setattr(reference, "TILE_ELEMENTS", 256)
    with backend.forced("reference"):
        run(L=33, past=10)


def mutation_check() -> None:
    """One small launch that needs every barrier: four simdgroups that add up scores, several tiles of keys."""
    assert 8 * KEY_TILES < WINDOW
    run(L=20, past=30)
