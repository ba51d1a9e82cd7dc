"""The text graph against transformers' own classes, from stored references: four families, thirteen checkpoints.

Measured on a CPU (x86, MLX 0.32.4, transformers 5.23.0), largest |logit difference| over all ways to call, logits of
size about 20:

    up to three windows         nine checkpoints        2.5e-4 (the reference itself is up to 3.1e-4 off float64)
    1,500 tokens                E2B, 26B-A4B            5.3e-5, 2.9e-5
    the same, sharp attention   E4B, 31B                4.4e-4, 6.4e-4
"""

import functools
import itertools
import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from parity import FAMILIES, LONG, SHORT, Case, build, greedy, load_case, run, worst

LIMIT = 2e-3

CHUNKS = pytest.mark.parametrize("chunk", [None, 1, 7, 64], ids=["one-shot", "by-1", "by-7", "by-64"])


@functools.lru_cache(maxsize=2)
def loaded(name):
    case = load_case(name)
    return case, build(case.config, case.seed, case.qk_norm)


@pytest.mark.parametrize("name", SHORT)
@CHUNKS
def test_logits(name, chunk):
    case, model = loaded(name)
    assert worst(run(model, case.arrays["ids"][None], chunk)[0], case.arrays["logits"]) <= LIMIT


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("chunk", [None, 7], ids=["one-shot", "by-7"])
def test_short_prompts(name, chunk):
    """Lengths 1, 7 and around the window, each a call of its own."""
    case, model = loaded(name)
    lasts = case.by_length("last")
    assert {1, 7, case.window - 1, case.window, case.window + 1} == set(lasts)
    for n, logits in lasts.items():
        assert worst(run(model, case.arrays["ids"][None, :n], chunk)[0, -1], logits) <= LIMIT, n


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("chunk", [1, 64])
def test_greedy(name, chunk):
    """What transformers' generate() says next, past the window, from a prompt shorter and one longer than it."""
    case, model = loaded(name)
    for n, tokens in case.by_length("greedy").items():
        assert greedy(model, case.arrays["ids"][:n], len(tokens), chunk).tolist() == tokens.tolist(), n


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("chunk", [None, 1, 5], ids=["one-shot", "by-1", "by-5"])
def test_batch_of_unequal_lengths(name, chunk):
    case, model = loaded(name)
    rows, padding, references = case.batch()
    assert len(set(padding)) > 3 and min(padding) == 0
    found = run(model, rows, chunk, padding)
    assert np.isfinite(found).all()
    for logits, pad, reference in zip(found, padding, references, strict=True):
        assert worst(logits[pad:], reference) <= LIMIT, pad


@pytest.mark.parametrize("name", ["e2b", "26b-a4b", "31b"])
def test_padding_is_never_seen(name):
    """Other tokens in the padded places change no real logit."""
    case, model = loaded(name)
    rows, padding, _ = case.batch()
    other = np.where(np.arange(rows.shape[1]) < np.array(padding)[:, None], 77, rows)
    assert (other != rows).any()
    for chunk in (None, 1, 5):
        a, b = run(model, rows, chunk, padding), run(model, other, chunk, padding)
        for row, pad in enumerate(padding):
            assert worst(a[row, pad:], b[row, pad:]) <= 1e-4, (chunk, pad)


def long_limit(case: Case) -> float:
    """Rotary angles are what goes wrong far out, the more the sharper attention is; they are transformers' own here."""
    return 2e-4 if case.qk_norm < 1 else LIMIT


@pytest.mark.parametrize("name", LONG)
def test_1500_tokens(name):
    case, model = loaded(name)
    found = run(model, case.arrays["long/ids"][None])[0][case.arrays["long/positions"]]
    assert worst(found, case.arrays["long/logits"]) <= long_limit(case)


