"""Bytes of compressed caches: allocated arrays against the arithmetic, against the promised limits, and scratch.

What is allocated is the caches' own doing; only the search for codes is left out, which would take hours here.
"""

import mlx.core as mx
import pytest
from compressed import KINDS, Layer
from published import SIZES, config

from mlx_gemma4.cache import CompressedOneVectorCache, KeyForm, OneVectorCache, coded
from mlx_gemma4.config import Gemma4Config
from mlx_gemma4.kernels.turboquant import codec
from mlx_gemma4.kv_bits import EXACT, KvBits, request
from mlx_gemma4.memory import cache_bytes, rotary_table_bytes
from mlx_gemma4.models.gemma4 import Model
from mlx_gemma4.models.rope import Rope

# At 3.5 bits: context, most bytes per token over all global layers, most bytes in all, rings included.
LIMITS = {
    "e2b": (131_072, 1_360, 0.19e9),
    "e4b": (131_072, 3_620, 0.51e9),
    "26b-a4b": (262_144, 2_840, 0.96e9),
    "31b": (262_144, 11_300, 3.85e9),
}


@pytest.fixture
def no_search(monkeypatch):
    """Codes of the right shape without looking for them."""

    def blank(form, x, unit):
        codes = mx.zeros((*x.shape[:-1], form.words), mx.uint32)
        return codes, None if unit else mx.zeros(x.shape[:-1], mx.float16)

    monkeypatch.setattr(coded, "encode", blank)


def test_the_stand_in_has_the_shapes_of_the_codec():
    x = mx.random.normal((1, 2, 3, 64))
    for bits in (2, 3.5):
        rows = coded.CodedRows("keys", codec(64, bits), unit=False)
        rows.write(x, 0, 3)
        assert [(a.shape, a.dtype) for a in rows.contents().values()] == [
            ((1, 2, 3, rows.codec.words), mx.uint32),
            ((1, 2, 3), mx.float16),
        ]
        assert sum(a.nbytes for a in rows.contents().values()) == 6 * rows.row_bytes


def fed(text, cache, layer, context, chunk) -> int:
    """Bytes of `cache`, of `layer`, after `context` positions in chunks, bfloat16; nothing is computed."""
    H, D = text.kv_heads_of(layer), text.width_of(layer)
    form = KeyForm(mx.ones((D,)), Rope(text.rope_global, D))
    for start in range(0, context, chunk):
        x = mx.zeros((1, H, min(chunk, context - start), D), mx.bfloat16)
        one_vector = isinstance(cache, OneVectorCache | CompressedOneVectorCache)
        cache.append(*((x, form) if one_vector else (x, x)))
    return cache.nbytes


def allocated(size: str, bits: KvBits, context: int, chunk: int) -> dict[str, int]:
    text = Gemma4Config.from_dict(config(size)).text
    caches = Model(Gemma4Config.from_dict(config(size))).language_model.make_cache(bits=bits)
    seen: dict[tuple, int] = {}  # layers of one kind are alike
    out = {"sliding": 0, "global": 0, "one-vector": 0}
    for i, cache in enumerate(caches):
        kind = "sliding" if text.is_sliding(i) else "one-vector" if text.k_is_v(i) else "global"
        if kind not in seen:
            seen[kind] = fed(text, cache, i, context, chunk)
        out[kind] += seen[kind]
    return out | {"total": sum(out.values())}


@pytest.mark.parametrize("size", SIZES)
def test_limits_at_full_context(no_search, size):
    context, per_token, total = LIMITS[size]
    found = allocated(size, request(3.5), context, 32_768)
    assert (found["global"] + found["one-vector"]) / context <= per_token
    assert found["total"] <= total
    assert found == cache_bytes(Gemma4Config.from_dict(config(size)).text, context, bits=request(3.5))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("context", [1, 127, 128, 200, 4096, 5000])
@pytest.mark.parametrize(
    "bits", [request(2), request(3.5, sliding=4), request(4, mode="pairs"), request(sliding=2.5)], ids=str
)
def test_arithmetic_is_what_is_allocated(no_search, size, context, bits):
    text = Gemma4Config.from_dict(config(size)).text
    assert allocated(size, bits, context, 2048) == cache_bytes(text, context, bits=bits)


def test_keys_and_values_apart():
    """4 and 3 bits cost what 3.5 and 3.5 do; exact is the default."""
    text = Gemma4Config.from_dict(config("e2b")).text
    apart = cache_bytes(text, 10_000, bits=request(keys=4, values=3))
    assert apart == cache_bytes(text, 10_000, bits=request(3.5))
    exact = cache_bytes(text, 10_000)
    assert exact == cache_bytes(text, 10_000, bits=EXACT) == cache_bytes(text, 10_000, bits=request(16))


