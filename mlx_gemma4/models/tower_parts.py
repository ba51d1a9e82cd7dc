"""What the vision and the audio tower share: linear maps with clipped ranges, and the projector into the text stream.

Owns also how a tower multiplies by a weight on a CPU. Leaves everything else of the towers to `vision.py`, `audio.py`.
Source: transformers 5.23 `modeling_gemma4.py: Gemma4ClippableLinear, Gemma4MultimodalEmbedder`.
"""

import math

import mlx.core as mx
import mlx.nn as nn

from .fused import ROOT_2_OVER_PI, fused

LOG2_E = math.log2(math.e)

# Rows from which turning a weight round costs little beside the product.
MANY_ROWS = 256


def on_cpu() -> bool:
    """Whether MLX computes on the processor: no kernels of its own there, and products by a BLAS library."""
    return mx.default_device() == mx.cpu


def linear(layer: nn.Module, x: mx.array) -> mx.array:
    """layer(x), x [..., inputs], of a linear without bias, plain or packed.

    On a CPU float32 rows are multiplied by a transposed copy of the weight: the reference BLAS inside MLX's wheel for
    Linux is 1.45 times as fast at x @ W as at x @ W.T, and the copy is a part in 2 * rows of the work. Other BLAS
    libraries do not mind, GPUs have kernels for either.
    """
    if type(layer) is not nn.Linear or x.dtype != mx.float32 or x.size < MANY_ROWS * x.shape[-1] or not on_cpu():
        return layer(x)
    return x @ mx.contiguous(layer.weight.T)


@fused
def geglu_by_power(gate: mx.array, x: mx.array) -> mx.array:
    """`fused.geglu` by a power of two instead of a tanh, which takes a CPU 2.6 times as long."""
    g = gate.astype(mx.float32)
    gelu = g / (1.0 + mx.power(2.0, (-2 * LOG2_E * ROOT_2_OVER_PI) * (g + 0.044715 * (g * g * g))))
    return (gelu * x).astype(x.dtype)


@fused
def _swish_by_power(x: mx.array, gate: mx.array) -> mx.array:
    return (x / (1.0 + mx.power(2.0, gate.astype(mx.float32) * -LOG2_E))).astype(x.dtype)


@fused
def _swish(x: mx.array, gate: mx.array) -> mx.array:
    return x * mx.sigmoid(gate)


def swish(x: mx.array, gate: mx.array) -> mx.array:
    """x * sigmoid(gate), elementwise; SiLU where both are the same."""
    return _swish_by_power(x, gate) if on_cpu() else _swish(x, gate)


@fused
def _clamp(x: mx.array, low: mx.array, high: mx.array) -> mx.array:
    return mx.minimum(mx.maximum(x, low), high)


class ClippedLinear(nn.Module):
    """A linear without bias that clamps input and output where the checkpoint has bounds for it.

    Source: `Gemma4ClippableLinear`.
    """

    def __init__(self, inputs: int, outputs: int, clipped: bool):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.clipped = clipped
        if clipped:
            self.input_min, self.input_max = mx.array(-mx.inf), mx.array(mx.inf)
            self.output_min, self.output_max = mx.array(-mx.inf), mx.array(mx.inf)

    def __call__(self, x: mx.array) -> mx.array:
        if not self.clipped:
            return linear(self.linear, x)
        x = linear(self.linear, _clamp(x, self.input_min, self.input_max))
        return _clamp(x, self.output_min, self.output_max)


class Projector(nn.Module):
    """A tower's features as embeddings of the text decoder (`embed_vision`, `embed_audio`)."""

    def __init__(self, width: int, hidden_size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.embedding_projection = nn.Linear(width, hidden_size, bias=False)

    def __call__(self, features: mx.array) -> mx.array:
        """[..., width] -> [..., hidden_size]; not to be scaled like word embeddings."""
        return linear(self.embedding_projection, mx.fast.rms_norm(features, None, self.eps))
