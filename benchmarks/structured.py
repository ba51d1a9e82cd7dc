"""What a grammar costs per token: decode with a JSON schema beside the same decode without.

    python -m benchmarks.structured [--csv results.csv] [--rounds 6]

Owns the checkpoints (mid size, 4 bits, random) and synthetic vocabularies of 8,192 and 262,144 tokens, written and
removed. Both sides run in one process in rounds A B B A, the same sampler, the same number of tokens. Counted is the
time of the processor, all threads: on a device of its own the masks are computed while it computes logits, and only
the clock would say what is left of them.

    free       generate_step alone, a step ahead of its caller
    watched    a thinking budget that is never reached: each token is known before the next is chosen
    schema     a schema, most of it free text
    limits     a schema whose texts have lengths and patterns: the costliest masks
    ending     the first schema with so few tokens left that ways to an end are kept up to date
"""

import argparse
import csv
import itertools
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer
from tokenizers.models import BPE

from benchmarks.checkpoint import config_of, save
from mlx_gemma4.config import Gemma4Config
from mlx_gemma4.generation import generate_step
from mlx_gemma4.guides import TurnGuide
from mlx_gemma4.loading import load_model
from mlx_gemma4.models.gemma4 import Model
from mlx_gemma4.sampling import make_sampler
from mlx_gemma4.structured import grammar_for
from mlx_gemma4.tokenizer import Tokenizer

TOKENS = 64
SPECIAL = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<|tool_call>": 48, "<tool_call|>": 49, '<|"|>': 52}
SPECIAL |= {"<|channel>": 100, "<channel|>": 101, "<|turn>": 105, "<turn|>": 106}
TEXT: dict[str, Any] = {"type": "string"}


def rows(properties: dict[str, Any]) -> dict[str, Any]:
    """A list of objects that is not over before the measurement is."""
    row = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "array", "items": row, "minItems": 200}


SCHEMAS = {
    "schema": rows({"name": TEXT, "count": {"type": "integer"}, "kind": {"enum": ["red", "green"]}, "note": TEXT}),
    "limits": rows({"name": TEXT | {"maxLength": 20}, "code": TEXT | {"pattern": "^[A-Z]{2,8}-[0-9]+$"}}),
}
SIDES = ("watched", "schema", "limits", "ending")


def vocabulary(size: int) -> Tokenizer:
    """Control tokens, bytes, characters, runs of punctuation and blanks, and made-up words: no text of any language,
    but tokens of the lengths a real vocabulary has."""
    rng, taken = random.Random(0), {i: t for t, i in SPECIAL.items()}
    letters = "etaoinshrdlcumwfgypbvkjxqz"

    def pieces():
        yield from ("\n", "▁", *(f"<0x{b:02X}>" for b in range(256)), *map(chr, range(33, 127)))
        yield from map("".join, itertools.product('"{}[]:,./()-_=', repeat=2))
        yield from itertools.chain(("▁" * n for n in range(2, 32)), ("\n" * n for n in range(2, 17)))
        if size > 100_000:
            for first, last in ((0xC0, 0x250), (0x370, 0x530), (0x3040, 0x3100), (0x4E00, 0x9FFF), (0xAC00, 0xD7A4)):
                yield from map(chr, range(first, last))
        while True:
            length = rng.choice((2, 3, 3, 4, 4, 5, 5, 6, 7, 8, 9, 10, 12))
            word = "".join(rng.choices(letters, weights=range(26, 0, -1), k=length))
            yield rng.choice(("", "▁")) + (word.capitalize() if rng.random() < 0.2 else word)

    ids: dict[str, int] = {}
    more = pieces()
    for i in range(size):
        name = taken.get(i) or (f"<unused{i}>" if i < 107 else next(p for p in more if p not in ids))
        ids[name] = i
    raw = RawTokenizer(BPE(vocab=ids, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    raw.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return Tokenizer(raw.to_str(), eos_token_ids=[1, 106])


def checkpoint(folder: Path, shape: str, size: int) -> Any:
    raw = config_of(shape) | {"vocab_size": size, "vocab_size_per_layer_input": size, "dtype": "float32"}
    mx.random.seed(7)
    save(folder, raw, Model(Gemma4Config.from_dict(raw)), packed=True)
    return load_model(folder, dtype="float32")


def guide_of(side: str, tokenizer: Tokenizer, prompt: list[int]) -> TurnGuide | None:
    if side == "free":
        return None
    if side == "watched":
        return TurnGuide(tokenizer, prompt, True, 100_000)
    schema = SCHEMAS["schema" if side == "ending" else side]
    if side == "ending":
        schema = schema | {"minItems": 0}
    return TurnGuide(tokenizer, prompt, False, None, grammar_for(tokenizer, schema))


def decode(model: Any, tokenizer: Tokenizer, side: str, seed: int) -> tuple[float, float]:
    """Seconds of the processor and of the clock for TOKENS tokens, the prompt and the first one left out."""
    prompt = [2, *range(200, 264)]
    most = {"ending": 200}.get(side, 100_000)
    steps = generate_step(
        mx.array(prompt),
        model,
        max_tokens=most,
        sampler=make_sampler(1.0, top_p=0.95, top_k=64, seed=seed),
        guide=guide_of(side, tokenizer, prompt),
    )
    next(steps)
    begin = time.process_time(), time.perf_counter()
    for _ in itertools.islice(steps, TOKENS):
        pass
    out = time.process_time() - begin[0], time.perf_counter() - begin[1]
    steps.close()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    found = []
    for shape, size in (("e-family", 8192), ("dense", 262_144)):
        tokenizer = vocabulary(size)
        with tempfile.TemporaryDirectory() as folder:
            model = checkpoint(Path(folder), shape, size)
        for side in SIDES:
            for name in ("free", side):
                decode(model, tokenizer, name, 0)
            ratios, clock, base = [], [], []
            for seed in range(args.rounds):
                a, b, c, d = (decode(model, tokenizer, name, seed) for name in ("free", side, side, "free"))
                ratios.append((b[0] + c[0]) / (a[0] + d[0]))
                clock.append((b[1] + c[1]) / (a[1] + d[1]))
                base.append(1000 * (a[0] + d[0]) / 2 / TOKENS)
            row = {
                "checkpoint": shape,
                "vocabulary": size,
                "side": side,
                "free_cpu_ms_per_token": round(statistics.median(base), 2),
                "over_free_by_cpu_time": round(statistics.median(ratios), 3),
                "lowest": round(min(ratios), 3),
                "highest": round(max(ratios), 3),
                "over_free_by_clock": round(statistics.median(clock), 3),
            }
            print(", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
            found.append(row)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, found[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(found)


if __name__ == "__main__":
    main()
