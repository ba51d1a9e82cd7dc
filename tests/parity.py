"""The parity fixtures and the ways to run a model over them.

Owns reading `fixtures/parity/*.npz` (what is in them: `fixtures/make_parity.py`) and building our model on their seeds.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import recipe

from mlx_gemma4.config import Gemma4Config
from mlx_gemma4.models.gemma4 import Model

FOLDER = Path(__file__).parent / "fixtures" / "parity"
NAMES = sorted(path.stem for path in FOLDER.glob("*.npz"))
SHORT = [name for name in NAMES if not name.startswith("long-")]
LONG = [name for name in NAMES if name.startswith("long-")]
FAMILIES = ("e2b", "e4b", "26b-a4b", "31b")


@dataclass(frozen=True)
class Case:
    config: dict[str, Any]
    seed: int
    qk_norm: float
    arrays: dict[str, np.ndarray]

    @property
    def window(self) -> int:
        return self.config["text_config"]["sliding_window"]

    def by_length(self, kind: str) -> dict[int, np.ndarray]:
        """The arrays named kind/<n>: {n: array}."""
        return {int(k.split("/")[1]): v for k, v in self.arrays.items() if k.startswith(kind + "/")}

    def batch(self) -> tuple[np.ndarray, list[int], list[np.ndarray]]:
        """Left-padded rows [R, L], how much each is padded, and each row's reference logits [n, V]."""
        ids, lengths = self.arrays["ids"], self.arrays["batch/lengths"].tolist()
        rows = np.zeros((len(lengths), max(lengths)), np.int64)
        for row, n in zip(rows, lengths, strict=True):
            row[-n:] = ids[-n:]
        logits = np.split(self.arrays["batch/logits"], np.cumsum(lengths)[:-1])
        return rows, [max(lengths) - n for n in lengths], logits


def load_case(name: str) -> Case:
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = dict(file)
    config = json.loads(bytes(arrays.pop("config")))
    return Case(config, int(arrays.pop("seed")), float(arrays.pop("qk_norm")), arrays)


def build(config: dict[str, Any], seed: int, qk_norm: float, dtype: mx.Dtype = mx.float32) -> Model:
    """Our model on the recipe's weights."""
    model = Model(Gemma4Config.from_dict(config))
    weights = model.sanitize(recipe.mlx_weights(config, seed, qk_norm, dtype))
    model.load_weights(list(weights.items()), strict=True)
    mx.eval(model.parameters())
    return model


def run(model: Any, ids: np.ndarray, chunk: int | None = None, padding: list[int] | None = None) -> np.ndarray:
    """float32 logits [B, L, V] of ids [B, L]: one call without a cache, or calls of `chunk` tokens with one."""
    if chunk is None:
        call = {} if padding is None else {"left_padding": padding}
        return np.array(model(mx.array(ids), **call).astype(mx.float32))
    cache = model.make_cache() if padding is None else model.make_cache(left_padding=padding)
    parts = []
    for start in range(0, ids.shape[1], chunk):
        parts.append(model(mx.array(ids[:, start : start + chunk]), cache=cache).astype(mx.float32))
        mx.eval(parts[-1], [c.state for c in cache])
    return np.array(mx.concatenate(parts, axis=1))


def greedy(model: Any, prompt: np.ndarray, count: int, chunk: int) -> np.ndarray:
    """The `count` likeliest tokens one after the other, the prompt [L] prefilled in chunks."""
    cache, logits = model.make_cache(), None
    for start in range(0, len(prompt), chunk):
        logits = model(mx.array(prompt[None, start : start + chunk]), cache=cache)
    out = []
    for _ in range(count):
        token = mx.argmax(logits[:, -1], axis=-1)
        out.append(token.item())
        logits = model(token[:, None], cache=cache)
    return np.array(out)


def worst(a: np.ndarray, b: np.ndarray) -> float:
    """Largest absolute difference; NaN counts as infinite."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.nan_to_num(np.abs(a.astype(np.float64) - b).max(), nan=np.inf))


def divergence(truth: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """KL(truth || logits) in nats per position, [...] from [..., V]."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64) - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log_softmax(truth), log_softmax(logits)
    return (np.exp(p) * (p - q)).sum(-1)
