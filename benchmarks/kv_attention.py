"""What coding keys and values does to attention: synthetic heads, our caches against mlx-vlm's TurboQuant codec.

    python -m benchmarks.kv_attention --csv heads.csv                 # 4,096 positions, all rates; minutes on a CPU
    python -m benchmarks.kv_attention --lengths 32768 --bits 3.5

512-wide heads in Gemma 4's form: u of mean square 1 is the value, RoPE(w * u) the key. u has a power-law spectrum
and 30 % of its energy in a mean that all positions share; w varies by e^0.3. Queries of three kinds: `diffuse` (logits
of standard deviation 1), `medium` (2.5), `needle` (diffuse, but one position has half of the mass). All that is
compared is read from codes. `sink` is the whole cache instead, first and last positions exact: position 0 has 0.7 of
the mass.

Columns, means over heads: error, the output's relative root mean square error; KL of the attention weights (nats; not
for `sink`, where weights stay inside); `kl_ratio`, ours over mlx-vlm's at the same number of bits, with the lowest and
the highest of a head (they differ: what w does to u decides how much one vector loses or gains against keys of its
own). mlx-vlm takes 3.5 as 3 for keys and 4 for values.
"""

import argparse
import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gemma4.cache import CompressedCache, CompressedOneVectorCache, KeyForm
from mlx_gemma4.cache.blocks import BLOCK, SINKS
from mlx_gemma4.cache.compressed_one_vector import padded, rotated_width
from mlx_gemma4.config import RopeConfig
from mlx_gemma4.kernels.turboquant import BITS, Codec, codec, decode, rotate, unrotate
from mlx_gemma4.kernels.turboquant_attention import CodedKeys, turboquant_attention
from mlx_gemma4.models.rope import Rope

WIDTH, MEAN_ENERGY, SPECTRUM = 512, 0.3, 0.5
REGIMES = ("diffuse", "medium", "needle")
COLUMNS = (
    "positions",
    "heads",
    "regime",
    "form",
    "bits",
    "stored_bits",
    "error",
    "kl",
    "kl_ratio",
    "lowest",
    "highest",
)


@dataclass(frozen=True)
class Head:
    vectors: mx.array  # u, float32 [1, 1, T, D]
    keys: mx.array  # [1, 1, T, D]
    form: KeyForm

    def slice(self, start: int, stop: int) -> tuple[mx.array, mx.array]:
        """Keys and values [T, D] of these positions."""
        return self.keys[0, 0, start:stop], self.vectors[0, 0, start:stop]


def make_head(positions: int, seed: int = 0) -> Head:
    rng = np.random.default_rng(seed)
    deviation = rng.permutation(np.arange(1, WIDTH + 1) ** -SPECTRUM)
    u = rng.standard_normal((positions, WIDTH)) * deviation
    shared = rng.standard_normal(WIDTH) * deviation
    u *= np.sqrt((1 - MEAN_ENERGY) / np.square(u).sum(-1).mean())
    u += shared * np.sqrt(MEAN_ENERGY / np.square(shared).sum())
    u /= np.sqrt(np.square(u).mean(-1, keepdims=True))
    vectors = mx.array(u.astype(np.float32))[None, None]
    rope = Rope(RopeConfig(kind="proportional", theta=1e6, rotated_fraction=0.25), WIDTH)
    form = KeyForm(mx.array(np.exp(0.3 * rng.standard_normal(WIDTH)).astype(np.float32)), rope)
    keys = form.keys(vectors, *rope.table(positions))
    mx.eval(vectors, keys)
    return Head(vectors, keys, form)


