"""A compressed cache beside everything it was ever given: its answers must be attention over what it claims to hold.

Owns the truth for tests of compressed caches, computed apart from them: which positions are codes after which steps,
what these decode to, and attention over both in float64. Bit patterns and distortion are the codec's tests.
"""

import brute_force
import mlx.core as mx
import numpy as np

from mlx_gemma4.cache import CompressedCache, CompressedOneVectorCache, CompressedSlidingCache, KeyForm
from mlx_gemma4.config import RopeConfig
from mlx_gemma4.kernels.turboquant import codec, decode, encode, unrotate
from mlx_gemma4.models.rope import Rope

KINDS = ("global", "one-vector", "ring")
ROPE = RopeConfig(1e4, "proportional", 0.25)
WIDTH, ROTATED = 32, 32  # 4 rotated pairs, whose row of 8 is padded to 32
SINKS, BLOCK, WINDOW = 16, 64, 150


def through_the_codec(x: np.ndarray, bits: float, mode: str, unit: bool, gain: str) -> np.ndarray:
    """x [..., D] coded and decoded, in its own coordinates, times the gain of that name."""
    form = codec(x.shape[-1], bits, mode)
    codes, scales = encode(form, mx.array(x), unit)
    return np.array(unrotate(form, decode(form, codes, scales))) * getattr(form, gain)


class Layer:
    """One compressed cache with 2 KV heads and 4 query heads. `coded`: positions that are codes by now."""

    def __init__(self, kind, seed=0, padding=None, bits=3.5, value_bits=None, mode="pairs"):
        self.rng = np.random.default_rng(seed)
        self.kind, self.padding, self.bits, self.mode = kind, padding, bits, mode
        self.value_bits = value_bits or bits
        self.batch = len(padding) if padding else 1
        forms = [codec(WIDTH, b, mode) for b in (bits, self.value_bits)]
        self.weight = (0.5 + self.rng.random(WIDTH)).astype(np.float32)
        self.form = KeyForm(mx.array(self.weight), Rope(ROPE, WIDTH))
        self.cache = {
            "global": lambda: CompressedCache(*forms, padding),
            "one-vector": lambda: CompressedOneVectorCache(forms[0], codec(ROTATED, bits, mode), padding),
            "ring": lambda: CompressedSlidingCache(WINDOW, *forms, padding),
        }[kind]()
        self.coded = 0
        # Exact keys and values of all positions, and what the codes of the first `coded` stand for: [B, H_kv, T, D].
        self.exact = tuple(np.zeros((self.batch, 2, 0, WIDTH), np.float32) for _ in range(2))
        self.codes = self.exact

    def draw(self, heads: int, length: int) -> np.ndarray:
        return self.rng.standard_normal((self.batch, heads, length, WIDTH), np.float32)

    def append(self, length: int) -> None:
        """`length` more positions, and the answer to as many queries."""
        start = self.exact[0].shape[2]
        values = self.draw(2, length)
        values /= np.sqrt(np.square(values).mean(-1, keepdims=True))
        if self.kind == "one-vector":
            keys = self._keys(values, start)
            view = self.cache.append(mx.array(values), self.form)
        else:
            keys = self.draw(2, length)
            view = self.cache.append(mx.array(keys), mx.array(values))
        self.exact = self._longer(self.exact, keys, values)
        q = self.draw(4, length) * 0.5
        found = np.array(view.attend(mx.array(q)))
        assert np.isfinite(found).all()
        truth = self._truth(q, start)
        real = np.isfinite(truth)  # queries in the padding see nothing
        assert np.abs(found - truth)[real].max(initial=0) <= 3e-5
        blocks = (self.cache.offset - self.coded) // BLOCK - 1
        if blocks > 0:
            first, self.coded = self.coded, self.coded + blocks * BLOCK
            rows = (x[:, :, first : self.coded] for x in self.exact)
            self.codes = self._longer(self.codes, *self._decoded(*rows, first))
        assert (self.cache.offset, self.cache.coded) == (start + length, self.coded)

    def _longer(self, old, keys, values):
        return tuple(np.concatenate(pair, axis=2) for pair in zip(old, (keys, values), strict=True))

    def _keys(self, u: np.ndarray, start: int) -> np.ndarray:
        rows = []
        for row, pad in zip(u, self.padding or [0] * self.batch, strict=True):
            positions = np.maximum(np.arange(start, start + u.shape[2]) - pad, 0)
            turn = brute_force.angles(positions, WIDTH, ROPE.theta, ROPE.rotated_fraction)
            rows.append(brute_force.rotated(row * self.weight, np.cos(turn), np.sin(turn)))
        return np.stack(rows).astype(np.float32)

    def _decoded(self, keys: np.ndarray, values: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
        out = through_the_codec(values, self.value_bits, self.mode, True, "value_gain")
        if self.kind != "one-vector":
            return through_the_codec(keys, self.bits, self.mode, False, "key_gain"), out
        still = through_the_codec(values, self.bits, self.mode, True, "key_gain") * self.weight
        pairs = self.form.rope.pairs
        turned = [*range(pairs), *range(WIDTH // 2, WIDTH // 2 + pairs)]
        # Not from `keys`: a last bit of difference may choose another code.
        positions = np.arange(keys.shape[2]) + start - np.array(self.padding or [0])[:, None]
        tables = self.form.rope.angles(mx.maximum(mx.array(positions), 0)[:, None])
        row = np.array(self.form.rotated(mx.array(values), *tables))
        assert np.abs(row - keys[..., turned]).max() <= 1e-4
        row = np.pad(row, [(0, 0)] * 3 + [(0, ROTATED - 2 * pairs)])
        still[..., turned] = through_the_codec(row, self.bits, self.mode, False, "key_gain")[..., : 2 * pairs]
        return still, out

    def _truth(self, q: np.ndarray, start: int) -> np.ndarray:
        positions = np.arange(self.exact[0].shape[2])
        coded = np.broadcast_to(positions < self.coded, (self.batch, positions.size)).copy()
        if self.kind != "ring":
            coded &= positions >= np.array(self.padding or [0])[:, None] + SINKS
        held = []
        for codes, exact in zip(self.codes, self.exact, strict=True):
            codes = np.concatenate([codes, exact[:, :, self.coded :]], axis=2)
            held.append(np.where(coded[:, None, :, None], codes, exact))
        window = WINDOW if self.kind == "ring" else None
        return brute_force.attention(q, *held, q_start=start, window=window, first_visible=self.padding)

    def cut(self, length: int) -> None:
        self.exact = tuple(x[:, :, :length] for x in self.exact)
        self.coded = min(self.coded, length)
        self.codes = tuple(x[:, :, : self.coded] for x in self.codes)

    def snapshot(self):
        return self.cache.snapshot(), self.exact, self.codes, self.coded

    def restore(self, saved) -> None:
        self.cache.restore(saved[0])
        _, self.exact, self.codes, self.coded = saved
