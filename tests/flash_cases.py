"""Inputs, truth and plain MLX ops for the tests of the two flash kernels.

Owns the drawing of keys and the rule a kernel must keep; which cases matter is in the tests.
"""

from dataclasses import dataclass

import brute_force
import mlx.core as mx
import numpy as np

from mlx_gemma4.config import RopeConfig
from mlx_gemma4.kernels.key_form import KeyForm
from mlx_gemma4.models.rope import Rope

SPREAD = 3.0  # standard deviation of scores: neither a mean of everything nor one key


@dataclass(frozen=True)
class Case:
    L: int = 1
    past: int = 0  # positions before the first query
    kv_heads: int = 1
    G: int = 8
    D: int = 512
    dtype: mx.Dtype = mx.bfloat16
    one_vector: bool = False
    first: tuple[int, ...] | None = None  # of each row; its length is the batch
    spare: int = 0  # slots of the buffers beyond the last position, which hold NaN
    k_start: int = 0
    gap: int = 0  # last positions, the queries' own first, whose keys are in another segment; < 0: keys ahead
    scale: float = 1.0


class Drawn:
    """Arrays of a case: buffers as a cache holds them, and what is in use of them."""

    def __init__(self, case: Case, seed: int = 0):
        self.case = case
        rng = np.random.default_rng(seed)
        B = 1 if case.first is None else len(case.first)
        T = case.past + case.L - case.gap - case.k_start

        def draw(*shape: int) -> mx.array:
            return mx.array(rng.standard_normal(shape, np.float32))

        q = draw(B, case.L, case.kv_heads * case.G, case.D) * (SPREAD / case.scale / case.D**0.5)
        self.q = q.astype(case.dtype).swapaxes(1, 2)  # strides as the model's queries have them
        self.keys, self.values = (self._buffer(draw(B, case.kv_heads, T, case.D)) for _ in range(2))
        self.form: KeyForm | None = None
        if case.one_vector:
            weight = (1 + 0.3 * draw(case.D)).astype(case.dtype)
            self.form = KeyForm(weight, Rope(RopeConfig(1e6, "proportional", 0.25), case.D))
            self.values = None
        self.first = None if case.first is None else mx.array(case.first)
        self.where = {"scale": case.scale, "q_start": case.past, "first_visible": self.first}
        if not case.one_vector:
            self.where["k_start"] = case.k_start

    def _buffer(self, x: mx.array) -> mx.array:
        B, H, T, D = x.shape
        spare = mx.full((B, H, self.case.spare, D), mx.nan)
        buffer = mx.concatenate([x, spare], axis=2).astype(self.case.dtype)
        mx.eval(buffer)
        return buffer[:, :, :T]

    def _stored(self, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """Keys and values as a plain cache would hold them in `dtype`."""
        if self.form is None:
            return self.keys.astype(dtype), self.values.astype(dtype)
        T = self.keys.shape[2]
        first = mx.zeros((1,), mx.int32) if self.first is None else self.first
        at = mx.maximum(mx.arange(T) - first[:, None], 0)[:, None]
        cos, sin = self.form.rope.angles(at)
        form = KeyForm(self.form.weight.astype(dtype), self.form.rope)
        return form.keys(self.keys.astype(dtype), cos, sin), self.keys.astype(dtype)

    def truth(self) -> np.ndarray:
        arrays = (np.array(x) for x in (self.q.astype(mx.float32), *self._stored(mx.float32)))
        options = {"q_start": self.case.past, "k_start": self.case.k_start, "scale": self.case.scale}
        return np.nan_to_num(brute_force.attention(*arrays, first_visible=self.case.first, **options))

    def plain(self) -> np.ndarray:
        """MLX's own attention over stored keys and values, in the case's dtype."""
        keys, values = self._stored(self.case.dtype)
        p = self.case.past + mx.arange(self.case.L)[:, None]
        t = self.case.k_start + mx.arange(keys.shape[2])
        mask = t <= p
        if self.first is not None:
            mask = mask & (t >= self.first[:, None, None, None])
        out = mx.fast.scaled_dot_product_attention(self.q, keys, values, scale=self.case.scale, mask=mask)
        return np.array(out.astype(mx.float32))

    def check(self, out: mx.array) -> None:
        """At most twice the error of plain ops in the same dtype; rows in the padding are 0."""
        seen = np.ones(self.truth().shape[:3], bool)
        if self.case.first is not None:
            positions = self.case.past + np.arange(self.case.L)
            seen &= (positions >= np.array(self.case.first)[:, None])[:, None]
        found, truth = np.array(out.astype(mx.float32)), self.truth()
        assert (found[~seen] == 0).all()
        ours, theirs = (np.abs(x - truth)[seen].max() for x in (found, self.plain()))
        assert ours <= 2 * theirs + 1e-6, (ours, theirs)