@pytest.mark.parametrize("name", LONG)
def test_1500_tokens_through_the_caches(name):
    """Two uneven chunks and ten single tokens."""
    case, model = loaded(name)
    ids, cache = mx.array(case.arrays["long/ids"][None]), model.make_cache()
    cuts = [0, 1001, *range(1490, 1501)]
    logits = [model(ids[:, a:b], cache=cache) for a, b in itertools.pairwise(cuts)]
    found = np.array(mx.concatenate(logits, axis=1))[0][case.arrays["long/positions"]]
    assert worst(found, case.arrays["long/logits"]) <= long_limit(case)


@pytest.mark.parametrize("name", ["e2b", "26b-a4b", "31b"])
def test_every_tensor_counts(name):
    """The references notice a change in any tensor: what a family computes is all compared."""
    case, model = loaded(name)
    ids = case.arrays["ids"][None]
    weights = dict(tree_flatten(model.parameters()))
    mx.random.seed(0)
    try:
        for key, value in weights.items():
            if re.search(r"layers\.[14]\.", key):
                continue  # like their neighbours
            if key.endswith(f"layers.{len(model.layers) - 1}.layer_scalar"):
                continue  # the final norm takes it away
            # Noise, not a factor: the norms behind most matrices would take a factor away.
            spread = mx.maximum(mx.abs(value).mean(), 0.1)
            model.load_weights([(key, value + 0.3 * spread * mx.random.normal(value.shape))], strict=False)
            assert worst(run(model, ids)[0], case.arrays["logits"]) > 2 * LIMIT, key
            model.load_weights([(key, value)], strict=False)
    finally:
        model.load_weights(list(weights.items()))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_has_a_gradient(name):
    """Training calls the model without a cache; enough tokens that experts see theirs sorted."""
    case, model = loaded(name)
    ids = mx.array(case.arrays["ids"][None])

    def loss(parameters):
        model.update(parameters)
        return nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:]).mean()

    parameters = model.parameters()
    gradients = dict(tree_flatten(mx.grad(loss)(parameters)))
    model.update(parameters)
    assert set(gradients) == {key for key, _ in tree_flatten(parameters)}
    for key, gradient in gradients.items():
        assert mx.isfinite(gradient).all().item(), key
        assert mx.abs(gradient).max().item() > 0, key


@pytest.mark.parametrize("name", ["e2b", "26b-a4b", "31b"])
def test_compiled(name):
    """A training step under mx.compile calls the model without a cache: the same logits."""
    case, model = loaded(name)
    ids = mx.array(case.arrays["ids"][None])
    found = np.array(mx.compile(model.__call__)(ids))
    assert worst(found[0], case.arrays["logits"]) <= LIMIT


def test_input_embeddings_replace_the_tokens_own():
    case, model = loaded("e2b")
    ids = mx.array(case.arrays["ids"][None])
    own = model.language_model.model.embed_tokens(ids)
    assert worst(np.array(model(ids, input_embeddings=own)), np.array(model(ids))) == 0
    assert worst(np.array(model(ids, input_embeddings=own * 1.1)), np.array(model(ids))) > LIMIT


def test_logits_are_float32_in_any_precision():
    case = load_case("31b")
    for dtype in (mx.float32, mx.bfloat16, mx.float16):
        model = build(case.config, case.seed, case.qk_norm, dtype)
        logits = model(mx.array(case.arrays["ids"][None, :9]))
        assert logits.dtype == mx.float32
        assert {v.dtype for _, v in tree_flatten(model.parameters())} == {dtype}
        assert model.make_cache()[0].append(*[mx.zeros((1, 2, 1, 16), dtype)] * 2).keys.dtype == dtype


def test_parameters_survive_a_round_trip():
    """`update` with the model's own parameters changes nothing: no array hides outside of them."""
    case, model = loaded("26b-a4b")
    ids = case.arrays["ids"][None]
    before = run(model, ids)
    model.update(tree_unflatten(tree_flatten(model.parameters())))
    assert worst(run(model, ids), before) == 0
