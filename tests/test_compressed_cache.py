"""Compressed caches, one by one: what they let a query see, what they cut, and the way back.

Whole models are in `test_compressed_models.py`, bytes in `test_compressed_bytes.py`.
"""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from compressed import BLOCK, KINDS, WIDTH, WINDOW, Layer

from mlx_gemma4 import cache as kv
from mlx_gemma4.cache import GlobalCache, OneVectorCache, SlidingCache, compressed, compressed_sliding
from mlx_gemma4.cache.blocks import code_capacity, coded_positions
from mlx_gemma4.errors import Gemma4Error

STEPS = {
    "prefill-then-decode": [200, *[1] * 70],
    "decode-alone": [1] * 200,
    "chunks": [100, 150, 64, 300, 1, 7],
    "to-the-block": [127, 1, 63, 1, 1, 64],
    "verify": [260, 5, 8, 3, 60, 1, 8],
}


@pytest.mark.parametrize("padding", [None, [9, 70]], ids=["one", "ragged"])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_attention_over_codes_and_exact_rows(kind, steps, padding):
    layer = Layer(kind, 3, padding)
    for length in STEPS[steps]:
        layer.append(length)
    assert layer.coded > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [(4, None, "trellis"), (2, None, "paper"), (2.5, 4, "pairs")], ids=str)
def test_every_form(kind, form):
    bits, value_bits, mode = form
    layer = Layer(kind, 4, None, bits, None if kind == "one-vector" else value_bits, mode)
    for length in (150, 1, 40):
        layer.append(length)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(6))
