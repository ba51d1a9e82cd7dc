"""Merging partial attention: the reference against a softmax over everything, the Metal source against float64."""

from contextlib import nullcontext

import metal_cpu
import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma4.kernels import backend
from mlx_gemma4.kernels.merge_partials import merge_partials
from mlx_gemma4.kernels.reference.flash_attention import MASKED


@pytest.fixture(params=["reference", "kernel"])
def path(request):
    """Every case both ways; the session of the kernel, or None."""
    if request.param == "kernel":
        yield request.getfixturevalue("metal")
    else:
        with backend.forced("reference"):
            yield None


def parts(splits: int, *shape: int, width: int = 32, spread: float = 3.0) -> tuple[mx.array, mx.array]:
    rng = np.random.default_rng(1)
    outs = mx.array(rng.standard_normal((splits, *shape, width)).astype(np.float32))
    return outs, mx.array(rng.normal(0, spread, (splits, *shape)).astype(np.float32))


def check(outs: mx.array, lses: mx.array, session) -> tuple[mx.array, mx.array]:
    """Against float64, within twice the error of plain operations."""
    found = merge_partials(outs, lses)
    o, weights = np.array(outs).astype(np.float64), np.array(lses).astype(np.float64)
    peak = weights.max(0)
    weights = np.exp(weights - peak)
    truth = (weights[..., None] * o).sum(0) / weights.sum(0)[..., None], peak + np.log(weights.sum(0))
    with backend.forced("reference"):
        plain = merge_partials(outs, lses)
    for ours, theirs, true in zip(found, plain, truth, strict=True):
        allowed = 2 * np.abs(np.array(theirs) - true).max() + 1e-6
        assert ours.dtype == mx.float32 and np.abs(np.array(ours) - true).max() <= allowed
    if session is not None:
        assert session.last.name == "gemma4_merge_partials"
        assert session.last.errors == [] and session.last.unwritten == 0
    return found


@pytest.mark.parametrize("splits", [1, 2, 3, 33])
def test_any_number_of_splits(path, splits):
    check(*parts(splits, 1, 4, 1), path)


@pytest.mark.parametrize("width", [32, 64, 256, 512])
def test_every_width(path, width):
    check(*parts(3, 2, 2, 3, width=width), path)


def test_a_softmax_in_pieces(path):
    """Pieces of one attention, of unequal length, join to the whole."""
    rng = np.random.default_rng(2)
    scores, values = rng.normal(0, 2, (1, 2, 3, 50)), rng.standard_normal((50, 32))
    outs, lses = [], []
    for piece in (slice(0, 1), slice(1, 20), slice(20, 50)):
        weights = np.exp(scores[..., piece])
        outs.append(weights @ values[piece] / weights.sum(-1, keepdims=True))
        lses.append(np.log(weights.sum(-1)))
    out, lse = merge_partials(*(mx.array(np.stack(x).astype(np.float32)) for x in (outs, lses)))
    weights = np.exp(scores)
    assert np.abs(np.array(out) - weights @ values / weights.sum(-1, keepdims=True)).max() <= 1e-6
    assert np.abs(np.array(lse) - np.log(weights.sum(-1))).max() <= 1e-6


def test_a_piece_that_saw_nothing(path):
    outs, lses = parts(3, 1, 2, 1)
    empty = mx.array([False, True, False])[:, None, None, None]
    out, lse = check(mx.where(empty[..., None], 0.0, outs), mx.where(empty, MASKED, lses), path)
    without = merge_partials(outs[::2], lses[::2])
    assert mx.allclose(out, without[0], atol=1e-6) and mx.allclose(lse, without[1], atol=1e-6)


def test_nothing_seen_anywhere(path):
    out, lse = merge_partials(mx.zeros((3, 1, 2, 1, 32)), mx.full((3, 1, 2, 1), MASKED))
    assert not out.any() and (lse == MASKED).all()


@pytest.mark.parametrize("level", [-2000.0, 2000.0], ids=["far below", "far above"])
def test_scores_beyond_the_range_of_exp(path, level):
    outs, lses = parts(3, 1, 2, 1)
    out, lse = merge_partials(outs, lses + level)
    same, _ = merge_partials(outs, lses)
    assert mx.allclose(out, same, atol=2e-3) and (mx.abs(lse - level) < 20).all()


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_in_any_order(metal, order):
    with nullcontext(metal) if metal is None else metal_cpu.session(order=order) as session:
        check(*parts(5, 2, 2, 2), session)


def test_each_byte_is_read_once(metal):
    outs, lses = parts(4, 1, 2, 2, width=64)
    check(outs, lses, metal)
    if metal is not None:
        assert metal.last.buffers["outs"].read == outs.nbytes
