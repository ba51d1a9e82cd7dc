"""How keys follow from the one vector that K=V global layers remember, and a `Reader` that rebuilds them.

Owns the arithmetic in plain MLX ops; the Metal kernels do the same on the fly (`metal/include/attention.h`). The cache
that holds the vectors, and what the form is good for, is `mlx_gemma4/cache/one_vector.py`.

    value = u                      key = RoPE(weight * u)

Only the rotated pairs of a key depend on the position; for the rest the weight is folded into the query:

    q . key = (q * w)[still] . u[still]  +  q[rotated] . RoPE(w * u)[rotated]

The first product reads u as it lies, the second rebuilds a quarter of each key (64 of 256 pairs of a 512-wide head), a
tile at a time. That is the form for decoding; a prefill tile has so many queries that it rebuilds whole keys, once per
tile, and takes one product.
"""

from dataclasses import dataclass

import mlx.core as mx

from mlx_gemma4.models.rope import Rope, rotate_pairs

from .reference.flash_attention import Reader, plain_reader, wait_for

# From this many query rows per KV head on, rebuilding whole keys costs less than the second product.
WHOLE_KEYS_FROM = 64


@dataclass(frozen=True)
class KeyForm:
    """How a layer's keys follow from its stored vectors. `weight` is k_norm's, [D]."""

    weight: mx.array
    rope: Rope

    def keys(self, u: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        """Whole keys [B, H_kv, T, D] of vectors u [B, H_kv, T, D] and their tables; what a plain cache would store."""
        # Weight and rotation in float32, one rounding, as `rotated` does.
        return self.rope.rotate(u.astype(mx.float32) * self.weight.astype(mx.float32), cos, sin).astype(u.dtype)

    def rotated(self, u: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        """The rotated dimensions of the keys only, [B, H_kv, T, 2P]: first halves of the pairs, then second halves."""
        half, pairs = self.rope.width // 2, self.rope.pairs
        w = self.weight.astype(mx.float32)
        a = u[..., :pairs].astype(mx.float32) * w[:pairs]
        b = u[..., half : half + pairs].astype(mx.float32) * w[half : half + pairs]
        return mx.concatenate([*rotate_pairs(a, b, cos, sin)], axis=-1).astype(u.dtype)

    def split_query(self, q: mx.array) -> tuple[mx.array, mx.array]:
        """q [B, H, L, D] -> (q * w with the rotated dimensions zero [.., D], the rotated dimensions [.., 2P])."""
        half, pairs = self.rope.width // 2, self.rope.pairs
        index = mx.arange(self.rope.width) % half
        still = mx.where(index >= pairs, self.weight.astype(mx.float32), 0.0)
        rotated = mx.concatenate([q[..., :pairs], q[..., half : half + pairs]], axis=-1)
        return (q * still).astype(q.dtype), rotated


def reader_of(
    q: mx.array, keys: mx.array, values: mx.array | None, form: KeyForm | None, first_visible: mx.array | None
) -> Reader:
    """For queries q [B, H, L, D]: keys and values as they are, or a one-vector cache (no values, but a `form`)."""
    if form is not None:
        return one_vector_reader(keys, form, q.shape[1] // keys.shape[1] * q.shape[2], first_visible)
    assert values is not None, "keys without values need the form of the keys"
    return plain_reader(keys, values)


def one_vector_reader(vectors: mx.array, form: KeyForm, rows: int, first_visible: mx.array | None) -> Reader:
    """Reads u [B, H_kv, T, D], position 0 first, for `rows` query rows per KV head.

    Row b of the batch turns its keys by their distance from first_visible[b], where its sequence begins.
    """
    T, kv_heads = vectors.shape[2], vectors.shape[1]
    cos, sin = form.rope.table(T)

    def tables(start: int, stop: int) -> tuple[mx.array, mx.array]:
        if first_visible is None:
            return cos[start:stop], sin[start:stop]
        at = mx.maximum(mx.arange(start, stop) - first_visible[:, None], 0)  # [B, stop - start]
        return cos[at][:, None], sin[at][:, None]

    def read_parts(start: int, stop: int, after: mx.array | None) -> tuple[tuple[mx.array, mx.array], mx.array]:
        u = wait_for(vectors[:, :, start:stop], after)
        return (u, form.rotated(u, *tables(start, stop))), u

    def read_whole(start: int, stop: int, after: mx.array | None) -> tuple[tuple[mx.array], mx.array]:
        u = wait_for(vectors[:, :, start:stop], after)
        return (form.keys(u, *tables(start, stop)),), u

    if rows < WHOLE_KEYS_FROM:
        return Reader(form.split_query, read_parts, T, kv_heads, rebuilt=2 * form.rope.pairs)
    return Reader(lambda q: (q,), read_whole, T, kv_heads, rebuilt=form.rope.width)
