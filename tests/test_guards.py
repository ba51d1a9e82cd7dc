"""Endless repetition is noticed, honest repetition is not; and what a full context gives up."""

import random

import pytest

from mlx_gemma4.errors import ContextError
from mlx_gemma4.guards import LEAST_TIMES, LEAST_TOKENS, LONGEST_PERIOD, RepetitionGuard
from mlx_gemma4.room import as_text, drop_oldest, with_summary


def stuck_at(tokens):
    guard = RepetitionGuard()
    return next((i for i, token in enumerate(tokens) if guard.stuck(token)), None)


@pytest.mark.parametrize("period", [1, 2, 7, 40, LONGEST_PERIOD])
def test_a_phrase_over_and_over_is_noticed_soon(period):
    phrase = random.Random(period).sample(range(1000), period)
    rng = random.Random(1)
    before = [rng.randrange(1000) for _ in range(300)]
    found = stuck_at(before + phrase * 1000)
    assert found is not None
    said = found + 1 - len(before)
    assert max(LEAST_TOKENS, (LEAST_TIMES - 1) * period) <= said <= max(LEAST_TOKENS, LEAST_TIMES * period) + period


def test_honest_repetition_goes_on():
    rng = random.Random(3)
    numbered = [t for i in range(200) for t in (5, 6, 7, 8, 9, i, 10)]  # lines that differ in their number
    once = [9] * (LEAST_TOKENS - 1) + [4]  # a row of zeros
    noise = [rng.randrange(4) for _ in range(5000)]
    phrase_twice = list(range(500)) * 2
    for tokens in (numbered, once, noise, phrase_twice):
        assert stuck_at(tokens) is None


def test_a_phrase_longer_than_looked_for_goes_unnoticed():
    assert stuck_at(list(range(LONGEST_PERIOD + 1)) * 50) is None


def messages(n):
    return [{"role": r, "content": f"{r} {i}"} for i in range(n) for r in ("user", "assistant")]


def test_the_oldest_turns_go_first():
    kept = drop_oldest(messages(5), lambda m: len(m) <= 5)
    assert kept == messages(5)[6:] and kept[0]["role"] == "user"
    with pytest.raises(ContextError, match="last message alone"):
        drop_oldest(messages(3), lambda m: False)


def test_calls_and_their_results_stay_together():
    chain = [{"role": r, "content": ""} for r in ("user", "assistant", "tool", "assistant", "user", "assistant")]
    assert drop_oldest(chain, lambda m: len(m) < 6) == chain[4:]


def test_a_summary_stands_before_the_first_message_kept():
    first, *rest = with_summary(messages(2)[2:], "all\nwas well")
    assert first["content"].startswith("(Earlier in this conversation: all was well)\n\nuser 1") and rest
    parts = with_summary([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "s")[0]["content"]
    assert [p["type"] for p in parts] == ["text", "text"]


def test_a_long_history_is_told_from_its_end():
    told = as_text(messages(50), lambda text: len(text) < 200)
    assert len(told) < 200 and told.endswith("assistant 49")
