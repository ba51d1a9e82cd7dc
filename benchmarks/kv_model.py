"""Compressed caches on the built-in model: ours and mlx-vlm's TurboQuant, in one process, on one set of weights.

    python -m benchmarks.kv_model --csv model.csv
    python -m benchmarks.kv_model --skip-recall                       # only the divergence; a few minutes on a CPU

Divergence: a long recall prompt, the model's answers scored token by token against the same side's exact cache (both
sides agree to 1e-5 there). Recall: unseen questions of the model's own test set, answered greedily to the last
character. mlx-vlm always leaves the last global layer with a cache exact, here one of two; "ours, one layer" does the
same, for comparison. mlx-vlm is told to compress from the first position (`quantized_kv_start` 0; its default, 5,000,
would leave these prompts exact).
"""

import argparse
import copy
import csv
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_gemma4 import demo, kv_check, kv_sample, load
from mlx_gemma4.generation import prefill
from mlx_gemma4.kv_bits import PLAIN, KvBits

RATES = (4, 3.5, 3, 2.5, 2)
COLUMNS = ("side", "bits", "cache_bytes", "kl_mean", "kl_p99", "top1", "recall", "questions", "recall_tokens")
LONGEST_ANSWER = 64


class Ours:
    name = "ours"

    def __init__(self, model: Any):
        self._model = model

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        return self._model(tokens, cache=cache)

    def make_cache(self, bits: float) -> list[Any]:
        return kv_check.make_cache(self._model, KvBits(bits, bits))


class OneLayer(Ours):
    """Ours with the layers compressed that mlx-vlm compresses."""

    name = "ours, one layer"

    def make_cache(self, bits: float) -> list[Any]:
        return [*super().make_cache(bits)[:-1], super().make_cache(PLAIN)[-1]]


class MlxVlm:
    """mlx-vlm's text model with the parameters of ours: its own loader wants a vision tower."""

    name = "mlx-vlm"

    def __init__(self, ours: Any):
        from mlx_vlm.models.gemma4.config import TextConfig
        from mlx_vlm.models.gemma4.language import LanguageModel

        config = json.loads((Path(demo.path()) / "config.json").read_text())
        self._model = LanguageModel(TextConfig.from_dict(config["text_config"]))
        weights = [(k.removeprefix("language_model."), v) for k, v in tree_flatten(ours.parameters())]
        names = {name for name, _ in weights}
        group, bits = (config["quantization"][k] for k in ("group_size", "bits"))
        nn.quantize(self._model, group, bits, class_predicate=lambda path, _: f"{path}.scales" in names)
        self._model.load_weights(weights, strict=True)

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        return self._model(tokens, cache=cache).logits

    def make_cache(self, bits: float) -> list[Any]:
        from mlx_vlm.generate import maybe_quantize_kv_cache
        from mlx_vlm.turboquant import TurboQuantKVCache

        cache = self._model.make_cache()
        if bits != PLAIN:
            maybe_quantize_kv_cache(cache, 0, 64, bits, "turboquant")
            assert sum(isinstance(c, TurboQuantKVCache) for c in cache) == 1
        return cache


SIDES = {side.name: side for side in (Ours, OneLayer, MlxVlm)}


def divergence(side: Any, tokenizer: Any, rates: list[float], context: int, texts: int) -> dict[float, dict[str, Any]]:
    """Per rate the means over `texts` passages of about `context` tokens."""
    found: dict[float, list[kv_check.Agreement]] = {bits: [] for bits in rates}
    size = dict.fromkeys(rates, 0)
    for seed in range(texts):
        passage = kv_sample.sample_passage(tokenizer, context, seed)
        head = mx.array(passage.ids[: passage.head - 1])
        exact = side.make_cache(PLAIN)
        prefill(side, head, exact)
        for bits in rates:
            compressed = side.make_cache(bits)
            prefill(side, head, compressed)
            found[bits].append(kv_check.score(side, passage, copy.deepcopy(exact), compressed))
            size[bits] = sum(c.nbytes for c in compressed)
    figures = ("kl_mean", "kl_p99", "top1")
    return {b: {"cache_bytes": size[b]} | {k: mean(getattr(a, k) for a in found[b]) for k in figures} for b in rates}


def recall_texts(tokenizer: Any, tokens: int, count: int) -> Iterator[tuple[list[int], list[list[int]], list[str]]]:
    """Per text: its ids, what follows them for each question, the answers. The model card's questions (seed 2)."""
    sys.path.insert(0, str(Path(demo.__file__).parent / "training"))
    import world

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    texts: dict[str, list[Any]] = {}
    for example in world.test_set(f"recall-{tokens}", count, encode, 2):
        texts.setdefault(example.notes["text"], []).append(example)
    for text, examples in texts.items():
        shared = encode(f"<bos><|turn>user\n{text}")
        prompts = [encode("".join(part for part, _ in list(world.segments(e))[:-2])) for e in examples]
        assert all(p[: len(shared)] == shared for p in prompts)
        yield shared, [p[len(shared) :] for p in prompts], [e.answer for e in examples]


def recall(side: Any, tokenizer: Any, bits: float, tokens: int, count: int) -> int:
    """How many of `count` questions behind texts of `tokens` tokens are answered as expected, to the last character."""
    right = 0
    for shared, asked, answers in recall_texts(tokenizer, tokens, count):
        read = side.make_cache(bits)
        prefill(side, mx.array(shared), read)
        for ids, answer in zip(asked, answers, strict=True):
            right += said(side, tokenizer, copy.deepcopy(read), ids) == answer
        mx.clear_cache()
    return right


def said(side: Any, tokenizer: Any, cache: list[Any], ids: list[int]) -> str:
    out: list[int] = []
    token = mx.argmax(side(mx.array([ids]), cache)[0, -1]).item()
    while token not in tokenizer.eos_token_ids and len(out) < LONGEST_ANSWER:
        out.append(token)
        token = mx.argmax(side(mx.array([[token]]), cache)[0, -1]).item()
    return tokenizer.decode(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--context", type=int, default=4096, help="tokens of a text for the divergence")
    parser.add_argument("--texts", type=int, default=3)
    parser.add_argument("--recall-bits", nargs="+", type=float, default=[PLAIN, 3.5])
    parser.add_argument("--recall-tokens", nargs="+", type=int, default=[2048, 4096])
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--skip-recall", action="store_true")
    parser.add_argument("--skip-divergence", action="store_true")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    model, tokenizer = load(demo.path(), dtype="float32")
    rows: list[dict[str, Any]] = []

    def report(started: float, **row: Any) -> None:
        rows.append(row)
        shown = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()}
        print(*(f"{k} {v}" for k, v in shown.items()), f"({time.time() - started:.0f} s)", sep="  ", flush=True)

    for side in (SIDES[name](model) for name in args.sides):
        begin = time.time()
        rates = [] if args.skip_divergence else args.bits
        for bits, figures in divergence(side, tokenizer, rates, args.context, args.texts).items():
            report(begin, side=side.name, bits=bits, **figures)
        for tokens in [] if args.skip_recall else args.recall_tokens:
            for bits in args.recall_bits:
                begin = time.time()
                right = recall(side, tokenizer, bits, tokens, args.questions)
                row = {"recall": right, "questions": args.questions, "recall_tokens": tokens}
                report(begin, side=side.name, bits=bits, **row)
    if args.csv:
        with args.csv.open("w", newline="") as f:
            writer = csv.DictWriter(f, fieldnames=COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
