"""Decode from a long compressed cache: ours against mlx-vlm's TurboQuant, paired, in one process.

    python -m benchmarks.kv_decode --csv decode.csv

The same random mid-size checkpoint, tokens and type on both sides, every global layer compressed on both, in rounds
A B B A; medians, and the ratio ours/theirs per round. mlx-vlm by itself leaves the last global layer exact, so its
caches are put in place here; in a model whose layers read other layers' caches it cannot compress those at all, so
`apart` has E2B's form without such layers. Caches are filled with random rows outside the timing. The exact caches of
both sides stand beside them. Never a test: machines are noisy.
"""

import argparse
import csv
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_gemma4.cache import KeyForm
from mlx_gemma4.config import GLOBAL, SLIDING
from mlx_gemma4.kv_bits import PLAIN
from mlx_gemma4.loading import load_model

from .checkpoint import SHAPES, config_of, write_checkpoint

SHAPES["apart"] = SHAPES["e-family"] | {"layer_types": [SLIDING] * 4 + [GLOBAL], "num_kv_shared_layers": 0}
COLUMNS = ("checkpoint", "context", "bits", "side", "tokens_per_second", "ours_over_it", "lowest", "highest",
           "by_cpu_time", "cache_mb")  # fmt: skip


class Side:
    """A model and one cache of it, filled."""

    def __init__(self, model: Callable[..., mx.array], cache: list[Any], vocabulary: int):
        self.model, self.cache = model, cache
        self.first = mx.random.randint(0, vocabulary, (1, 1), key=mx.random.key(5))

    def step(self, token: mx.array) -> mx.array:
        return mx.argmax(self.model(token, cache=self.cache)[:, -1], axis=-1)

    def run(self, tokens: int) -> tuple[float, float]:
        """Seconds and processor seconds of a pipelined greedy run; the cache grows."""
        y = self.step(self.first)
        mx.eval(y)
        begin, cpu = time.perf_counter(), time.process_time()
        for _ in range(tokens):
            following = self.step(y[None])
            mx.async_eval(following)
            y.item()
            y = following
        mx.eval(y)
        return time.perf_counter() - begin, time.process_time() - cpu


def rows(shape: str, layer: int, context: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Random keys and values [1, H_kv, context, D] of a layer; values of mean square 1, as they come out of v_norm."""
    config = config_of(shape)
    sliding = config["layer_types"][layer] == SLIDING
    heads = config["num_key_value_heads"] if sliding else config["num_global_key_value_heads"]
    width = config["head_dim" if sliding else "global_head_dim"]
    size = (1, heads or config["num_key_value_heads"], context, width)
    keys, values = (mx.random.normal(size, key=mx.random.key(2 * layer + i)) for i in (0, 1))
    return keys.astype(dtype), mx.fast.rms_norm(values, None, 1e-6).astype(dtype)


def our_side(folder: Path, shape: str, context: int, bits: float, dtype: mx.Dtype) -> Side:
    model = load_model(folder, dtype=str(dtype).removeprefix("mlx.core."))
    cache = model.make_cache(kv_bits=bits)
    for i, c in enumerate(cache):
        keys, values = rows(shape, i, context, dtype)
        attention = model.layers[i].self_attn
        if "one vector" in c.kind:
            c.append(values, KeyForm(attention.k_norm.weight, attention._rope))
        else:
            c.append(keys, values)
        mx.eval(c.state)
    return Side(model, cache, model.text_config.vocab_size)


def their_side(folder: Path, shape: str, context: int, bits: float, dtype: mx.Dtype) -> Side:
    from mlx_vlm.models.cache import KVCache
    from mlx_vlm.turboquant import TurboQuantKVCache
    from mlx_vlm.utils import load_model as load_theirs

    model = load_theirs(folder).language_model
    cache = model.make_cache()
    if bits != PLAIN:
        cache = [TurboQuantKVCache(bits) if type(c) is KVCache else c for c in cache]
    for i, c in enumerate(cache):
        c.update_and_fetch(*rows(shape, i, context, dtype))
        mx.eval(c.state)
    return Side(lambda tokens, cache: model(tokens, cache=cache).logits, cache, config_of(shape)["vocab_size"])


def compare(shape: str, context: int, bits: float, args: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp) / shape
        write_checkpoint(folder, shape, "4bit", args.dtype)
        dtype = getattr(mx, args.dtype)
        sides = {
            "ours": our_side(folder, shape, context, bits, dtype),
            "mlx-vlm": their_side(folder, shape, context, bits, dtype),
        }
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for side in sides.values():
        side.run(2)  # compiled kernels, the first growth of a buffer
    for round_ in range(args.rounds):
        for name in list(sides) if round_ % 2 == 0 else list(sides)[::-1]:
            runs[name].append(sides[name].run(args.tokens))
    out = []
    for name, side in sides.items():
        ratios, by_cpu = ([b[i] / a[i] for a, b in zip(runs["ours"], runs[name], strict=True)] for i in (0, 1))
        values = (
            f"{shape} 4bit/{args.dtype}",
            context,
            bits,
            name,
            round(args.tokens / statistics.median(s for s, _ in runs[name]), 2),
            round(statistics.median(ratios), 3),
            round(min(ratios), 3),
            round(max(ratios), 3),
            round(statistics.median(by_cpu), 3),
            round(sum(c.nbytes for c in side.cache) / 1e6, 2),
        )
        out.append(dict(zip(COLUMNS, values, strict=True)))
        print(" ".join(f"{v!s:>9}" for v in values), f"load {os.getloadavg()[0]:.1f}", flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=("apart", "dense"), default=["apart", "dense"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[8192])
    parser.add_argument("--bits", nargs="+", type=float, default=[PLAIN, 3.5])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    table = []
    print(" ".join(f"{c:>9}" for c in COLUMNS))
    for shape in args.shapes:
        for context in args.contexts:
            for bits in args.bits:
                table += compare(shape, context, bits, args)
    if args.csv:
        with args.csv.open("w", newline="") as f:
            writer = csv.DictWriter(f, fieldnames=COLUMNS)
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    main()
