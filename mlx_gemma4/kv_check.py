"""What compression of the cache does to a model's answers: the exact cache against compressed ones, token by token.

Owns the two measurements, their figures and the recommendation. Leaves the texts to `kv_sample.py`, the caches to
`model.make_cache` and what is printed to `cli/kv_check.py`.

1. `score`: a long text is read by both caches, then its last part a few positions at a time. At each position that
   counts, p is the exact cache's distribution of the next token and q the compressed one's: KL(p || q), whether both
   have the same first choice, and what each thinks of the token that really follows.
2. `recall`: questions about facts told far back, answered greedily.

Memory stays bounded however long the text is: one exact and one compressed cache, logits of CHUNK positions of each.
"""

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from . import cache as caches
from .cache.blocks import BLOCK, BlockCache
from .errors import ContextError, UsageError
from .generation import context_limit, generate_step, prefill
from .kv_bits import EXACT, PLAIN, KvBits
from .kv_sample import Passage, Questions
from .tokenizer import Tokenizer
from .turns import TurnParser

# Positions scored in one call. A position sees those of its own call exactly, so more than a block would flatter the
# compressed cache; and 64 rows of 262,144 float32 logits are 67 MB.
CHUNK = BLOCK

# Limits of the recommendation.
# By Pinsker's inequality two distributions this close share all but sqrt(KL / 2) = a tenth of their mass: a sampled
# token could differ at one position in ten at most. Perplexity moves by about 2 %.
MOST_KL = 0.02
# Greedy decoding leaves the exact cache's path at no more than three tokens in a hundred.
LEAST_TOP1 = 0.97
# What was told is what a cache is for: of a hundred questions one more may fail.
MOST_LOST = 0.01

# An answer here is a short sentence; the model gets room for a polite one. Without turns only a word or a number.
ANSWER_TOKENS, WORD_TOKENS = 64, 12

Progress = Callable[[str], Any]


@dataclass(frozen=True)
class Agreement:
    """Compressed against exact over the positions that count."""

    kl_mean: float  # nats
    kl_p99: float  # nats; one position in a hundred is worse
    top1: float  # share of positions with the same first choice
    perplexity: float
    exact_perplexity: float


@dataclass(frozen=True)
class Measured:
    """One setting. `recall` counts right answers; None when no questions were asked."""

    name: str  # as it was asked for: "3.5", or "4/3" for keys and values
    bits: KvBits
    real_bits: float  # stored bits per number of the compressed positions, scales included
    cache_bytes: int  # of the whole cache after the text, sliding rings and exact positions included
    agreement: Agreement
    recall: int | None


@dataclass(frozen=True)
class Report:
    context: int  # tokens of the text
    scored: int  # positions that count
    questions: int
    exact_bytes: int
    exact_recall: int | None
    settings: list[Measured]

    @property
    def recommended(self) -> Measured | None:
        """The smallest cache within all three limits; None when there is none.

        A setting counts only if those that store at least as much of keys and values are within the limits as well:
        what passes where more bits fail has passed by luck.
        """
        good = [
            m
            for m in self.settings
            if m.bits.compresses_global and all(self.within_limits(n) for n in self.settings if _as_large(n, m))
        ]
        return min(good, key=lambda m: m.cache_bytes, default=None)

    def within_limits(self, m: Measured) -> bool:
        lost = 0 if m.recall is None or self.exact_recall is None else self.exact_recall - m.recall
        return m.agreement.kl_mean <= MOST_KL and m.agreement.top1 >= LEAST_TOP1 and lost <= MOST_LOST * self.questions


def _as_large(n: Measured, m: Measured) -> bool:
    return n.bits.keys >= m.bits.keys and n.bits.values >= m.bits.values


def make_cache(model: Any, bits: KvBits = EXACT) -> list[Any]:
    """The model's empty caches at `bits`, whatever it was loaded with. Raises UsageError when no layer is reached."""
    return model.make_cache(kv_bits=PLAIN, kv_key_bits=bits.keys, kv_value_bits=bits.values, kv_mode=bits.mode)


def check(
    model: Any,
    tokenizer: Tokenizer,
    wanted: dict[str, KvBits],
    passage: Passage,
    questions: Questions | None = None,
    *,
    step: int = 2048,
    progress: Progress = lambda what: None,
) -> Report:
    """Measures all settings. `step`: positions of a prompt computed at a time; `progress` is told what comes next.

    Raises UsageError when nothing of the passage counts, ContextError when it or a question does not fit the model.
    """
    if not wanted or not passage.scored:
        raise UsageError("nothing to compare: give at least one setting and a text with positions that count")
    _check_room(model, len(passage.ids) - 1)
    if questions is not None:
        longest = max(len(ids) for ids, _ in questions.asked) + (ANSWER_TOKENS if questions.in_turns else WORD_TOKENS)
        _check_room(model, len(questions.shared) + longest)

    for bits in wanted.values():
        make_cache(model, bits)  # one that this model cannot have is refused before anything is computed

    exact_recall = None
    if questions is not None:
        progress("exact cache: questions")
        exact_recall = recall(model, tokenizer, questions, make_cache(model), step)
    progress("exact cache: reading the text")
    exact = make_cache(model)
    prefill(model, mx.array(passage.ids[: passage.head - 1]), exact, step)
    begin = caches.snapshot(exact)

    out = []
    for name, bits in wanted.items():
        progress(f"{name} bits: reading the text")
        compressed = make_cache(model, bits)
        prefill(model, mx.array(passage.ids[: passage.head - 1]), compressed, step)
        progress(f"{name} bits: comparing")
        caches.restore(exact, begin)
        agreement = score(model, passage, exact, compressed)
        size, real = caches.nbytes(compressed), real_bits(compressed)
        del compressed
        right = None
        if questions is not None:
            progress(f"{name} bits: questions")
            right = recall(model, tokenizer, questions, make_cache(model, bits), step)
        out.append(Measured(name, bits, real, size, agreement, right))
    asked = 0 if questions is None else len(questions.asked)
    return Report(len(passage.ids) - 1, passage.scored, asked, caches.nbytes(exact), exact_recall, out)


