"""Rotary position embedding, both kinds Gemma 4 uses, with angles as exact as float32 allows.

Owns the frequencies, the cos/sin tables and the rotation. Leaves to its callers which positions a call is about.

Why not `mx.fast.rope`: from a base it derives the frequencies with a float32 exp, so the angle at position 1,500 is off
by 1e-3 rad and logits by 5e-3; and every layer computes its own cosines. Here the frequencies are those of
transformers (float32 powers), and one table per attention kind serves all layers of a step.
"""

import mlx.core as mx
import numpy as np

from ..config import RopeConfig
from .fused import fused

# Tables of global layers are kept between steps and grown by doubling from this many positions.
FIRST_TABLE = 2048


def inverse_frequencies(config: RopeConfig, width: int) -> np.ndarray:
    """Radians per position of each rotated pair, [P] float32, P <= width / 2.

    "default": theta^(-2i/width) for i < width/2. "proportional": the same formula for the first
    `rotated_fraction` of the pairs; the others stand still and are left out here.
    Source: transformers `modeling_gemma4.py: compute_default_rope_parameters`,
    `modeling_rope_utils.py: _compute_proportional_rope_parameters` (float32 throughout, as there).
    """
    pairs = int(config.rotated_fraction * width // 2) if config.kind == "proportional" else width // 2
    exponents = np.arange(0, 2 * pairs, 2, dtype=np.float32) / np.float32(width)
    # The power is taken in float64 and rounded once: float32 `pow` differs between libraries in the last bit.
    powers = np.power(np.float64(config.theta), exponents.astype(np.float64)).astype(np.float32)
    return (np.float32(1.0) / powers / np.float32(config.factor)).astype(np.float32)


def table_length(positions: int) -> int:
    """Positions a kept table has when this many are asked for."""
    return max(FIRST_TABLE, 1 << (positions - 1).bit_length())


class Rope:
    """Rotation for heads of one width. Pair i is (x[i], x[i + width/2]).

    Tables are float32 [..., P]; only the P rotated pairs are stored. A `Rope` holds no trained weights.
    """

    def __init__(self, config: RopeConfig, width: int):
        self.width = width
        self.inv_freq = inverse_frequencies(config, width)
        self.pairs = len(self.inv_freq)
        self._table: tuple[mx.array, mx.array] | None = None

    def angles(self, positions: mx.array) -> tuple[mx.array, mx.array]:
        """cos and sin, float32 [..., P], of integer positions [...]."""
        angle = positions.astype(mx.float32)[..., None] * mx.array(self.inv_freq)
        return mx.cos(angle), mx.sin(angle)

    def table(self, stop: int) -> tuple[mx.array, mx.array]:
        """cos and sin of positions 0 .. stop-1, float32 [stop, P]; kept, and grown by doubling.

        8 * P bytes per position (512 for a 512-wide global head), once for all layers that share this object.
        """
        have = self._table[0].shape[0] if self._table is not None else 0
        if stop > have:
            self._table = self.angles(mx.arange(table_length(stop)))
            # Evaluated at once, so that any thread may use it: an unevaluated array belongs to its thread's stream.
            mx.eval(*self._table)
        assert self._table is not None
        cos, sin = self._table
        return cos[:stop], sin[:stop]

    def rotate(self, x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        """Rotates heads x [B, H, L, width] by tables [L, P] or [B, 1, L, P]; computes in float32, keeps x's dtype."""
        half, pairs = self.width // 2, self.pairs
        a, b = x[..., :pairs], x[..., half : half + pairs]
        first, second = rotate_pairs(a, b, cos, sin)
        if pairs == half:
            return mx.concatenate([first, second], axis=-1)
        return mx.concatenate([first, x[..., pairs:half], second, x[..., half + pairs :]], axis=-1)


@fused
def rotate_pairs(a: mx.array, b: mx.array, cos: mx.array, sin: mx.array) -> tuple[mx.array, mx.array]:
    """(a cos - b sin, b cos + a sin) in float32, rounded once to a's dtype."""
    return (a * cos - b * sin).astype(a.dtype), (b * cos + a * sin).astype(a.dtype)
