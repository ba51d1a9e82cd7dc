"""Snapshots of whole models: going back must give the very logits the first visit gave, also the second time.

Regression: the ring was written through the name a snapshot held, so decoding one token after a snapshot changed it.
"""

import mlx.core as mx
import pytest
from tiny import make_tiny

from mlx_gemma4 import cache as kv
from mlx_gemma4.loading import load_model

PROMPT = mx.array([[2, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51]])


@pytest.fixture(scope="module", params=["e2b", "26b-a4b"])
def model(request, tmp_path_factory):
    folder = make_tiny(tmp_path_factory.mktemp("tiny"), request.param, tokenizer=False)
    return load_model(folder, dtype="float32")


def decode(model, caches, tokens):
    return [model(mx.array([[t]]), cache=caches)[0, -1] for t in tokens]


def same(a, b):
    return all(mx.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_going_back_past_the_window_twice(model):
    caches = model.make_cache()
    assert PROMPT.shape[1] > model.text_config.sliding_window
    model(PROMPT, cache=caches)
    here = kv.snapshot(caches)
    first = decode(model, caches, [60, 61, 62])
    for _ in range(2):
        kv.restore(caches, here)
        assert caches[0].offset == PROMPT.shape[1]
        assert same(decode(model, caches, [60, 61, 62]), first)


def test_another_branch_leaves_the_snapshot_alone(model):
    caches = model.make_cache()
    model(PROMPT, cache=caches)
    here = kv.snapshot(caches)
    first = decode(model, caches, [60, 61])
    kv.restore(caches, here)
    assert not same(decode(model, caches, [90, 91]), first)
    model(PROMPT, cache=caches)
    kv.restore(caches, here)
    assert same(decode(model, caches, [60, 61]), first)


def test_growing_ring_before_the_window_is_full(model):
    caches = model.make_cache()
    model(PROMPT[:, :3], cache=caches)
    here = kv.snapshot(caches)
    first = decode(model, caches, [60, 61])
    kv.restore(caches, here)
    assert same(decode(model, caches, [60, 61]), first)
