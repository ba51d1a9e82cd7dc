"""The caches, one by one: what they let a query see, what they hold in bytes, and the way back.

Whole models through their caches are in `test_text_parity.py` and `test_cache_snapshot.py`.
"""

import brute_force
import mlx.core as mx
import numpy as np
import pytest
from published import SIZES, config
from tiny import tiny_config

from mlx_gemma4 import cache as kv
from mlx_gemma4.cache import GlobalCache, KeyForm, LayerCache, OneVectorCache, SlidingCache
from mlx_gemma4.config import Gemma4Config, RopeConfig
from mlx_gemma4.errors import Gemma4Error, UsageError
from mlx_gemma4.memory import cache_bytes, plain_cache_bytes, rotary_table_bytes
from mlx_gemma4.models.gemma4 import Model
from mlx_gemma4.models.rope import Rope

ROPE = RopeConfig(1e4, "proportional", 0.25)
KINDS = ("sliding", "global", "one-vector")


class Layer:
    """One cache and, beside it, everything it was ever given: a query's answer must be the brute force's."""

    def __init__(self, kind: str, seed: int, padding: list[int] | None = None):
        self.rng = np.random.default_rng(seed)
        self.kind, self.padding = kind, padding
        self.batch = len(padding) if padding else int(self.rng.integers(1, 3))
        self.kv_heads, self.group = int(self.rng.choice([1, 2])), int(self.rng.choice([1, 2, 4]))
        self.window = int(self.rng.integers(1, 21)) if kind == "sliding" else None
        self.width = 16
        self.cache: LayerCache
        if self.window is not None:
            self.cache = SlidingCache(self.window, padding)
        else:
            self.cache = GlobalCache(padding) if kind == "global" else OneVectorCache(padding)
        weight = (0.5 + self.rng.random(self.width)).astype(np.float32)
        self.weight, self.form = weight, KeyForm(mx.array(weight), Rope(ROPE, self.width))
        self.keys = self.values = np.zeros((self.batch, self.kv_heads, 0, self.width), np.float32)

    def draw(self, heads: int, length: int) -> np.ndarray:
        return self.rng.standard_normal((self.batch, heads, length, self.width), np.float32)

    def true_keys(self) -> np.ndarray:
        if self.kind != "one-vector":
            return self.keys
        rows = []
        for u, pad in zip(self.values, self.padding or [0] * self.batch, strict=True):
            positions = np.maximum(np.arange(u.shape[1]) - pad, 0)
            turn = brute_force.angles(positions, self.width, ROPE.theta, ROPE.rotated_fraction)
            rows.append(brute_force.rotated(u * self.weight, np.cos(turn), np.sin(turn)))
        return np.stack(rows)

    def append(self, length: int) -> None:
        """`length` more positions, and the answer to as many queries."""
        start = self.keys.shape[2]
        assert self.cache.offset == start
        keys, values, q = (self.draw(h, length) for h in (self.kv_heads,) * 2 + (self.kv_heads * self.group,))
        self.keys = np.concatenate([self.keys, keys], axis=2)
        self.values = np.concatenate([self.values, values], axis=2)
        if isinstance(self.cache, OneVectorCache):
            view = self.cache.append(mx.array(values), self.form)
        else:
            view = self.cache.append(mx.array(keys), mx.array(values))
        options = {"q_start": start, "window": self.window, "first_visible": self.padding}
        truth = brute_force.attention(q, self.true_keys(), self.values, **options)
        found = np.array(view.attend(mx.array(q)))
        assert np.isfinite(found).all()
        real = np.isfinite(truth)  # queries in the padding see nothing
        assert real.any() or self.padding
        assert np.abs(found - truth)[real].max(initial=0) <= 2e-5

    def cut(self, length: int) -> None:
        self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]


