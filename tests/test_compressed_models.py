"""Whole models over compressed caches, all four families: what changes, what must not, and how it is asked for.

The caches themselves are in `test_compressed_cache.py`.
"""

import threading

import mlx.core as mx
import numpy as np
import pytest
from tiny import FAMILIES, F, make_tiny, tiny_config

from mlx_gemma4 import Chat, cache, generate, kv_bits, load
from mlx_gemma4.cache import (
    CompressedCache,
    CompressedOneVectorCache,
    CompressedSlidingCache,
    GlobalCache,
    SlidingCache,
    blocks,
)
from mlx_gemma4.config import Gemma4Config
from mlx_gemma4.errors import UsageError
from mlx_gemma4.kernels import turboquant
from mlx_gemma4.kv_bits import KvBits, number, request
from mlx_gemma4.loading import load_model
from mlx_gemma4.models.gemma4 import Model
from mlx_gemma4.reuse import PromptMemory
from mlx_gemma4.sampling import Sampling

PROMPT = np.random.default_rng(0).integers(107, 500, 320)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def get(family: str, **overrides) -> Model:
        key = (family, *overrides)
        if key not in made:
            folder = make_tiny(tmp_path_factory.mktemp("tiny"), family, tokenizer=False, **overrides)
            made[key] = load_model(folder, dtype="float32")
        return made[key]

    return get


def logits(model, caches, steps, ids=PROMPT) -> mx.array:
    out, start = [], 0
    for length in steps:
        tokens = mx.array(ids[..., start : start + length])
        out.append(model(tokens if tokens.ndim == 2 else tokens[None], cache=caches))
        mx.eval(out[-1], [c.state for c in caches])
        start += length
    return mx.concatenate(out, axis=1)