def test_decoding_runs_less_than_a_hundredth_ahead(no_search):
    text = Gemma4Config.from_dict(config("31b")).text
    layer = next(i for i in range(60) if not text.is_sliding(i))
    cache = Model(Gemma4Config.from_dict(config("31b"))).make_cache(3.5)[layer]
    fed(text, cache, layer, 40_000, 40_000)
    exact = cache_bytes(text, 40_128, bits=request(3.5))["one-vector"] // 10
    for _ in range(128):
        fed(text, cache, layer, 1, 1)
    assert exact < cache.nbytes <= 1.01 * exact


def test_no_table_of_the_whole_context(no_search):
    """Rotations are computed where they are needed: the shared table stops at the first chunk."""
    model = Model(Gemma4Config.from_dict(config("26b-a4b")))
    text, cache = model.config.text, model.make_cache(3.5)[5]
    rope = model.language_model.model._ropes["full_attention"]
    form = KeyForm(mx.ones((512,)), rope)
    for length in (2048, 8192, 1):
        q = mx.zeros((1, 16, length, 512), mx.bfloat16)
        cache.append(mx.zeros((1, 2, length, 512), mx.bfloat16), form).attend(q)
    assert sum(a.nbytes for a in model.private_arrays()) == rotary_table_bytes(text, 10_000, request(3.5)) == 512 * 2048


def test_real_bits_count_the_scales():
    """What a status line says is what is stored: 3.53 bits per number apart, 2.20 for one vector in place of two."""
    made = {size: Model(Gemma4Config.from_dict(config(size))).make_cache(3.5) for size in ("e2b", "31b")}
    lines = {size: caches[4 if size == "e2b" else 5].status() for size, caches in made.items()}
    assert "keys 3.5 bits, values 3.5 bits (3.52 with scales)" in lines["e2b"]
    assert "vectors 3.5 bits, rotated 3.5 bits (2.20 with scales)" in lines["31b"]
    apart = Model(Gemma4Config.from_dict(config("e2b"))).make_cache(kv_key_bits=4, kv_value_bits=3)
    assert "keys 4 bits, values 3 bits (3.52 with scales)" in apart[4].status()


@pytest.mark.parametrize("kind", ["global", "one-vector"])
@pytest.mark.parametrize("queries", [1, 4, 32], ids=["decode", "verify", "prefill"])
def test_never_a_whole_cache_decoded(kind, queries):
    """Peak memory of a step over 16,384 coded positions stays far below what they are when decoded."""
    H, D, T = 1, 256, 16_384
    form = codec(D, 3.5)
    layer = Layer(kind)
    if kind == "one-vector":
        cache, turned = CompressedOneVectorCache(form, codec(64, 3.5)), codec(64, 3.5)
    else:
        cache, turned = type(layer.cache)(form, form), form
    names = [rows.name for rows in cache.rows]
    contents = {"exact.0": mx.zeros((1, H, 144, D)), "exact.1": mx.zeros((1, H, 144, D))}
    if kind == "one-vector":
        del contents["exact.1"]
    for name, one in zip(names, (form, turned), strict=True):
        contents[f"{name}.codes"] = mx.random.randint(0, 1 << 31, (1, H, T, one.words)).astype(mx.uint32)
    contents[f"{names[0] if kind == 'global' else names[1]}.scales"] = mx.ones((1, H, T), mx.float16)
    mx.eval(contents)
    cache.settle(contents, {"offset": T + 64, "coded": T, "left_padding": None})
    x, q = mx.random.normal((1, H, queries, D)), mx.random.normal((1, 4 * H, queries, D))
    key_form = KeyForm(mx.ones((D,)), Rope(Gemma4Config.from_dict(config("31b")).text.rope_global, D))
    mx.eval(x, q)
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    out = cache.append(*((x, key_form) if kind == "one-vector" else (x, x))).attend(q)
    mx.eval(out)
    decoded = len(names) * H * T * D * 4
    assert mx.get_peak_memory() - before < (decoded if kind == "global" else decoded // 2) / 2
    assert mx.isfinite(out).all().item()


@pytest.mark.parametrize("kind", KINDS)
def test_buffers_hold_nothing_else(kind):
    """`state` is what is allocated, and evaluating it leaves no graph behind."""
    layer = Layer(kind, 2)
    layer.append(500)
    layer.append(1)
    mx.eval(layer.cache.state)
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    held = layer.cache.nbytes
    assert held == sum(a.nbytes for a in layer.cache.contents().values())
    layer.cache = None
    mx.synchronize()
    mx.clear_cache()
    assert abs(before - mx.get_active_memory() - held) <= 64 << 10
