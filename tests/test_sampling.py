"""Samplers against the definition written out in numpy, reproducible draws, and refused settings."""

import dataclasses

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma4.errors import UsageError
from mlx_gemma4.sampling import Sampling, make_logits_processors, make_sampler
from mlx_gemma4.tokenizer import PUBLISHED_DEFAULTS


def defined(logits, temp, top_p, min_p, top_k):
    """One row's probabilities, token by token: temperature, top-k, top-p, min-p, each on what is left."""
    p = np.exp((logits - logits.max()) / temp)
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda i: -p[i])
    if 0 < top_k < len(p):
        order = order[:top_k]
    p = {i: p[i] / sum(p[j] for j in order) for i in order}
    if 0 < top_p < 1:
        kept, mass = [], 0.0
        for i in order:
            if kept and mass >= top_p:
                break
            kept.append(i)
            mass += p[i]
        p = {i: p[i] / sum(p[j] for j in kept) for i in kept}
    best = max(p.values())
    p = {i: v for i, v in p.items() if v >= min_p * best}
    row = np.zeros(len(logits))
    for i, v in p.items():
        row[i] = v / sum(p.values())
    return row


@pytest.mark.parametrize("temp", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 5, 64, 500])
@pytest.mark.parametrize(("top_p", "min_p"), [(0, 0), (1.0, 0), (0.5, 0), (0.95, 0.1), (0, 0.2), (1e-6, 1.0)])
def test_distribution_is_the_definition(temp, top_k, top_p, min_p):
    logits = np.random.default_rng(3).normal(0, 3, (4, 100)).astype(np.float32)
    logprobs = mx.array(logits) - mx.logsumexp(mx.array(logits), axis=-1, keepdims=True)
    got = np.array(make_sampler(temp, top_p, min_p, top_k, seed=0).distribution(logprobs))
    want = np.stack([defined(row.astype(np.float64), temp, top_p, min_p, top_k) for row in logits])
    assert ((got > 0) == (want > 0)).all()
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_temperature_comes_before_top_p():
    """At temperature 0.1 the best of these has nearly all the mass; top-p on the untempered ones would keep two."""
    logprobs = mx.log(mx.array([[0.5, 0.3, 0.2]]))
    assert np.count_nonzero(np.array(make_sampler(0.1, top_p=0.7).distribution(logprobs))) == 1
    assert np.count_nonzero(np.array(make_sampler(1.0, top_p=0.7).distribution(logprobs))) == 2


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.3}, {}])
def test_draws_follow_the_distribution(settings):
    logprobs = mx.log(mx.array([[0.4, 0.3, 0.15, 0.1, 0.05]]))
    sampler = make_sampler(1.0, seed=5, **settings)
    expected = np.array(sampler.distribution(logprobs))[0]
    drawn = np.array(sampler(mx.broadcast_to(logprobs, (20_000, 5))))
    counts = np.bincount(drawn, minlength=5) / len(drawn)
    np.testing.assert_allclose(counts, expected, atol=0.015)
    assert (counts[expected == 0] == 0).all()


def test_rows_are_drawn_from_their_own_distribution():
    logits = mx.array([[0.0, 100.0, 0.0], [100.0, 0.0, 0.0], [0.0, 0.0, 100.0]])
    for settings in ({}, {"top_k": 2}, {"top_k": 2, "top_p": 0.9, "min_p": 0.1}):
        assert make_sampler(1.0, seed=0, **settings)(logits).tolist() == [1, 0, 2]