def divergence(truth: mx.array, found: mx.array) -> float:
    """Mean KL(truth || found) in nats."""
    p, q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (truth, found))
    return (mx.exp(p) * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_until_codes_are_read_and_near_afterwards(models, family):
    """The first chunk bit by bit; then 4 bits nearer than 2, and neither far off."""
    model = models(family)
    truth = logits(model, model.make_cache(), [200, 100, *[1] * 10])
    found = {bits: logits(model, model.make_cache(bits), [200, 100, *[1] * 10]) for bits in (4, 2)}
    for x in found.values():
        assert mx.array_equal(x[:, :200], truth[:, :200])
        assert not mx.array_equal(x[:, 200:], truth[:, 200:310])
    four, two = (divergence(truth[:, 200:], x[:, 200:]) for x in found.values())
    assert 0 < four < 0.15 and four < two < 1.0


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_batches(models, family):
    """Each row near what it is alone with exact caches, padding of more than a block included."""
    model, padding = models(family), (0, 75)
    ids = np.stack([np.pad(PROMPT[pad:240], (pad, 0)) for pad in padding])
    found = logits(model, model.make_cache(4, padding), [100, 120, *[1] * 20], ids)
    for row, pad in enumerate(padding):
        truth = model(mx.array(ids[row : row + 1, pad:]))
        assert divergence(truth, found[row : row + 1, pad:]) < 0.1


def test_layers_that_share_read_the_codes_of_their_producer(models):
    """E2B's layer 7 has no cache: compressing layer 3, the only global one with keys of its own, moves its output."""
    model = models("e2b")
    caches = model.make_cache(2)
    assert [type(c) for c in caches].count(CompressedCache) == 1 and len(caches) == 5
    seen = []
    layers = model.language_model.model.layers
    real = type(layers[7].self_attn).__call__

    def watch(self, x, step, cache, view):
        out = real(self, x, step, cache, view)
        if self is layers[7].self_attn:
            seen.append(view)
        return out

    type(layers[7].self_attn).__call__ = watch
    try:
        logits(model, caches, [200, 1])
    finally:
        type(layers[7].self_attn).__call__ = real
    assert [type(view).__name__ for view in seen] == ["ChunkView", "CompressedView"]


def test_sliding_layers_on_request(models):
    model = models("e4b", sliding_window=200, head_dim=32)
    caches = model.make_cache(kv_bits_sliding=4)
    assert {type(c) for c in caches} == {CompressedSlidingCache, GlobalCache}
    truth = logits(model, model.make_cache(), [150, 100, *[1] * 10])
    found = logits(model, caches, [150, 100, *[1] * 10])
    assert mx.array_equal(found[:, :150], truth[:, :150])
    assert 0 < divergence(truth[:, 150:], found[:, 150:]) < 0.1
    both = model.make_cache(3.5, kv_bits_sliding=4, kv_mode="pairs")
    assert {type(c) for c in both} == {CompressedSlidingCache, CompressedCache}
    assert "4 bits" in both[0].status() and both[0].keys.codec.mode == "pairs" and "window 200" in both[0].status()


@pytest.mark.parametrize("family", ["e2b", "26b-a4b"])
def test_snapshots_of_whole_models(models, family):
    """Back past a block that was coded since, twice: the very logits of the first visit."""
    model = models(family)
    caches = model.make_cache(3)
    logits(model, caches, [180])
    here = cache.snapshot(caches)
    first = logits(model, caches, [30, *[1] * 4], PROMPT[180:])
    assert caches[-1 if family == "26b-a4b" else 3].coded == 128
    for _ in range(2):
        cache.restore(caches, here)
        assert mx.array_equal(logits(model, caches, [30, *[1] * 4], PROMPT[180:]), first)


# ---- what may be asked for


def test_allowed_values_are_the_codec_s():
    assert kv_bits.MODES == turboquant.MODES and set(kv_bits.BITS) == {16, *turboquant.BITS}
    assert number("3.5") == 3.5 and number(4) == 4 and request() == KvBits() == request(16)
    assert request(3, keys=4) == KvBits(4, 3) and request(keys=4, values="2.5") == KvBits(4, 2.5)
    assert request(3.5, sliding=4, mode="paper") == KvBits(3.5, 3.5, 4, "paper")


@pytest.mark.parametrize("bad", [3.3, 0, 17, "abc", "", -4, float("nan"), 1, None, [4]], ids=str)
def test_other_values_are_refused_in_one_line(bad):
    with pytest.raises(UsageError) as e:
        number(bad)
    assert str(e.value) == f"kv_bits takes 16, 4, 3.5, 3, 2.5 or 2, not {bad}"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kv_bits": 3.3}, "kv_bits takes 16, 4, 3.5, 3, 2.5 or 2, not 3.3"),
        ({"kv_key_bits": 5}, "kv_key_bits takes 16"),
        ({"kv_value_bits": 5}, "kv_value_bits takes 16"),
        ({"kv_bits_sliding": 5}, "kv_bits_sliding takes 16"),
        ({"kv_bits": 4, "kv_mode": "scalar"}, "kv_mode takes trellis, pairs or paper, not scalar"),
        ({"kv_key_bits": 4}, "compressed together"),
        ({"kv_bits": 4, "kv_value_bits": 16}, "compressed together"),
        ({"kv_bits_sliding": 4}, "its window is 8, and 128 positions stay exact"),
    ],
    ids=str,
)
def test_requests_that_cannot_be_met(models, options, says):
    with pytest.raises(UsageError, match=says):
        models("e2b").make_cache(**options)


def test_requests_that_reach_no_layer():
    def model(family, **overrides):
        return Model(Gemma4Config.from_dict(tiny_config(family, **overrides)))

    with pytest.raises(UsageError, match="one vector for both"):
        model("31b").make_cache(kv_key_bits=4, kv_value_bits=3)
    with pytest.raises(UsageError, match="no sliding layers"):
        model("e4b", layer_types=[F, F], num_kv_shared_layers=0).make_cache(kv_bits_sliding=3.5)


def test_make_cache_by_family(models):
    kinds = {family: [type(c) for c in models(family).make_cache(3.5)] for family in FAMILIES}
    assert kinds["e4b"] == [SlidingCache, SlidingCache, CompressedCache, SlidingCache]
    assert kinds["31b"] == [SlidingCache, SlidingCache, CompressedOneVectorCache] * 2
    caches = models("e2b").make_cache(kv_key_bits=4, kv_value_bits=2.5)
    assert (caches[3].keys.codec.bits, caches[3].values.codec.bits, caches[3].keys.codec.mode) == (4, 2.5, "trellis")