def test_any_history(kind, seed):
    """Appending, trimming, snapshots and going back in any order: the answers stay the brute force's."""
    rng = np.random.default_rng(100 + seed)
    layer = Layer(kind, seed, [0, 20] if seed % 2 else None)
    saved = [layer.snapshot()]
    for _ in range(30):
        act, offset = rng.random(), layer.cache.offset
        if act < 0.6:
            layer.append(int(rng.choice([1, 2, 30, 64, 90])))
        elif act < 0.75:
            wanted = max(0, offset - int(rng.integers(1, 90)))
            target = layer.cache.cut_point(wanted)
            assert target <= wanted and layer.cache.is_trimmable(offset - target)
            if 0 < target < offset:
                assert layer.cache.trim(offset - target) == offset - target
                layer.cut(target)
                if kind != "ring":  # codes beyond are written over
                    saved = [s for s in saved if s[3] <= layer.coded]
        elif act < 0.9:
            saved.append(layer.snapshot())
        else:
            layer.restore(saved[int(rng.integers(len(saved)))])
            if kind != "ring":
                saved = [s for s in saved if s[3] <= layer.coded]
    layer.restore(saved[-1])
    layer.append(3)
    layer.append(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("padding", [None, [0, 5]], ids=["one", "ragged"])
def test_without_codes_the_numbers_are_the_plain_cache_s(kind, dtype, padding):
    """The first chunk, whatever its length, and everything before the first block is coded."""
    for steps in ([300], [100, 1, 1, 20, 4]):
        layer = Layer(kind, 5, padding)
        makers = {"global": GlobalCache, "one-vector": OneVectorCache, "ring": partial(SlidingCache, WINDOW)}
        plain = makers[kind](padding)
        for length in steps:
            keys, values = (mx.array(layer.draw(2, length)).astype(dtype) for _ in range(2))
            given = (values, layer.form) if kind == "one-vector" else (keys, values)
            q = mx.array(layer.draw(4, length)).astype(dtype)
            views = [cache.append(*given) for cache in (layer.cache, plain)]
            a, b = (view.attend(q) for view in views)
            # One query of a ring takes the keys in another order.
            near = 0 if kind != "ring" else 1e-6 if dtype == mx.float32 else 0.02
            assert mx.abs(a - b).max().item() <= near


@pytest.mark.parametrize("kind", KINDS)
def test_decoded_tokens_and_prefilled_chunks_agree(kind):
    """The same positions hold the same codes, however they came."""
    answers = []
    for steps in ([1] * 330, [330], [130, 1, 100, 99]):
        layer = Layer(kind, 6)
        keys, values = layer.draw(2, 331), layer.draw(2, 331)
        q = mx.array(layer.draw(4, 1))
        start = 0
        for length in [*steps, 1]:
            k, v = (mx.array(x[:, :, start : start + length]) for x in (keys, values))
            view = layer.cache.append(*((v, layer.form) if kind == "one-vector" else (k, v)))
            start += length
        answers.append(view.attend(q))
        assert layer.cache.coded == coded_positions(331) == 256
    assert all(mx.allclose(a, answers[0], atol=1e-5) for a in answers)


@pytest.mark.parametrize("kind", KINDS)
def test_trim_in_the_tail_is_exact(kind):
    """Bit by bit what it was before, past the ring's window too; and it says where that ends."""
    layer = Layer(kind, 7)
    for length in (400, 20):
        layer.append(length)
    before = layer.snapshot()
    k = mx.array(layer.draw(2, 1))
    again = (k, layer.form) if kind == "one-vector" else (k, k)
    q = mx.array(layer.draw(4, 1))
    first = layer.cache.append(*again).attend(q)
    layer.restore(before)
    tail = layer.cache.offset - layer.coded
    assert tail == 100
    layer.append(1)
    layer.append(26)
    layer.cache.trim(27)
    assert mx.array_equal(layer.cache.append(*again).attend(q), first)
    layer.restore(before)
    assert layer.cache.is_trimmable(100) and not layer.cache.is_trimmable(101)
    assert layer.cache.is_trimmable(100 + BLOCK) == (kind != "ring")
    assert layer.cache.trim(101) == 0 and layer.cache.offset == 420
    assert layer.cache.cut_point(319) == (256 if kind != "ring" else 0)
    assert layer.cache.cut_point(1000) == 420 and layer.cache.cut_point(333) == 333


def test_layers_agree_on_where_to_cut():
    whole, vector, ring = (Layer(kind, 8) for kind in KINDS)
    for layer in (whole, vector, ring):
        layer.append(230)
    caches = [layer.cache for layer in (whole, vector, ring)]
    assert kv.cut_point(caches, 200) == 200 and kv.cut_point(caches, 127) == 64
    plain = GlobalCache()
    plain.append(*[mx.zeros((1, 2, 230, WIDTH))] * 2)
    assert kv.cut_point([plain], 127) == 127 and kv.cut_point([plain, *caches], 127) == 64
    full = SlidingCache(100)
    full.append(*[mx.zeros((1, 2, 230, WIDTH))] * 2)
    assert kv.cut_point([full, *caches], 200) == 0 and kv.cut_point([full, *caches], 230) == 230
    assert kv.trim(caches, 230 - 64) == 166
    for layer in (whole, vector, ring):
        layer.cut(64)
        layer.append(100)
        layer.append(1)


@pytest.mark.parametrize("kind", ["global", "one-vector"])
def test_stale_snapshots_raise(kind):
    layer = Layer(kind, 9)
    layer.append(200)
    early = layer.snapshot()
    layer.append(100)
    late = layer.snapshot()
    layer.restore(early)
    layer.append(150)
    with pytest.raises(Gemma4Error, match="position 300"):
        layer.cache.restore(late[0])
    with pytest.raises(Gemma4Error, match="position 200"):
        Layer(kind).cache.restore(early[0])
    assert layer.cache.offset == 350
    layer.append(1)
    layer.restore(early)
    layer.append(1)


def test_a_ring_decodes_its_window_at_most(monkeypatch):
    """Counted: several queries decode what lies in the window and is coded, one query decodes nothing."""
    found = []
    real = compressed_sliding.decoded

    def counting(rows, pieces, gain, dtype):
        found.append(sum(stop - start for start, stop in pieces))
        return real(rows, pieces, gain, dtype)

    monkeypatch.setattr(compressed_sliding, "decoded", counting)
    layer = Layer("ring", 10)
    for length in (500, 1, 1, 3):
        layer.append(length)
    # At 502 the tail begins at 384: positions 353 to 383 are in the window of the first query.
    assert found == [31, 31] and WINDOW == 150


def test_one_code_step_per_block_and_none_in_between(monkeypatch):
    """Coding waits for 64 positions, and what a step shows does not wait for it."""
    layer = Layer("global", 11)
    calls = []
    real = type(layer.cache.keys).write

    def counting(self, rows, start, capacity):
        calls.append((self.name, start, rows.shape[2]))
        real(self, rows, start, capacity)

    monkeypatch.setattr(type(layer.cache.keys), "write", counting)
    for _ in range(193):
        layer.append(1)
    assert calls == [("keys", 0, 64), ("values", 0, 64), ("keys", 64, 64), ("values", 64, 64)]


def test_room_for_codes():
    """Exact in prefill; decoding 256 ahead, later a 128th, so never 1 % too large from 25,600 on."""
    assert code_capacity(0, 1984, 2048) == 1984 and code_capacity(1984, 1984, 1) == 1984
    assert code_capacity(1984, 2048, 1) == 1984 + 256 and code_capacity(1984, 4032, 2048) == 4032
    capacity = 25600
    for needed in range(25600, 60000, 64):
        capacity = code_capacity(capacity, needed, 1)
        assert needed <= capacity <= 1.01 * needed and capacity % BLOCK == 0


@pytest.mark.parametrize("kind", ["global", "one-vector"])
def test_queries_in_tiles(kind, monkeypatch):
    """A chunk whose queries are taken 7 at a time answers like one taken whole."""
    monkeypatch.setattr(compressed, "QUERY_ELEMENTS", 7 * 2 * 4 * WIDTH)
    layer = Layer(kind, 12, [0, 30])
    for length in (150, 40, 1):
        layer.append(length)