def queries(head: Head, regime: str, count: int, start: int, stop: int, seed: int = 1) -> mx.array:
    """[count, D] such that the weights over positions start .. stop are of this kind."""
    rng = np.random.default_rng(seed)
    keys = np.array(head.slice(start, stop)[0], np.float64)
    q = rng.standard_normal((count, WIDTH))
    q *= (2.5 if regime == "medium" else 1.0) / (q @ keys.T).std(-1, keepdims=True)
    if regime in ("needle", "sink"):
        wanted = 0.5 if regime == "needle" else 0.7
        at = rng.integers(0, len(keys), count) if regime == "needle" else np.zeros(count, int)
        for i, t in enumerate(at):
            direction, low, high = keys[t] / np.square(keys[t]).sum(), 0.0, 60.0
            base, slope = q[i] @ keys.T, direction @ keys.T
            for _ in range(50):  # the weight grows with what is added along the key
                middle = (low + high) / 2
                low, high = (middle, high) if softmax(base + middle * slope)[t] < wanted else (low, middle)
            q[i] += low * direction
    return mx.array(q.astype(np.float32))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attention(q: mx.array, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
    """(log-weights [Q, T], output [Q, D]) of q [Q, D] over [T, D]."""
    scores = q @ keys.T
    logs = scores - mx.logsumexp(scores, axis=-1, keepdims=True)
    return logs, mx.exp(logs) @ values


def divergence(p: mx.array, q: mx.array) -> float:
    """Mean KL of log-weights [Q, T]."""
    return (mx.exp(p) * (p - q)).sum(-1).mean().item()


def error(out: mx.array, truth: mx.array) -> float:
    return mx.sqrt(mx.square(out - truth).sum() / mx.square(truth).sum()).item()


class Separate:
    """`CompressedCache`: keys and values each with codes."""

    form = "ours, K and V"

    def __init__(self, head: Head, positions: int, key_bits: float, value_bits: float):
        self.cache = CompressedCache(codec(WIDTH, key_bits), codec(WIDTH, value_bits))
        self.cache.append(head.keys[:, :, :positions], head.vectors[:, :, :positions])

    def codes(self, q: mx.array) -> tuple[mx.array, mx.array]:
        """(log-weights, output) over the coded positions from SINKS on."""
        keys, values = self.cache.keys.held(), self.cache.values.held()
        turned = rotate(keys.codec, q)
        out = coded(turned, keys, values, None, None, self.cache.coded)
        scores = product(turned, keys, self.cache.coded)
        return scores - mx.logsumexp(scores, axis=-1, keepdims=True), unrotate(values.codec, out)

    def whole(self, head: Head, q: mx.array, position: int) -> mx.array:
        """Output with everything up to `position`, which is the next, seen."""
        new = slice(position, position + 1)
        return self.cache.append(head.keys[:, :, new], head.vectors[:, :, new]).attend(q[None, :, None])[0, :, 0]


class OneVector:
    """`CompressedOneVectorCache`: u, and the rotated dimensions of the key."""

    form = "ours, one vector"

    def __init__(self, head: Head, positions: int, bits: float, _: float):
        self.key_form = head.form
        rotated = codec(rotated_width(head.form.rope.pairs), bits)
        self.cache = CompressedOneVectorCache(codec(WIDTH, bits), rotated)
        self.cache.append(head.vectors[:, :, :positions], head.form)

    def codes(self, q: mx.array) -> tuple[mx.array, mx.array]:
        u, r = self.cache.vectors.held(), self.cache.rotated.held()
        still, turned = self.key_form.split_query(q)
        still, turned = rotate(u.codec, still), rotate(r.codec, padded(turned, r.codec.width))
        out = coded(still, u, None, r, turned, self.cache.coded)
        scores = product(still, u, self.cache.coded) + product(turned, r, self.cache.coded)
        return scores - mx.logsumexp(scores, axis=-1, keepdims=True), unrotate(u.codec, out)

    def whole(self, head: Head, q: mx.array, position: int) -> mx.array:
        vectors = head.vectors[:, :, position : position + 1]
        return self.cache.append(vectors, head.form).attend(q[None, :, None])[0, :, 0]


def coded(
    q: mx.array, keys: CodedKeys, values: CodedKeys | None, rotary: CodedKeys | None, q_rotary: mx.array | None, n: int
) -> mx.array:
    """Output [Q, D] of the shipped attention on codes for rotated q [Q, D]: one KV head, a query head each."""
    turned = None if q_rotary is None else q_rotary[None, :, None]
    options: dict[str, Any] = {"scale": 1.0, "start": SINKS, "length": n, "first": None}
    return turboquant_attention(q[None, :, None], keys, values, rotary, turned, **options)[0][0, :, 0]


def product(q: mx.array, rows: CodedKeys, n: int) -> mx.array:
    """Scores [Q, T] of rotated q against coded positions SINKS .. n, with the gain of keys."""
    scales = None if rows.scales is None else rows.scales[0, 0, SINKS:n]
    c: Codec = rows.codec
    return c.key_gain * (q @ decode(c, rows.codes[0, 0, SINKS:n], scales).T)


class MlxVlm:
    """mlx-vlm's codec as its cache sets it up; attention in plain operations on what it decodes."""

    form = "mlx-vlm"

    def __init__(self, keys: mx.array, values: mx.array, bits: float):
        from mlx_vlm import turboquant

        _, self.key_bits, self.value_bits = turboquant.resolve_kv_bits(bits)
        seed = turboquant.DEFAULT_TURBOQUANT_SEED
        out = []
        for x, b, s in ((keys, self.key_bits, seed), (values, self.value_bits, seed + 1)):
            theirs = turboquant._build_codec(x[None, None], b, mode="mse", seed=s)
            out.append(theirs.dequantize(theirs.quantize(x[None, None]))[0, 0].astype(mx.float32))
            mx.eval(out[-1])
        self.keys, self.values = out

    @property
    def stored_bits(self) -> float:
        return (self.key_bits + self.value_bits) / 2 + 16 / WIDTH


FORMS: tuple[Callable[..., Any], ...] = (Separate, OneVector)


def measure(positions: int, bits: float, count: int, with_peer: bool, seed: int = 0) -> Iterator[dict[str, Any]]:
    """One row per form and regime for one head and rate; `positions` end with a whole block of codes."""
    total = positions + BLOCK  # so that the tail begins right behind them
    head = make_head(total + 1, seed)
    spans = dict.fromkeys(REGIMES, (SINKS, positions)) | {"sink": (0, total + 1)}
    q = {regime: queries(head, regime, count, *span) for regime, span in spans.items()}
    truth = {regime: attention(q[regime], *head.slice(*span)) for regime, span in spans.items()}
    if with_peer:
        for span in dict.fromkeys(spans.values()):
            peer = MlxVlm(*head.slice(*span), bits)
            for regime in (r for r in spans if spans[r] == span):
                logs, out = attention(q[regime], peer.keys, peer.values)
                kl = None if regime == "sink" else divergence(truth[regime][0], logs)
                yield figures(regime, peer, peer.stored_bits, error(out, truth[regime][1]), kl)
    for form in FORMS:
        ours = form(head, total, bits, bits)
        assert ours.cache.coded == positions
        for regime in REGIMES:
            logs, out = ours.codes(q[regime])
            kl = divergence(truth[regime][0], logs)
            yield figures(regime, ours, ours.cache.real_bits(), error(out, truth[regime][1]), kl)
        wrong = error(ours.whole(head, q["sink"], total), truth["sink"][1])
        yield figures("sink", ours, ours.cache.real_bits(), wrong, None)


def figures(regime: str, side: Any, stored: float, wrong: float, kl: float | None) -> dict[str, Any]:
    return {"regime": regime, "form": side.form, "stored_bits": stored, "error": wrong, "kl": kl}


def table(positions: int, bits: float, heads: int, count: int, with_peer: bool) -> Iterator[dict[str, Any]]:
    """The rows of `measure` as means over heads, `count` queries in all."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for seed in range(heads):
        for r in measure(positions, bits, -(-count // heads), with_peer, seed):
            found.setdefault((r["regime"], r["form"]), []).append(r)
    for (regime, form), each in found.items():
        values = [r["kl"] for r in each if r["kl"] is not None]
        theirs = [r["kl"] for r in found.get((regime, MlxVlm.form), [])]
        ratios = [a / b for a, b in zip(values, theirs, strict=True)] if theirs and values else []
        yield {
            "positions": positions,
            "heads": heads,
            "regime": regime,
            "form": form,
            "bits": bits,
            "stored_bits": each[0]["stored_bits"],
            "error": mean(r["error"] for r in each),
            "kl": mean(values) if values else None,
            "kl_ratio": sum(values) / sum(theirs) if ratios else None,
            "lowest": min(ratios, default=None),
            "highest": max(ratios, default=None),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096], help="multiples of 64")
    parser.add_argument("--bits", nargs="+", type=float, default=sorted(BITS))
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--queries", type=int, default=48, help="over all heads")
    parser.add_argument("--without-mlx-vlm", action="store_true")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    rows = []
    print(
        f"{'positions':>9} {'regime':8} {'form':17} {'bits':>4} {'stored':>6} {'error':>7} {'KL':>8}  ratio (per head)"
    )
    for positions in args.lengths:
        for bits in args.bits:
            for r in table(positions, bits, args.heads, args.queries, not args.without_mlx_vlm):
                rows.append(r)
                kl = "-" if r["kl"] is None else f"{r['kl']:.5f}"
                ratio = "" if r["kl_ratio"] is None else f"{r['kl_ratio']:.3f} ({r['lowest']:.3f}-{r['highest']:.3f})"
                print(
                    f"{positions:>9} {r['regime']:8} {r['form']:17} {bits:>4g} {r['stored_bits']:>6.3f} "
                    f"{r['error']:>7.2%} {kl:>8}  {ratio}",
                    flush=True,
                )
    if args.csv:
        with args.csv.open("w", newline="") as f:
            writer = csv.DictWriter(f, fieldnames=COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