# ---- from load to chat


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"), "e4b")


def test_load_sets_what_caches_keep(folder):
    model, tokenizer = load(folder, dtype="float32", kv_bits=2)
    assert isinstance(model.make_cache()[2], CompressedCache) and isinstance(model.make_cache(16)[2], GlobalCache)
    assert model.make_cache(left_padding=[0, 3])[2].left_padding == (0, 3)
    prompt = [int(i) for i in PROMPT]
    texts = {bits: generate(model, tokenizer, prompt, max_tokens=20, kv_bits=bits) for bits in (None, 16)}
    assert texts[None] != texts[16]
    with pytest.raises(UsageError, match="prompt_cache=model"):
        generate(model, tokenizer, "hello", kv_bits=2)


def test_a_chat_over_a_compressed_cache(folder):
    model, tokenizer = load(folder, dtype="float32", kv_bits=4)
    chat = Chat(model, tokenizer, sampling=Sampling(temperature=0.0, max_tokens=8), prefill_step_size=100)
    assert "keys 4 bits" in chat.cache_status[1] and "empty" in chat.cache_status[1]
    chat.send("the model " * 60)
    assert chat.cache_bytes == chat.stats.cache_bytes and chat.cache_status[1].startswith("1 x global keys and values")
    before = chat.stats.context_used
    chat.send("and now?")
    assert chat.stats.cached_tokens >= before - 8 - 10, "the prompt of the first turn was not computed again"
    with pytest.raises(UsageError, match="kv_bits takes"):
        chat.set_kv(kv_bits=5)
    assert chat.context_used > 0
    chat.set_kv(kv_bits=2.5, kv_mode="pairs")
    assert chat.context_used == 0 and "2.5 bits" in chat.cache_status[1]
    chat.send("more")
    assert chat.stats.cached_tokens == 0 and len(chat.messages) == 6


def test_memory_goes_back_to_a_block_where_it_cannot_trim(models):
    """A prompt that parts inside the codes keeps the whole blocks before; one that parts in the tail loses nothing."""
    model = models("e4b", sliding_window=512)
    memory = PromptMemory(lambda: model.make_cache(3.5))
    prompt = [int(i) for i in PROMPT[:300]]
    logits(model, memory.cache, [300])
    memory.hold(prompt)
    assert memory.cache[2].coded == 192
    assert memory.reuse([*prompt[:250], 7, 8]) == 250
    assert memory.reuse([*prompt[:150], 7, 8]) == 128 == memory.cache[0].offset == memory.cache[2].coded
    memory.mark()
    logits(model, memory.cache, [150], PROMPT[128:])
    memory.hold([*prompt[:128], *map(int, PROMPT[128:278])])
    assert memory.cache[2].coded == 192
    assert memory.reuse([*prompt[:140], 7, 8]) == 128, "the marked position, whose tail comes back exact"
    assert memory.reuse([9, 9]) == 0


def test_block_constants():
    """The tail is what `blocks.py` promises: 64 to 127 positions between steps."""
    assert (blocks.SINKS, blocks.BLOCK, blocks.TAIL) == (16, 64, 128)
    assert [blocks.coded_positions(n) for n in (0, 127, 128, 191, 192, 300)] == [0, 0, 64, 64, 128, 192]


def test_the_next_turn_may_run_on_another_thread(models):
    """Regression: codes asked for by the last token of a turn waited for the next turn, and for the first's thread."""
    model = models("e2b")
    memory = PromptMemory(lambda: model.make_cache(4))

    def turn(steps: list[int], ids) -> None:
        start = 0
        for length in steps:
            mx.eval(model(mx.array(ids[None, start : start + length]), cache=memory.cache))
            start += length
        memory.hold([int(i) for i in PROMPT])

    thread = threading.Thread(target=turn, args=([127, 1], PROMPT))
    thread.start()
    thread.join()
    assert memory.cache[3].coded == 64 and len(memory.ids) == 128
    turn([1], PROMPT[128:])
    assert len(memory.ids) == 129