@pytest.mark.parametrize("temp", [0, 1e-7])
def test_cold_is_greedy(temp):
    logprobs = mx.array([[-3.0, -1.0, -2.0], [-1.0, -2.0, -3.0]])
    sampler = make_sampler(temp, top_p=0.5, top_k=2)
    assert sampler(logprobs).tolist() == [1, 0]
    assert sampler.distribution(logprobs).tolist() == [[0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("temp", [1e-4, 1e4])
def test_extreme_temperatures_stay_finite(temp):
    logprobs = mx.array([[-0.5, -1.0, -200.0]]).astype(mx.bfloat16)
    p = np.array(make_sampler(temp).distribution(logprobs))
    assert np.isfinite(p).all() and abs(p.sum() - 1) < 1e-5


def test_infinite_logits_are_never_drawn():
    logprobs = mx.array([[0.0, -mx.inf, -mx.inf, 0.0]])
    drawn = make_sampler(1.0, top_k=3, top_p=0.99, seed=1)(mx.broadcast_to(logprobs, (500, 4)))
    assert set(drawn.tolist()) == {0, 3}


def draws(sampler, n=40):
    logprobs = mx.zeros((1, 1000))
    return [sampler(logprobs).item() for _ in range(n)]


def test_seeds_reproduce_and_nothing_else_interferes():
    first = draws(make_sampler(1.0, seed=7))
    mx.random.seed(0)
    state = mx.random.state[0].tolist()
    sampler, other = make_sampler(1.0, seed=7), make_sampler(1.0, seed=8)
    mixed = []
    for _ in range(40):
        mixed += draws(sampler, 1)
        draws(other, 1)
    assert mixed == first and len(set(first)) > 20
    assert mx.random.state[0].tolist() == state
    assert draws(make_sampler(1.0, seed=8)) != first
    sampler.reseed(7)
    assert draws(sampler) == first


def test_no_seed_is_different_every_time():
    assert draws(make_sampler(1.0)) != draws(make_sampler(1.0))


# Processors


def apply(processors, tokens, logits):
    logits = mx.array(logits)
    for process in processors:
        logits = process(mx.array(tokens, mx.int32), logits)
    return logits


def test_repetition_penalty():
    [process] = make_logits_processors(repetition_penalty=2.0, repetition_context_size=3)
    logits = [[1.0, -1.0, 4.0, 3.0]]
    # Token 3 is four back and out of sight; token 1 occurs twice and is penalised once.
    assert apply([process], [3, 1, 1, 2], logits).tolist() == [[1.0, -2.0, 2.0, 3.0]]
    assert apply([process], [], logits).tolist() == logits
    rows = apply([process], [[0, 0], [2, 3]], [[1.0, -1.0, 4.0, 3.0]] * 2)
    assert rows.tolist() == [[0.5, -1.0, 4.0, 3.0], [1.0, -1.0, 2.0, 1.5]]


def test_bias_and_suppression():
    processors = make_logits_processors(logit_bias={1: 5.0, 3: -5.0}, suppress_tokens=[0, 2])
    got = apply(processors, [0], [[9.0, 1.0, 9.0, 1.0]] * 2).tolist()
    assert got == [[-float("inf"), 6.0, -float("inf"), -4.0]] * 2


def test_processors_leave_their_input_alone():
    logits = mx.array([[1.0, 2.0, 3.0]])
    for process in make_logits_processors(2.0, 20, {1: 1.0}, [0]):
        process(mx.array([1, 2]), logits)
    assert logits.tolist() == [[1.0, 2.0, 3.0]]


@pytest.mark.parametrize("penalty", [None, 1, 1.0])
def test_nothing_asked_is_nothing_done(penalty):
    assert make_logits_processors(repetition_penalty=penalty, logit_bias={}, suppress_tokens=()) == []


# Settings


BAD = [
    ("temperature", -0.1, "at least 0"),
    ("temperature", float("nan"), "at least 0"),
    ("temperature", float("inf"), "at least 0"),
    ("temperature", "1", "at least 0"),
    ("top_p", 1.1, "between 0 and 1"),
    ("top_p", -1, "between 0 and 1"),
    ("min_p", 2, "between 0 and 1"),
    ("top_k", -1, "0 (off) or more"),
    ("top_k", 1.5, "whole number"),
    ("top_k", True, "whole number"),
    ("seed", -1, "between 0 and 2**64"),
    ("seed", 2**64, "between 0 and 2**64"),
    ("repetition_penalty", 0, "above 0"),
    ("repetition_context_size", 0, "1 or more"),
    ("max_tokens", 0, "at least 1, or -1"),
    ("max_tokens", -2, "at least 1, or -1"),
]


@pytest.mark.parametrize(("name", "value", "says"), BAD)
def test_settings_out_of_range(name, value, says):
    with pytest.raises(UsageError) as e:
        Sampling(**{name: value})
    assert name in str(e.value) and says in str(e.value)
    with pytest.raises(UsageError):
        dataclasses.replace(Sampling(), **{name: value})


def test_make_functions_check_too():
    for bad in ({"temp": -1}, {"temp": 1.0, "top_p": 2}, {"top_k": -3}, {"seed": "x"}):
        with pytest.raises(UsageError):
            make_sampler(**bad)
    with pytest.raises(UsageError):
        make_logits_processors(repetition_penalty=-1)


def test_defaults_of_a_checkpoint():
    published = Sampling.from_defaults(PUBLISHED_DEFAULTS)
    assert published == Sampling() == Sampling(temperature=1.0, top_p=0.95, top_k=64)
    assert Sampling.from_defaults({"temperature": 0.7, "top_p": 0.5}).temperature == 0.0  # no do_sample: greedy
    silent = Sampling.from_defaults({"do_sample": True})
    assert (silent.temperature, silent.top_p, silent.top_k) == (1.0, 1.0, 50)
    banned = Sampling.from_defaults(PUBLISHED_DEFAULTS | {"suppress_tokens": [5, 6]})
    assert len(banned.logits_processors()) == 1 and banned.suppress_tokens == (5, 6)
    changed = Sampling.from_defaults(PUBLISHED_DEFAULTS, temperature=0.0, top_k=None, seed=3)
    assert changed == Sampling(temperature=0.0, seed=3)


def test_sampling_builds_what_it_says():
    sampler = Sampling(temperature=0.5, top_p=0.9, top_k=10, min_p=0.1, seed=4).sampler()
    assert (sampler.temp, sampler.top_p, sampler.top_k, sampler.min_p, sampler.seed) == (0.5, 0.9, 10, 0.1, 4)