def lengths(rng: np.random.Generator, total: int) -> list[int]:
    """Chunks of 1 to `total` positions that add up to it, single tokens often."""
    out: list[int] = []
    while (left := total - sum(out)) > 0:
        out.append(int(min(left, 1 if rng.random() < 0.4 else rng.integers(1, total + 1))))
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(12))
def test_any_chunks(kind, seed):
    """Random chunks up to three windows long show what an unbounded cache would, padded or not."""
    rng = np.random.default_rng(seed)
    padding = None if seed % 3 == 0 else [0, *rng.integers(0, 15, 2).tolist()]
    layer = Layer(kind, seed, padding)
    for length in lengths(rng, 3 * (layer.window or 12) + 2):
        layer.append(length)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(12))
def test_any_history(kind, seed):
    """Appending, trimming, snapshots and going back in any order: the answers stay the brute force's."""
    rng = np.random.default_rng(100 + seed)
    layer = Layer(kind, seed, [0, 4] if seed % 2 else None)
    saved = [(layer.cache.snapshot(), layer.keys, layer.values)]

    def go_back(which: int) -> None:
        snapshot, layer.keys, layer.values = saved[which]
        layer.cache.restore(snapshot)

    for _ in range(40):
        act, offset = rng.random(), layer.cache.offset
        if act < 0.55:
            layer.append(int(rng.choice([1, 1, 2, 5, 9])))
        elif act < 0.7:
            n = int(rng.integers(1, 8))
            can = n <= offset and (layer.window is None or offset <= layer.window)
            assert layer.cache.is_trimmable(n) == can
            if can:
                assert layer.cache.trim(n) == n
                layer.cut(offset - n)
                # What lay beyond is gone for caches that write over it.
                if layer.window is None:
                    saved = [s for s in saved if s[0].offset <= offset - n]
        elif act < 0.85:
            saved.append((layer.cache.snapshot(), layer.keys, layer.values))
        else:
            go_back(int(rng.integers(len(saved))))
            if layer.window is None:
                saved = [s for s in saved if s[0].offset <= layer.cache.offset]
    go_back(-1)
    layer.append(3)
    layer.append(1)


@pytest.mark.parametrize("kind", ["global", "one-vector"])
def test_stale_snapshots_raise(kind):
    """Written over, shortened or from a longer past: said, and nothing is moved."""
    layer = Layer(kind, 0)
    layer.append(10)
    early = layer.cache.snapshot()
    layer.append(5)
    late = layer.cache.snapshot()
    layer.cache.restore(early)
    layer.cut(10)
    layer.append(20)
    with pytest.raises(Gemma4Error, match="position 15"):
        layer.cache.restore(late)
    assert layer.cache.offset == 30
    layer.append(1)
    with pytest.raises(Gemma4Error):
        type(layer.cache)().restore(early)
    layer.cache.restore(early)
    layer.cut(10)
    layer.append(2)


def test_all_layers_go_back_or_none():
    """A stale snapshot of one layer leaves the others where they are."""
    ring, whole = Layer("sliding", 1), Layer("global", 1)
    for layer in (ring, whole):
        layer.append(6)
    caches = [ring.cache, whole.cache]
    here = kv.snapshot(caches)
    whole.cache.trim(3)
    whole.cut(3)
    with pytest.raises(Gemma4Error):
        kv.restore(caches, here)
    assert [c.offset for c in caches] == [6, 3]
    ring.append(1)
    whole.append(1)


def test_trim_is_for_all_layers_or_none():
    caches: list[LayerCache] = [SlidingCache(4), GlobalCache()]
    keys = mx.zeros((1, 1, 4, 8))
    for c in caches:
        c.append(keys, keys)
    assert kv.can_trim(caches, 4) and not kv.can_trim(caches, 5)
    assert kv.trim(caches, 2) == 2 and [c.offset for c in caches] == [2, 2]
    for c in caches:
        c.append(keys, keys)
    # Past its window the ring has written over what a shorter past would need.
    assert not kv.can_trim(caches, 1) and kv.trim(caches, 1) == 0
    assert [c.offset for c in caches] == [6, 6]
    assert kv.trim(caches[1:], 0) == 0 and caches[1].trim(9) == 6


