"""The flash_prefill kernel against float32 truth: edges by name, what it reads, its gradient."""

from contextlib import nullcontext

import metal_cpu
import mlx.core as mx
import numpy as np
import pytest
from flash_cases import Case, Drawn

from mlx_gemma4.kernels import backend, flash_prefill
from mlx_gemma4.kernels.flash_attention import attend
from mlx_gemma4.kernels.reference.flash_attention import MASKED


def run(drawn: Drawn, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    out, lse = flash_prefill.flash_prefill(drawn.q, drawn.keys, drawn.values, drawn.form, dtype=dtype, **drawn.where)
    assert backend.status()["flash_prefill"] == "metal"
    return out, lse


EDGES = {
    "one-token": Case(D=128),
    "seven": Case(L=7, past=5),
    "33": Case(L=33, G=2),
    "33-after-a-context": Case(L=33, past=47, G=4, kv_heads=2, spare=16),
    "block-of-rows": Case(L=4, past=12),
    "block-of-rows-and-one": Case(L=5, past=11),
    "tile-less-one": Case(L=15, G=2, D=128),
    "tile": Case(L=16, G=2, D=128),
    "tile-and-one": Case(L=17, G=2, D=128),
    "capacity-used-up": Case(L=12, past=20),
    "ragged": Case(L=20, past=30, kv_heads=2, G=2, first=(0, 33, 48, 16)),
    "gqa-16": Case(L=9, past=3, G=16, D=256),
    "heads-do-not-divide-the-block": Case(L=23, G=3, D=128),
    "one-head-each": Case(L=40, G=1, D=128, kv_heads=2),
    "float16": Case(L=9, past=20, dtype=mx.float16),
    "float32": Case(L=9, past=20, dtype=mx.float32, kv_heads=2),
    "width-64": Case(L=33, D=64, G=2, past=3),
    "width-256": Case(L=12, D=256, past=9, first=(2, 11)),
    "not-the-first-keys": Case(L=20, past=30, k_start=25, D=128, first=(0, 40)),
    "segment-before-the-queries": Case(past=50, L=20, gap=25, D=128, first=(0, 30)),
    "keys-before-position-0": Case(past=5, k_start=-16, L=20, D=128, G=2),
    "keys-in-the-future": Case(past=20, L=20, gap=-50, D=128, G=2),
    "scaled": Case(L=20, scale=0.25, D=128, dtype=mx.float32),
    "one-vector": Case(L=20, past=45, one_vector=True, kv_heads=2),
    "one-vector-ragged": Case(L=20, past=45, one_vector=True, G=2, first=(0, 50, 20)),
    "one-vector-float32": Case(L=9, past=20, one_vector=True, dtype=mx.float32),
    "one-vector-width-128": Case(L=20, past=12, one_vector=True, G=2, D=128),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges(metal, name):
    drawn = Drawn(EDGES[name])
    out, lse = run(drawn, EDGES[name].dtype)
    assert out.dtype == EDGES[name].dtype and lse.dtype == mx.float32
    drawn.check(out)


def test_partial_result(metal):
    """In float32 with its log-sum-exp; rows in the padding have 0 and MASKED."""
    drawn = Drawn(EDGES["ragged"])
    out, lse = run(drawn, mx.float32)
    arrays = [x.astype(mx.float32) for x in (drawn.q, drawn.keys, drawn.values)]
    true_out, true_lse = flash_prefill.reference(*arrays, **drawn.where)
    assert mx.abs(out - true_out).max().item() <= 2e-5
    blind = np.array(true_lse) <= MASKED / 2
    assert blind.any() and (np.array(lse)[blind] == np.float32(MASKED)).all()
    assert np.abs(np.array(lse - true_lse))[~blind].max() <= 1e-4


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("name", ["block-of-rows-and-one", "one-vector-ragged"])
def test_any_order_of_threads(metal, order, name):
    with nullcontext() if metal is None else metal_cpu.session(order=order, seed=1):
        drawn = Drawn(EDGES[name])
        drawn.check(run(drawn, EDGES[name].dtype)[0])


@pytest.mark.parametrize("one_vector", [False, True], ids=["plain", "one-vector"])
def test_what_is_read(metal, one_vector):
    """A block of 32 rows, here 4 queries of 8 heads, reads what they see once, and nothing in their future."""
    case = Case(past=60, L=8, kv_heads=2, spare=64, one_vector=one_vector)
    run(Drawn(case), case.dtype)
    if metal is None:
        return
    kernel = metal.last
    row = 512 * 2
    keys, values = kernel.buffers["keys"], kernel.buffers["values"]
    # Tiles of 16: the first block sees 64 keys, the second 68, of which the last is read in place of what follows.
    assert keys.read_unique == 2 * 68 * row
    assert keys.read == 2 * (64 + 80) * row
    assert (values.read_unique, values.read) == ((0, 0) if one_vector else (keys.read_unique, keys.read))
    assert kernel.unwritten == 0


def test_gradient_is_the_references(metal):
    """Training on a Mac goes through the kernel and back through plain ops."""
    rng = np.random.default_rng(3)
    q, keys, values = (mx.array(rng.standard_normal((1, h, 12, 64), np.float32)) for h in (8, 1, 1))
    weight = mx.array(rng.standard_normal(q.shape, np.float32))

    def total(q, keys, values):
        return (attend(q, keys, values, scale=0.1, q_start=0) * weight).sum()

    found = mx.grad(total, argnums=(0, 1, 2))(q, keys, values)
    assert backend.status()["flash_prefill"] == "metal"
    with backend.forced("reference"):
        expected = mx.grad(total, argnums=(0, 1, 2))(q, keys, values)
    for a, b in zip(found, expected, strict=True):
        assert mx.abs(b).max().item() > 0.1
        assert mx.abs(a - b).max().item() <= 1e-4


def mutation_check() -> None:
    """Several tiles of rows and keys, plain and one vector."""
    for case in (Case(L=20, past=45, D=128, G=2), Case(L=20, past=12, one_vector=True, D=128, G=2)):
        drawn = Drawn(case)
        drawn.check(run(drawn, mx.float32)[0])
