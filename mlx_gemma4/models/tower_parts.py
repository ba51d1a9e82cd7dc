"""What the vision and the audio tower share: linear maps with clipped ranges, and the projector into the text stream.

Source: transformers 5.23 `modeling_gemma4.py: Gemma4ClippableLinear, Gemma4MultimodalEmbedder`.
"""

import mlx.core as mx
import mlx.nn as nn

from .fused import fused


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
            return self.linear(x)
        x = self.linear(_clamp(x, self.input_min, self.input_max))
        return _clamp(x, self.output_min, self.output_max)


class Projector(nn.Module):
    """A tower's features as embeddings of the text decoder (`embed_vision`, `embed_audio`)."""

    def __init__(self, width: int, hidden_size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.embedding_projection = nn.Linear(width, hidden_size, bias=False)

    def __call__(self, features: mx.array) -> mx.array:
        """[..., width] -> [..., hidden_size]; not to be scaled like word embeddings."""
        return self.embedding_projection(mx.fast.rms_norm(features, None, self.eps))
