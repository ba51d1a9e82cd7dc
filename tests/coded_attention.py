"""Attention on codes the plain way: every row decoded, every score in one product. What tiles and kernels are
compared with, in float32 for the truth and in any other type for the error that plain operations make."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_gemma4.kernels.reference.flash_attention import MASKED
from mlx_gemma4.kernels.turboquant import Codec, codec, decode
from mlx_gemma4.kernels.turboquant_attention import CodedKeys, turboquant_attention


@dataclass
class Case:
    q: mx.array  # [B, H, L, D]
    keys: CodedKeys
    values: CodedKeys | None
    rotary: CodedKeys | None
    q_rotary: mx.array | None
    start: int
    length: int
    first: mx.array | None
    scale: float = 1.0

    def attend(self, start: int | None = None, length: int | None = None) -> tuple[mx.array, mx.array]:
        return turboquant_attention(
            self.q,
            self.keys,
            self.values,
            self.rotary,
            self.q_rotary,
            scale=self.scale,
            start=self.start if start is None else start,
            length=self.length if length is None else length,
            first=self.first,
        )

    def plain(self, dtype: mx.Dtype = mx.float32) -> tuple[mx.array, mx.array]:
        """(out, lse), float32, with products and decoded rows in `dtype`."""

        def scores(q: mx.array, rows: CodedKeys) -> mx.array:
            q = (q.astype(mx.float32) * (self.scale * rows.codec.key_gain)).astype(dtype)
            return (grouped(q) @ decoded(rows).swapaxes(-1, -2)).astype(mx.float32)

        def decoded(rows: CodedKeys) -> mx.array:
            return decode(rows.codec, rows.codes, rows.scales, dtype)

        def grouped(q: mx.array) -> mx.array:
            return q.reshape(B, kv_heads, -1, q.shape[-1])

        B, kv_heads, capacity, _ = self.keys.codes.shape
        s = scores(self.q, self.keys)
        if self.rotary is not None and self.q_rotary is not None:
            s = s + scores(self.q_rotary, self.rotary)
        t = mx.arange(capacity)
        seen = (t >= self.start) & (t < self.length)
        if self.first is not None:
            seen = seen & (t >= self.first[:, None])[:, None, None]
        s = mx.where(seen, s, MASKED)
        values = self.keys if self.values is None else self.values
        out = (mx.softmax(s, axis=-1).astype(dtype) @ decoded(values)).astype(mx.float32) * values.codec.value_gain
        blind = mx.logical_not(mx.broadcast_to(seen, s.shape).any(axis=-1))
        out, lse = mx.where(blind[..., None], 0.0, out), mx.where(blind, MASKED, mx.logsumexp(s, axis=-1))
        return out.reshape(self.q.shape), lse.reshape(self.q.shape[:3])


def coded_rows(rng: np.random.Generator, c: Codec, *shape: int, scaled: bool) -> CodedKeys:
    """Random codes [*shape, words]: any bits are a row."""
    codes = rng.integers(0, 1 << 32, (*shape, c.words), dtype=np.uint64).astype(np.uint32)
    scales = mx.array(rng.uniform(0.3, 2, shape).astype(np.float16)) if scaled else None
    return CodedKeys(c, mx.array(codes), scales)


def case(
    *,
    heads: int = 4,
    kv_heads: int = 1,
    queries: int = 1,
    width: int = 64,
    bits: float = 3.5,
    value_bits: float | None = None,
    mode: str = "trellis",
    one_vector: bool = True,
    rotary_width: int | None = 32,
    start: int = 0,
    length: int = 40,
    capacity: int | None = None,
    first: list[int] | None = None,
    batch: int | None = None,
    dtype: mx.Dtype = mx.float32,
    seed: int = 0,
) -> Case:
    """Random codes and queries whose softmax is spread over several positions."""
    rng = np.random.default_rng(seed)
    batch = batch or (1 if first is None else len(first))
    shape = (batch, kv_heads, capacity or length + 3)

    def query(d: int, spread: float) -> mx.array:
        return mx.array(rng.normal(0, spread / d**0.5, (batch, heads, queries, d)).astype(np.float32)).astype(dtype)

    rotary = None
    if one_vector and rotary_width is not None:
        rotary = coded_rows(rng, codec(rotary_width, bits, mode), *shape, scaled=True)
    return Case(
        q=query(width, 2.0),
        keys=coded_rows(rng, codec(width, bits, mode), *shape, scaled=not one_vector),
        values=None if one_vector else coded_rows(rng, codec(width, value_bits or bits, mode), *shape, scaled=True),
        rotary=rotary,
        q_rotary=None if rotary is None else query(rotary.codec.width, 1.0),
        start=start,
        length=length,
        first=None if first is None else mx.array(first, mx.int32),
    )


def close(c: Case, found: tuple[mx.array, mx.array]) -> None:
    """Both parts within twice the error that plain operations of the queries' type make, all against float32."""
    for ours, truth, plain in zip(found, c.plain(), c.plain(c.q.dtype), strict=True):
        assert ours.shape == truth.shape and ours.dtype == mx.float32
        allowed = 2 * mx.abs(plain - truth).max().item() + 2e-5
        assert mx.abs(ours - truth).max().item() <= allowed
