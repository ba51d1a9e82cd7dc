"""What the sliding kernels are compared with: who sees whom, float64 attention under any mask, and MLX's own error."""

import mlx.core as mx
import numpy as np

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def seen(queries, keys, window, first_visible=None, query_blocks=None, key_blocks=None) -> np.ndarray:
    """bool [B, L, T] for positions queries [L] and keys [T], in transformers' words: padding AND window AND (causal OR
    same block). Blocks [B, L] and [B, T], negative for text.
    """
    p, t = np.asarray(queries)[None, :, None], np.asarray(keys)[None, None]
    ahead = t <= p
    if query_blocks is not None:
        mine, theirs = np.asarray(query_blocks)[:, :, None], np.asarray(key_blocks)[:, None]
        ahead = ahead | ((mine == theirs) & (mine >= 0))
    real = True if first_visible is None else t >= np.asarray(first_visible)[:, None, None]
    return ahead & (t > p - window) & real


def attention(q, keys, values, mask, scale=1.0) -> np.ndarray:
    """float64 [B, H, L, D]; NaN for a query that sees nothing. mask [B, L, T]."""
    G = q.shape[1] // keys.shape[1]
    keys, values = (np.repeat(x.astype(np.float64), G, axis=1) for x in (keys, values))
    scores = np.where(mask[:, None], (q.astype(np.float64) * scale) @ keys.swapaxes(-1, -2), -np.inf)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return (weights / weights.sum(-1, keepdims=True)) @ values


def draw(seed: int, dtype: mx.Dtype, *shapes: tuple[int, ...]) -> list[mx.array]:
    rng = np.random.default_rng(seed)
    return [mx.array(rng.standard_normal(shape, np.float32)).astype(dtype) for shape in shapes]


def check(found: mx.array, arrays: list[mx.array], mask: np.ndarray, scale: float) -> None:
    """At most twice the error of MLX's own attention in the same dtype, both against float64; finite everywhere.

    arrays: q and the keys and values that the columns of `mask` stand for. The inputs are rounded already, so that only
    the arithmetic is compared.
    """
    truth = attention(*(np.array(x.astype(mx.float32)) for x in arrays), mask, scale)
    plain = mx.fast.scaled_dot_product_attention(*arrays, scale=scale, mask=mx.array(mask[:, None]))
    assert found.shape == arrays[0].shape and found.dtype == arrays[0].dtype
    ours, theirs = (np.array(x.astype(mx.float32)) for x in (found, plain))
    assert np.isfinite(ours).all()
    some = np.broadcast_to(mask.any(-1)[:, None], truth.shape[:3])
    assert some.any()
    assert np.abs(ours - truth)[some].max() <= 2 * np.abs(theirs - truth)[some].max() + 1e-6
