"""The flash_decode kernel against float32 truth: edges by name, what it reads, and the caches that call it."""

from contextlib import nullcontext

import metal_cpu
import mlx.core as mx
import numpy as np
import pytest
from flash_cases import Case, Drawn
from tiny import tiny_config

from mlx_gemma4.cache import GlobalCache, KeyForm, OneVectorCache
from mlx_gemma4.config import Gemma4Config, RopeConfig
from mlx_gemma4.kernels import backend, flash_decode
from mlx_gemma4.kernels.flash_attention import attend, attend_partial
from mlx_gemma4.kernels.reference.flash_attention import MASKED
from mlx_gemma4.models.gemma4 import Model
from mlx_gemma4.models.rope import Rope


def run(drawn: Drawn) -> tuple[mx.array, mx.array]:
    out, lse = flash_decode.flash_decode(drawn.q, drawn.keys, drawn.values, drawn.form, **drawn.where)
    assert backend.status()["flash_decode"] == "metal"
    return out, lse


EDGES = {
    "one-token": Case(past=0),
    "tile-less-one": Case(past=30),
    "tile": Case(past=31),
    "tile-and-one": Case(past=32, spare=31),
    "split-less-one": Case(past=254, spare=1),
    "split": Case(past=255),
    "split-and-one": Case(past=256, spare=255),
    "capacity-used-up": Case(past=511, kv_heads=2),
    "ragged": Case(past=330, kv_heads=2, first=(0, 5, 64, 300, 330)),
    "padding-only-splits": Case(past=290, first=(257, 0), D=128),
    "gqa-2": Case(past=40, G=2),
    "gqa-4": Case(past=40, G=4, kv_heads=2),
    "gqa-16": Case(past=40, G=16),
    "one-head-each": Case(past=40, G=1, kv_heads=3),
    "three-tokens": Case(past=280, L=3, kv_heads=2, spare=5),
    "seven-tokens": Case(past=60, L=7),
    "first-chunk": Case(past=0, L=7, G=2),
    "float16": Case(past=70, dtype=mx.float16),
    "float32": Case(past=270, dtype=mx.float32, kv_heads=2),
    "width-64": Case(past=70, D=64, kv_heads=2, L=2),
    "width-128": Case(past=270, D=128, G=2, kv_heads=2),
    "width-256": Case(past=70, D=256, G=4, first=(3, 60)),
    "not-the-first-keys": Case(past=70, k_start=30, first=(0, 50), D=128),
    "segment-before-the-queries": Case(past=70, gap=20, D=128, first=(0, 30)),
    "keys-before-position-0": Case(past=5, k_start=-16, D=128, G=2),
    "keys-in-the-future": Case(past=20, gap=-50, D=128, G=2),
    "scaled": Case(past=40, scale=0.25, D=128),
    "one-vector": Case(past=300, kv_heads=2, one_vector=True, spare=3),
    "one-vector-ragged": Case(past=300, one_vector=True, first=(0, 7, 290)),
    "one-vector-seven": Case(past=50, L=7, one_vector=True, G=4),
    "one-vector-gqa-16": Case(past=50, one_vector=True, G=16, kv_heads=2),
    "one-vector-width-128": Case(past=50, one_vector=True, D=128, G=2, kv_heads=2),
    "one-vector-float32": Case(past=50, one_vector=True, dtype=mx.float32, first=(9, 0)),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges(metal, name):
    drawn = Drawn(EDGES[name])
    out, lse = run(drawn)
    assert out.dtype == lse.dtype == mx.float32
    drawn.check(out)


@pytest.mark.parametrize("name", ["split-and-one", "ragged", "one-vector-ragged", "not-the-first-keys"])
def test_log_sum_exp(metal, name):
    """Beside the output, that of the scores: the reference's, for the arrays in float32."""
    drawn = Drawn(EDGES[name])
    _, lse = run(drawn)
    wide = [None if x is None else x.astype(mx.float32) for x in (drawn.q, drawn.keys, drawn.values)]
    _, truth = flash_decode.reference(*wide, drawn.form, **drawn.where)
    assert mx.abs(lse - truth).max().item() <= 1e-4


def test_a_row_that_sees_nothing(metal):
    """Its part of the keys lies before its sequence, or after its queries: out 0, lse MASKED."""
    drawn = Drawn(Case(past=40, D=128, first=(0, 41)))
    out, lse = run(drawn)
    assert (np.array(out[1]) == 0).all() and (np.array(lse[1]) == np.float32(MASKED)).all()
    assert (np.array(lse[0]) > -100).all()
    out, lse = attend_partial(drawn.q, drawn.keys, drawn.values, q_start=40, k_start=41)
    assert (np.array(out) == 0).all() and (np.array(lse) == np.float32(MASKED)).all()


def test_any_strides(metal):
    """Keys as a projection leaves them, heads inside positions; values with positions inside dims."""
    drawn = Drawn(Case(past=70, D=64, kv_heads=2, G=2, first=(0, 3)))
    drawn.keys = mx.contiguous(drawn.keys.swapaxes(1, 2)).swapaxes(1, 2)
    drawn.values = mx.contiguous(drawn.values.swapaxes(2, 3)).swapaxes(2, 3)
    mx.eval(drawn.keys, drawn.values)
    drawn.check(run(drawn)[0])


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("name", ["ragged", "one-vector-seven"])
def test_any_order_of_threads(metal, order, name):
    """What one thread leaves for another is fenced: the order in which they run does not matter."""
    with nullcontext() if metal is None else metal_cpu.session(order=order, seed=1):
        drawn = Drawn(EDGES[name])
        drawn.check(run(drawn)[0])


@pytest.mark.parametrize("L", [1, 3], ids=["8-rows", "24-rows"])
@pytest.mark.parametrize("one_vector", [False, True], ids=["plain", "one-vector"])
def test_what_is_read(metal, one_vector, L):
    """Every byte of keys and values once per 16 rows, and nothing else of the buffers; one vector serves as both."""
    case = Case(past=640 - L, L=L, kv_heads=2, spare=64, one_vector=one_vector)
    run(Drawn(case))
    if metal is None:
        return
    kernel, merge = metal.reports[-2:]
    stored = 2 * 640 * 512 * 2  # KV heads, positions, dims, bytes
    blocks = -(-8 * L // 16)
    keys, values = kernel.buffers["keys"], kernel.buffers["values"]
    assert (keys.read_unique, keys.read) == (stored, blocks * stored)
    assert (values.read_unique, values.read) == ((0, 0) if one_vector else (stored, blocks * stored))
    if one_vector:
        table = 640 * 64 * 4
        for name in ("cosines", "sines"):
            assert kernel.buffers[name].read_unique == table
            assert kernel.buffers[name].read == 2 * blocks * table  # once per KV head
    assert kernel.unwritten == 0 and merge.name.endswith("merge_partials")


def test_padding_is_not_read(metal):
    """Tiles before a row's first position stay where they are."""
    run(Drawn(Case(past=319, D=128, first=(300, 256))))
    if metal is not None:
        kernel = metal.reports[-2]
        assert kernel.buffers["keys"].read_unique == (32 + 64) * 128 * 2


def test_chunks():
    """Splits are whole tiles, at most 64, and no shorter than what pays for their partial result."""
    for keys in (1, 255, 4096, 16_384, 16_385, 131_072, 262_144):
        chunk = flash_decode.chunk_of(keys)
        assert chunk % flash_decode.KEYS == 0 and chunk >= flash_decode.MIN_CHUNK
        assert -(-keys // chunk) <= flash_decode.MAX_SPLITS


# ---- the caches that call it


def test_one_vector_cache(metal):
    """Prefill, then tokens: the kernel through the cache's view, beside the reference."""
    rng = np.random.default_rng(1)
    form = KeyForm(mx.array(rng.random(128).astype(np.float32)), Rope(RopeConfig(1e6, "proportional", 0.25), 128))
    cache, answers = OneVectorCache(left_padding=(0, 20)), []
    for step, L in enumerate((40, 1, 1)):
        u, q = (mx.array(rng.standard_normal((2, h, L, 128), np.float32)) for h in (2, 8))
        view = cache.append(u, form)
        answers.append(view.attend(q, scale=0.1))
        assert backend.status()["flash_decode" if step else "flash_prefill"] == "metal"
        with backend.forced("reference"):
            expected = view.attend(q, scale=0.1)
        assert mx.abs(answers[-1] - expected)[:, :, -1].max().item() <= 1e-5


def test_global_cache(metal):
    """The slice of its buffers that a plain cache hands out goes in as it lies: the kernel sees the buffers' bytes."""
    rng = np.random.default_rng(2)
    cache = GlobalCache()
    arrays = [mx.array(rng.standard_normal((1, 2, 3, 512), np.float32)) for _ in range(2)]
    q = mx.array(rng.standard_normal((1, 8, 3, 512), np.float32))
    view = cache.append(*arrays)
    found = view.attend(q, scale=0.05)
    with backend.forced("reference"):
        assert mx.abs(view.attend(q, scale=0.05) - found).max().item() <= 1e-5
    if metal is not None:
        # From the first number in use to the last, with the 253 free slots of head 0 between them.
        assert metal.last.buffers["keys"].size == (256 + 3) * 512 * 4


@pytest.mark.parametrize("family", ["e2b", "31b"])
def test_a_model(metal, family):
    """Every layer of a small model on its kernels: prompt of two rows, one padded, and two tokens."""
    config = tiny_config(family, global_head_dim=64, head_dim=32, dtype="float32")
    mx.random.seed(4)
    model = Model(Gemma4Config.from_dict(config))
    tokens = mx.random.randint(10, 200, (2, 22))
    logits = {}
    for mode in ("metal", "reference"):
        caches, found = model.make_cache(left_padding=(0, 5)), []
        with nullcontext() if mode == "metal" else backend.forced("reference"):
            for start, stop in ((0, 20), (20, 21), (21, 22)):
                found.append(model(tokens[:, start:stop], cache=caches)[:, -1])
                mx.eval(found[-1])
                operation = "flash_decode" if start else "flash_prefill"
                assert backend.status()[operation] == mode
        logits[mode] = mx.stack(found)
    assert mx.abs(logits["reference"]).max().item() > 0.1
    assert mx.abs(logits["metal"] - logits["reference"]).max().item() <= 1e-4


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"D": 20}, "head width 20"),
        ({"D": 96}, "head width 96"),
        ({"D": 64, "dtype": mx.float64}, "types float64"),
    ],
    ids=["20", "96", "float64"],
)
def test_what_the_kernel_does_not_take(metal, change, why):
    """The reference runs, and the status says so."""
    if "dtype" in change and mx.metal.is_available():
        return  # Metal has no float64 at all
    case = Case(past=20, G=2, **change) if "dtype" in change else Case(past=20, G=2, dtype=mx.float32, **change)
    drawn = Drawn(case)
    out = attend(drawn.q, drawn.keys, drawn.values, **drawn.where)
    assert backend.status()["flash_decode"] == f"reference ({why})"
    assert np.abs(np.array(out.astype(mx.float32)) - drawn.truth()).max() <= 1e-5