def test_a_snapshot_holds_references_only():
    layer = SlidingCache(512)
    layer.append(*[mx.zeros((1, 4, 700, 64))] * 2)
    mx.eval(layer.state)
    before = mx.get_active_memory()
    snapshots = [layer.snapshot() for _ in range(100)]
    assert mx.get_active_memory() - before < 1 << 16
    assert len({s.offset for s in snapshots}) == 1


# ---- bytes


@pytest.mark.parametrize("chunks", [[1] * 9, [700], [512, 512], [100, 1, 1, 411, 512, 1, 30, 2048, 1], [2048, 1024]])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_ring_is_bounded(chunks, dtype):
    """Window times row, whatever went through; and really so: no slice keeps a whole chunk alive."""
    window, heads, width = 512, 2, 64
    ring, row = SlidingCache(window), 2 * heads * width * dtype.size
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    for length in chunks:
        keys = mx.zeros((1, heads, length, width), dtype)
        view = ring.append(keys, keys + 1)
        mx.eval(view.attend(mx.zeros((1, heads, length, width), dtype)), ring.state)
        del keys, view
        assert ring.nbytes == row * min(window, -(-ring.offset // 256) * 256)
        mx.synchronize()
        assert mx.get_active_memory() - before <= ring.nbytes + (32 << 10)
    assert ring.size() == min(window, ring.offset)


def test_ring_prefill_scratch():
    """A chunk needs its own keys and values and the window before it, not the context."""
    window, length, heads, width = 256, 512, 2, 32
    ring, found = SlidingCache(window), []
    row = 2 * heads * width * 4
    for _ in range(6):
        keys, values = mx.zeros((1, heads, length, width)), mx.ones((1, heads, length, width))
        mx.eval(keys, values, ring.state)
        mx.synchronize()
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        view = ring.append(keys, values)
        mx.eval(view.keys, view.values, ring.state)
        mx.synchronize()
        found.append(mx.get_peak_memory() - before)
        del view, keys, values
    # The ordered view and the next ring.
    assert max(found) <= row * (window + length + window) + (64 << 10), found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("context", [1024, 8192, 32768])
def test_bytes_of_published_sizes(size, context):
    """What the caches of every layer allocate is what `cache_bytes` says, from shapes alone."""
    text = Gemma4Config.from_dict(config(size)).text
    found = {"sliding": 0, "global": 0, "one-vector": 0}
    form = KeyForm(mx.ones((512,)), Rope(text.rope_global, 512))
    layers = 0
    for i, layer in enumerate(Model(Gemma4Config.from_dict(config(size))).make_cache()):
        shape = (1, text.kv_heads_of(i), 2048, text.width_of(i))
        for start in range(0, context, 2048):
            chunk = mx.zeros((*shape[:2], min(2048, context - start), shape[3]), mx.bfloat16)
            if isinstance(layer, OneVectorCache):
                layer.append(chunk, form)
            else:
                layer.append(chunk, chunk + 1)
        kind = {SlidingCache: "sliding", GlobalCache: "global", OneVectorCache: "one-vector"}[type(layer)]
        del chunk
        if found[kind] == 0:  # the first of each kind for real, the others by their shapes
            mx.synchronize()
            mx.clear_cache()
            before = mx.get_active_memory()
            mx.eval(layer.state)
            mx.synchronize()
            assert abs(mx.get_active_memory() - before - layer.nbytes) <= 64 << 10
        found[kind] += layer.nbytes
        layers += 1
    assert layers == text.first_shared_layer
    expected = cache_bytes(text, context)
    assert found | {"total": sum(found.values())} == expected
    assert plain_cache_bytes(text, context) == expected["total"] + expected["one-vector"]
    assert cache_bytes(text, context, dtype_bytes=4)["total"] == 2 * expected["total"]
    # Worked by hand for one size: 10 global layers of 4 heads x 512, 50 sliding ones of 16 x 256 with window 1,024.
    if size == "31b":
        assert expected["one-vector"] == 10 * context * 4 * 512 * 2
        assert expected["sliding"] == 50 * 1024 * 16 * 256 * 2 * 2


@pytest.mark.parametrize("context", [1, 255, 300, 512, 513, 3000])
def test_bytes_between_steps(context):
    """Prefilled at once or token by token, up to 4,096 positions."""
    text = Gemma4Config.from_dict(config("e2b")).text
    shapes = [(1, 1, context, 256), (1, 1, context, 512)]
    for chunks in ([context], [context - 1, 1] if context > 1 else [1], [1] * min(context, 300)):
        caches = [SlidingCache(512), GlobalCache()]
        for layer, shape in zip(caches, shapes, strict=True):
            for length in chunks:
                layer.append(*[mx.zeros((1, 1, length, shape[3]), mx.bfloat16)] * 2)
            mx.eval(layer.state)
        per_kind = cache_bytes(text, sum(chunks))
        layers = [text.is_sliding(i) for i in range(text.first_shared_layer)]
        assert caches[0].nbytes * layers.count(True) == per_kind["sliding"]
        assert caches[1].nbytes * layers.count(False) == per_kind["global"]


# ---- one vector for key and value


def bf16_steps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a - b| in units of the last place of a bfloat16 of b's size."""
    exponent = np.floor(np.log2(np.maximum(np.abs(b), 2.0**-126)))
    return np.abs(a.astype(np.float64) - b) / 2.0 ** (exponent - 7)


@pytest.fixture
def vectors():
    """Raw projections [1, 2, 300, 512] of the published width, k_norm's weight, and the published rotation."""
    rng = np.random.default_rng(7)
    raw = mx.array(rng.standard_normal((1, 2, 300, 512), np.float32) * 3)
    weight = mx.array((0.06 + 0.02 * rng.standard_normal(512)).astype(np.float32))
    return raw, weight, Rope(RopeConfig(1e6, "proportional", 0.25), 512)


def test_rebuilt_keys_are_the_stored_ones(vectors):
    """float32: the key a plain cache stores, RoPE(k_norm(raw)), to the last bit; whole and in parts."""
    raw, weight, rope = vectors
    form, table = KeyForm(weight, rope), rope.table(300)
    stored = rope.rotate(mx.fast.rms_norm(raw, weight, 1e-6), *table)
    u = mx.fast.rms_norm(raw, None, 1e-6)
    assert mx.abs(form.keys(u, *table) - stored).max().item() == 0
    parts = mx.concatenate([stored[..., :64], stored[..., 256:320]], axis=-1)
    assert mx.abs(form.rotated(u, *table) - parts).max().item() == 0
    still = mx.concatenate([stored[..., 64:256], stored[..., 320:]], axis=-1)
    rest = mx.concatenate([u[..., 64:256], u[..., 320:]], axis=-1)
    assert mx.abs(rest * mx.concatenate([weight[64:256], weight[320:]]) - still).max().item() == 0


def test_rebuilt_keys_in_bfloat16(vectors):
    """Within one unit in the last place of the exact key of the stored vector, and nearer than storing it would be."""
    raw, weight, rope = vectors
    raw, weight = raw.astype(mx.bfloat16), weight.astype(mx.bfloat16)
    form, table = KeyForm(weight, rope), rope.table(300)
    u = mx.fast.rms_norm(raw, None, 1e-6)
    w64, u64, r64 = (np.array(x.astype(mx.float32)).astype(np.float64) for x in (weight, u, raw))
    # The table's own cosines in float64: still pairs have cos 1 and sin 0.
    cos, sin = (np.array(t).astype(np.float64) for t in table)
    exact = brute_force.rotated(
        u64 * w64, np.pad(cos, ((0, 0), (0, 192)), constant_values=1), np.pad(sin, ((0, 0), (0, 192)))
    )
    keys = np.array(form.keys(u, *table).astype(mx.float32))
    assert bf16_steps(keys, exact).max() <= 1
    parts = np.array(form.rotated(u, *table).astype(mx.float32))
    assert (parts == np.concatenate([keys[..., :64], keys[..., 256:320]], axis=-1)).all()
    # Against the key of the unrounded projection: no further off than the key that a plain cache would hold.
    unrounded = r64 / np.sqrt((r64**2).mean(-1, keepdims=True) + 1e-6) * w64
    turn = brute_force.angles(np.arange(300), 512, 1e6, 0.25)
    truth = brute_force.rotated(unrounded, np.cos(turn), np.sin(turn))
    plain = mx.fast.rope(
        mx.fast.rms_norm(raw, weight, 1e-6),
        512,
        traditional=False,
        base=None,
        scale=1.0,
        offset=0,
        freqs=mx.concatenate([mx.array(1.0 / rope.inv_freq), mx.full((192,), mx.inf)]),
    )
    plain = np.array(plain.astype(mx.float32))
    assert np.square(keys - truth).mean() <= np.square(plain - truth).mean()


@pytest.mark.parametrize("rows", [1, 3, 40], ids=["in-parts", "in-parts-3", "whole"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_one_vector_answers_as_the_plain_cache(vectors, rows, dtype):
    """Both forms of the product, decode and prefill, against stored keys and values in the same dtype."""
    raw, weight, rope = vectors
    u = mx.fast.rms_norm(raw.astype(dtype), None, 1e-6)
    form = KeyForm(weight.astype(dtype), rope)
    ours, plain = OneVectorCache(), GlobalCache()
    keys = form.keys(u, *rope.table(300))
    for start, stop in ((0, 300 - rows), (300 - rows, 300)):
        a = ours.append(u[:, :, start:stop], form)
        b = plain.append(keys[:, :, start:stop], u[:, :, start:stop])
    q = mx.array(np.random.default_rng(8).standard_normal((1, 8, rows, 512), np.float32)).astype(dtype)
    found, stored = (np.array(view.attend(q).astype(mx.float32)) for view in (a, b))
    truth = brute_force.attention(*(np.array(x.astype(mx.float32)) for x in (q, keys, u)), q_start=300 - rows)
    if dtype == mx.float32:
        assert np.abs(found - truth).max() <= 1e-5
    else:
        assert np.abs(found - truth).max() <= 2 * np.abs(stored - truth).max()
    assert 2 * ours.nbytes == plain.nbytes


# ---- what callers ask


def test_make_cache():
    model = Model(Gemma4Config.from_dict(tiny_config("e2b")))
    caches = model.make_cache()
    kinds = [type(c).__name__ for c in caches]
    assert kinds == ["SlidingCache"] * 3 + ["GlobalCache", "SlidingCache"]  # three layers share, and have none
    k_is_v = Model(Gemma4Config.from_dict(tiny_config("31b"))).make_cache()
    assert [type(c).__name__ for c in k_is_v][2] == "OneVectorCache"
    for bad in (3.3, 0, 17):
        with pytest.raises(UsageError, match=str(bad)):
            model.make_cache(kv_bits=bad)


def test_figures_for_people():
    model = Model(Gemma4Config.from_dict(tiny_config("26b-a4b")))
    caches = model.make_cache()
    assert kv.nbytes(caches) == 0 and all(c.empty() and c.size() == 0 for c in caches)
    assert all("empty" in line for line in kv.status(caches))
    model(mx.array([[5, 6, 7, 8, 9]]), cache=caches)
    assert kv.nbytes(caches) == sum(c.nbytes for c in caches) > 0
    assert [c.offset for c in caches] == [5] * 6 and not caches[0].empty()
    lines = kv.status(caches)
    assert len(lines) == 2 and "window 8" in lines[0] and "one vector" in lines[1] and "float32" in lines[1]


@pytest.mark.parametrize("context", [5, 2048, 2049])
def test_shared_table_is_counted(context):
    config = Gemma4Config.from_dict(tiny_config("26b-a4b"))
    model = Model(config)
    model.language_model.model._ropes["full_attention"].table(context)
    counted = sum(a.nbytes for a in model.private_arrays())
    assert rotary_table_bytes(config.text, context) == counted > 0
    assert rotary_table_bytes(Gemma4Config.from_dict(tiny_config("e2b")).text, context) == 0


def test_padding_of_nothing_is_no_padding():
    assert SlidingCache(4, [0, 0]).left_padding is None
    assert GlobalCache([0, 2]).left_padding == (0, 2)
