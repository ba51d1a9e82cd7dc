"""Attention on codes in plain operations: what it computes, what it sees, and its scratch in counted bytes."""

import mlx.core as mx
import numpy as np
import pytest
from coded_attention import Case, case, close

from mlx_gemma4.errors import UsageError
from mlx_gemma4.kernels import backend
from mlx_gemma4.kernels.merge_partials import merge_partials
from mlx_gemma4.kernels.reference import flash_attention as tiles
from mlx_gemma4.kernels.reference.flash_attention import MASKED
from mlx_gemma4.kernels.turboquant import BITS, MODES, decode
from mlx_gemma4.kernels.turboquant_attention import (
    SPLIT_POSITIONS,
    THREADGROUPS,
    TILE,
    CodedKeys,
    split_positions,
)


@pytest.fixture(autouse=True)
def reference():
    with backend.forced("reference"):
        yield


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 positions and a few queries, so that little work crosses many of them."""
    monkeypatch.setattr(tiles, "KEY_TILE", 16)
    monkeypatch.setattr(tiles, "MAX_QUERY_TILE", 8)
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 1 << 10)


@pytest.mark.parametrize("one_vector", [True, False], ids=["one vector", "keys and values"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("mode", MODES)
def test_every_format(mode, bits, one_vector, small_tiles):
    c = case(mode=mode, bits=bits, one_vector=one_vector, heads=8, kv_heads=2, length=70)
    close(c, c.attend())


SHAPES = {
    "one position": {"length": 1},
    "one tile": {"length": 16, "queries": 3},
    "one into the next tile": {"length": 17, "start": 16},
    "ragged batch": {"length": 60, "start": 5, "first": [0, 33, 59]},
    "prefill": {"length": 60, "queries": 20, "heads": 8},
    "bits of K and V": {"one_vector": False, "bits": 3, "value_bits": 4},
    "no rotary": {"rotary_width": None},
    "bfloat16": {"dtype": mx.bfloat16, "queries": 2},
    "float16": {"dtype": mx.float16, "one_vector": False},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(shape, small_tiles):
    c = case(**shape)
    close(c, c.attend())


def test_scale():
    c = case()
    c.scale = 0.25
    close(c, c.attend())


def test_gains():
    """One position: the output is its value row times the gain of values, the score has the gain of keys."""
    c = case(bits=2, value_bits=4, one_vector=False, length=1)
    assert c.values is not None
    out, lse = c.attend()
    key, value = (decode(rows.codec, rows.codes, rows.scales)[:, :, :1] for rows in (c.keys, c.values))
    assert mx.allclose(out, value * (1 - c.values.codec.distortion) ** -1, atol=1e-5)
    assert mx.allclose(lse, (c.q * key).sum(-1) * (1 - c.keys.codec.distortion) ** -0.5, atol=1e-5)


def test_what_is_not_seen_does_not_count():
    """Rows before the start, before a row's first position and from the length on may hold anything."""
    c = case(start=5, length=30, first=[0, 20], capacity=40)
    before = c.attend()
    codes = np.array(c.keys.codes)
    codes[:, :, :5], codes[:, :, 30:], codes[1, :, :20] = 7, 8, 9
    c.keys = CodedKeys(c.keys.codec, mx.array(codes), None)
    assert all(mx.array_equal(a, b) for a, b in zip(before, c.attend(), strict=True))


@pytest.mark.parametrize("bounds", [(4, 4), (30, 20)], ids=["empty", "start past the end"])
def test_nothing_to_see(bounds):
    out, lse = case(queries=2, capacity=40).attend(*bounds)
    assert out.shape == (1, 4, 2, 64) and not out.any() and (lse == MASKED).all()


def test_a_row_that_sees_nothing():
    c = case(first=[0, 40], length=40)
    out, lse = c.attend()
    close(c, (out, lse))
    assert not out[1].any() and (lse[1] == MASKED).all()


def test_parts_merge_to_the_whole():
    c = case(heads=8, kv_heads=2, queries=2, length=60, first=[0, 25])
    parts = [c.attend(a, b) for a, b in ((0, 1), (1, 20), (20, 20), (20, 60))]
    outs, lses = (mx.stack(x) for x in zip(*parts, strict=True))
    close(c, merge_partials(outs, lses))


@pytest.mark.parametrize("queries", [1, 64], ids=["decode", "prefill"])
def test_scratch_does_not_grow(monkeypatch, queries):
    """Tiles made small, so that contexts eight times apart take little time."""
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 1 << 15)
    monkeypatch.setattr(tiles, "KEY_TILE", 128)
    found = {}
    for context in (2048, 16384):
        c = case(queries=queries, length=context)
        assert c.rotary is not None
        mx.eval(c.q, c.q_rotary, c.keys.codes, c.rotary.codes, c.rotary.scales)
        mx.synchronize()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(c.attend())
        mx.synchronize()
        found[context] = mx.get_peak_memory() - before
    assert found[16384] <= 1.25 * found[2048] + (64 << 10), found
    # All rows decoded at once would be 6 MB.
    assert found[16384] < 16384 * (64 + 32) * 4 / 2, found


# ---- the launcher's own decisions, which need no kernel


@pytest.mark.parametrize(
    ("positions", "threadgroups"), [(1, 1), (64, 4), (8192, 4), (1 << 18, 4), (1 << 18, 1), (100, 500), (5000, 7)]
)
def test_splits(positions, threadgroups):
    each = split_positions(positions, threadgroups)
    splits = -(-positions // each)
    assert each % TILE == 0 and splits * each - positions < each
    assert splits == 1 or (splits * threadgroups <= THREADGROUPS and each >= SPLIT_POSITIONS)


def test_a_long_context_is_split_as_far_as_the_gpu_has_room():
    assert -(-(1 << 18) // split_positions(1 << 18, 4)) == THREADGROUPS // 4


def misfit(c: Case, **change) -> Case:
    for name, value in change.items():
        setattr(c, name, value)
    return c


@pytest.mark.parametrize(
    ("c", "message"),
    [
        (misfit(case(), q_rotary=None), "rotary codes and rotated queries come together"),
        (misfit(case(one_vector=False), values=None), "coded without scales"),
        (misfit(case(one_vector=False), values=case(width=32).keys), "as wide as the keys"),
        (misfit(case(), q=mx.zeros((1, 4, 1, 32))), "do not fit"),
        (misfit(case(kv_heads=2), q=mx.zeros((1, 3, 1, 64))), "do not fit"),
        (misfit(case(), rotary=case(capacity=50).rotary), "other heads or capacity"),
        (misfit(case(), q_rotary=mx.zeros((1, 4, 1, 64))), "rotated queries"),
        (misfit(case(capacity=40), length=41), "positions 0 to 41 of a buffer of 40"),
        (misfit(case(), start=-1), "positions -1 to 40"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_misfits_are_refused(c, message):
    with pytest.raises(UsageError, match=message):
        c.attend()