def score(model: Any, passage: Passage, exact: list[Any], compressed: list[Any]) -> Agreement:
    """Both caches hold passage.ids[: head - 1]; the rest is fed to both, CHUNK positions at a time."""
    fed, following = passage.ids[passage.head - 1 : -1], passage.ids[passage.head :]
    parts = []
    for start in range(0, len(fed), CHUNK):
        stop = min(start + CHUNK, len(fed))
        tokens = mx.array([fed[start:stop]])
        # One after the other, so that only one set of activations is alive.
        p = _log_probabilities(model(tokens, cache=exact))
        mx.eval(p, [c.state for c in exact])
        q = _log_probabilities(model(tokens, cache=compressed))
        mx.eval(q, [c.state for c in compressed])
        figures = np.array(compare(p, q, mx.array(following[start:stop])))
        parts.append(figures[:, np.array(passage.counts[start:stop], bool)])
        mx.clear_cache()
    return summary(np.concatenate(parts, axis=1))


def compare(p: mx.array, q: mx.array, following: mx.array) -> mx.array:
    """Log-probabilities p, q [L, V] and the ids that follow [L] -> float32 [4, L]: KL(p || q), whether the first choice
    is the same, and the negative log-likelihood of what follows under p and under q."""
    kl = (mx.exp(p) * (p - q)).sum(axis=-1)
    same = mx.argmax(p, axis=-1) == mx.argmax(q, axis=-1)
    index = following[:, None]
    likely = [mx.take_along_axis(x, index, axis=-1)[:, 0] for x in (p, q)]
    # Rounding can leave a sum of almost nothing below zero, which no divergence is.
    return mx.stack([mx.maximum(kl, 0), same.astype(mx.float32), -likely[0], -likely[1]])


def summary(figures: np.ndarray) -> Agreement:
    """[4, n] of `compare` over all positions that count, in one `Agreement`."""
    kl, same, exact, compressed = figures.astype(np.float64)
    return Agreement(
        kl_mean=float(kl.mean()),
        kl_p99=float(np.percentile(kl, 99)),
        top1=float(same.mean()),
        perplexity=float(np.exp(compressed.mean())),
        exact_perplexity=float(np.exp(exact.mean())),
    )


def recall(model: Any, tokenizer: Tokenizer, questions: Questions, cache: list[Any], step: int = 2048) -> int:
    """How many questions are answered right, greedily, each behind the same text, which is read once into `cache`."""
    prefill(model, mx.array(questions.shared), cache, step)
    begin = caches.snapshot(cache)
    right = 0
    for ids, fact in questions.asked:
        caches.restore(cache, begin)
        if questions.in_turns:
            parser = TurnParser.after_prompt(tokenizer, questions.shared + ids)
            said = _answer(model, ids, cache, ANSWER_TOKENS, parser)
        else:
            steps = generate_step(mx.array(ids), model, max_tokens=WORD_TOKENS, prompt_cache=cache)
            said = tokenizer.decode([token for token, _ in steps]).partition("\n")[0]
        right += fact.is_in(said)
    return right


def real_bits(cache: Iterable[Any]) -> float:
    """Stored bits per number of compressed positions, the mean over compressed layers; 16 where there are none."""
    found = [c.real_bits() for c in cache if isinstance(c, BlockCache)]
    return sum(found) / len(found) if found else float(PLAIN)


def _answer(model: Any, ids: list[int], cache: list[Any], most: int, parser: TurnParser) -> str:
    events = []
    with closing(generate_step(mx.array(ids), model, max_tokens=most, prompt_cache=cache)) as steps:
        for token, _ in steps:
            events += parser.feed(token)
            if parser.stopped:
                break
    if not parser.stopped:
        events += parser.finish()
    return "".join(event.text for event in events if event.kind == "text")


def _log_probabilities(logits: mx.array) -> mx.array:
    """[1, L, V] -> [L, V] float32."""
    logits = logits[0].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _check_room(model: Any, tokens: int) -> None:
    limit = context_limit(model)
    if limit is not None and tokens > limit:
        raise ContextError(
            f"the check needs {tokens:,} positions and the model has {limit:,}; give a smaller --context"
        )
