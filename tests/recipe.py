"""Weights and tokens that any machine makes alike from a name and a seed: no file to store, no torch to fill one.

Owns the numbers behind the parity fixtures: their generator (`fixtures/make_parity.py`) fills transformers' own classes
with them, and the tests fill our graph and the peers'. Shapes and configurations come from `tiny.py`.

Only Philox's raw words (a stream numpy promises to keep), integer sums, square roots and roundings are used, never a
library's `log` or `cos`, so the last bit does not depend on the platform.
"""

import hashlib
import math
from typing import Any

import mlx.core as mx
import numpy as np
from tiny import text_shapes

PREFIX = "model.language_model."


def _words(name: str, seed: int, count: int) -> np.ndarray:
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    return np.random.Philox(key=key).random_raw(count)


def _halves(name: str, shape: tuple[int, ...], seed: int, words: int) -> np.ndarray:
    """uint16 [*shape, 4 * words]"""
    count = math.prod(shape)
    return _words(name, seed, count * words).astype("<u8").view("<u2").reshape(*shape, 4 * words)


def uniform(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """float64 in [0, 1)"""
    return _halves("u/" + name, shape, seed, 1)[..., 0] / 65536.0


def normal(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """float64, near enough to a unit normal: the centred and scaled sum of eight 16-bit integers."""
    total = _halves("n/" + name, shape, seed, 2).astype(np.int64).sum(-1)
    return (total - 8 * 65535 / 2) / math.sqrt(8 * (65536.0**2 - 1) / 12)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 rounded to the nearest bfloat16, ties to even, still stored as float32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return bits.astype(np.uint32).view(np.float32)


def tensor(name: str, shape: tuple[int, ...], seed: int, qk_norm: float) -> np.ndarray:
    """float32, every value a bfloat16. No scale is 1 and none is shared, so a forgotten one shows."""
    n, u = (lambda: normal(name, shape, seed)), (lambda: uniform(name, shape, seed))
    if name.endswith("layer_scalar"):
        x = 0.6 + 0.5 * u()
    elif name.endswith("per_expert_scale"):
        x = 0.5 + u()
    elif name.endswith("router.scale"):
        x = 1 + 0.2 * n()
    elif name.endswith("router.proj.weight"):
        x = 2 * n()
    elif name.endswith(("q_norm.weight", "k_norm.weight")):
        # Attention runs at scale 1: this is how sharp the softmax is, and how much rounding it amplifies.
        x = qk_norm * (1 + 0.2 * n())
    elif name == PREFIX + "norm.weight":
        x = 8 + n()  # large, so that the soft cap bends and greedy choices are clear
    elif "norm" in name:
        x = 1 + 0.2 * n()
    elif name.endswith("embed_tokens_per_layer.weight"):
        x = 0.25 * n()
    else:
        x = n() / math.sqrt(shape[-1])
    return to_bfloat16(x)


def weights(config: dict[str, Any], seed: int, qk_norm: float = 0.5) -> dict[str, np.ndarray]:
    """The text decoder's tensors under their names on the Hub, those of sharing layers that nothing reads included."""
    shapes = {PREFIX + name: shape for name, shape in text_shapes(config["text_config"]).items()}
    return {name: tensor(name, shape, seed, qk_norm) for name, shape in shapes.items()}


def mlx_weights(config: dict[str, Any], seed: int, qk_norm: float = 0.5, dtype: mx.Dtype = mx.float32):
    """The same as MLX arrays: {name: array}."""
    return {name: mx.array(value).astype(dtype) for name, value in weights(config, seed, qk_norm).items()}


def tokens(length: int, vocabulary: int, seed: int, batch: int = 1) -> np.ndarray:
    """int64 [batch, length], 3 .. vocabulary-1: no padding, no end."""
    words = _words("tokens", seed, batch * length) % np.uint64(vocabulary - 3)
    return words.astype(np.int64).reshape(batch, length) + 3
