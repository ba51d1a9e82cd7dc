"""Attention the slow way: float64, all scores at once. What tiles, rings and rebuilt keys are compared with."""

import numpy as np


def attention(q, keys, values, *, q_start, k_start=0, window=None, first_visible=None, scale=1.0) -> np.ndarray:
    """q [B, H, L, D] at positions q_start + i over keys, values [B, H_kv, T, D] at k_start + j -> float64 [B, H, L, D].

    A query at p sees t when t <= p, t > p - window and t >= first_visible[b]; NaN where it sees nothing.
    """
    B, H, L, _ = q.shape
    G, T = H // keys.shape[1], keys.shape[2]
    keys, values = (np.repeat(x.astype(np.float64), G, axis=1) for x in (keys, values))
    p, t = q_start + np.arange(L)[:, None], k_start + np.arange(T)[None]
    seen = np.broadcast_to(t <= p, (B, 1, L, T)).copy()
    if window is not None:
        seen &= t > p - window
    if first_visible is not None:
        seen &= (t[0] >= np.array(first_visible)[:, None])[:, None, None]
    scores = np.where(seen, (q.astype(np.float64) * scale) @ keys.swapaxes(-1, -2), -np.inf)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return (weights / weights.sum(-1, keepdims=True)) @ values


def angles(positions: np.ndarray, width: int, theta: float, fraction: float = 1.0) -> np.ndarray:
    """Radians [T, width / 2] by which the pairs of a head turn; the last (1 - fraction) of them stand still."""
    frequencies = theta ** (-np.arange(width // 2) * 2.0 / width)
    frequencies[int(fraction * width / 2) :] = 0
    return positions[:, None] * frequencies


def rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """x [..., T, D] turned, float64: pair i is (x[i], x[i + D/2]), its cos and sin [T, D/2]."""
    a, b = np.split(x.astype(np.float64), 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