def test_mixed_types_are_refused_by_name(metal):
    drawn = Drawn(Case(past=20, D=64))
    attend(drawn.q, drawn.keys, drawn.values.astype(mx.float32), q_start=20)
    assert backend.status()["flash_decode"] == "reference (types bfloat16, float32)"


@pytest.mark.parametrize("what", ["window", "visible"])
def test_what_only_the_reference_hides(metal, what):
    drawn = Drawn(Case(past=20, D=64, dtype=mx.float32))
    hidden = mx.arange(21)[None] > 10
    option = {"window": 10} if what == "window" else {"visible": hidden}
    out, _ = attend_partial(drawn.q, drawn.keys, drawn.values, q_start=20, **option)
    why = {"window": "a window", "visible": "positions hidden one by one"}[what]
    assert backend.status()["flash_decode"] == f"reference ({why})"
    rest, _ = attend_partial(drawn.q, drawn.keys[:, :, 11:], drawn.values[:, :, 11:], q_start=20, k_start=11)
    assert backend.status()["flash_decode"] == "metal"
    assert mx.abs(out - rest).max().item() <= 1e-5


def test_a_segment_without_keys(metal):
    drawn = Drawn(Case(past=20, D=64))
    out, lse = attend_partial(drawn.q, drawn.keys[:, :, :0], drawn.values[:, :, :0], q_start=20)
    assert (np.array(out) == 0).all() and (np.array(lse) == np.float32(MASKED)).all()


def mutation_check() -> None:
    """Keys and values over two splits, and one vector."""
    for case in (Case(past=270, D=128, G=2, kv_heads=2), Case(past=50, one_vector=True, D=128, G=2)):
        drawn = Drawn(case)
        drawn.check(run(drawn)[0])
