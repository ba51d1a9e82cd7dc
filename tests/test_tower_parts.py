"""What towers do otherwise on a CPU and on a GPU: attention, products and activations against their plain forms.

Both ways of attention run here: MLX computes the padded kernel call on any device.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_gemma4.models import tower_parts, vision
from mlx_gemma4.models.fused import geglu


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def exact(q: mx.array, k: mx.array, v: mx.array) -> np.ndarray:
    q64, k64, v64 = (np.array(t.astype(mx.float32)).astype(np.float64) for t in (q, k, v))
    scores = q64 @ k64.swapaxes(-1, -2)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v64


@pytest.mark.parametrize("cpu", [True, False])
@pytest.mark.parametrize("width", [16, 64, 72, 80, 128, 132])
@pytest.mark.parametrize("scores", [1, 500, vision.MAX_SCORES])
def test_attention(cpu, width, scores, monkeypatch):
    monkeypatch.setattr(vision, "on_cpu", lambda: cpu)
    monkeypatch.setattr(vision, "MAX_SCORES", scores)
    q, k, v = (normal(2, 3, 27, width, seed=i) for i in range(3))
    found = vision._attend(q, k, v)
    assert found.shape == q.shape and np.abs(np.array(found) - exact(q, k, v)).max() < 2e-5


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_attention_of_scores_far_apart(dtype):
    """One key takes all: its value comes back, and no type overflows."""
    q = 12 * normal(1, 1, 40, 64).astype(dtype)
    v = normal(1, 1, 40, 64, seed=1).astype(dtype)
    found = vision._attend(q, q, v)
    assert found.dtype == dtype and mx.allclose(found, v, atol=1e-6).item()


@pytest.mark.parametrize("rows", [1, tower_parts.MANY_ROWS - 1, tower_parts.MANY_ROWS, 700])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("lead", [(), (2,)])
def test_linear(rows, dtype, lead):
    layer, x = nn.Linear(48, 96, bias=False), normal(*lead, rows, 48).astype(dtype)
    layer.set_dtype(dtype)
    found, expected = tower_parts.linear(layer, x), layer(x)
    assert found.dtype == dtype and found.shape == expected.shape
    assert mx.allclose(found, expected, atol=1e-5).item()


def test_linear_leaves_packed_weights_to_their_layer():
    layer = nn.QuantizedLinear.from_linear(nn.Linear(64, 96, bias=False))
    x = normal(400, 64)
    assert mx.array_equal(tower_parts.linear(layer, x), layer(x)).item()


def test_activations_by_powers_of_two(monkeypatch):
    """As near to float64 as by tanh and sigmoid, and finite where the power is infinite."""
    gate = mx.concatenate([mx.linspace(-12, 12, 4001), mx.array([-1e4, -300.0, 300.0, 1e4])])
    x = normal(gate.size)
    g64, x64 = (np.array(t).astype(np.float64) for t in (gate, x))
    gelu = 0.5 * g64 * (1 + np.tanh(np.sqrt(2 / np.pi) * (g64 + 0.044715 * g64**3)))
    ours, plain = (np.abs(np.array(f(gate, x)) - gelu * x64).max() for f in (tower_parts.geglu_by_power, geglu))
    assert ours <= 2 * plain + 1e-7
    with np.errstate(over="ignore"):
        expected = x64 / (1 + np.exp(-g64))
    for cpu in (True, False):
        monkeypatch.setattr(tower_parts, "on_cpu", lambda cpu=cpu: cpu)
        assert np.abs(np.array(tower_parts.swish(x, gate)) - expected).max() < 1e-6
