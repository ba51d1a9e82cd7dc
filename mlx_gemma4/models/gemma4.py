"""The outer model: what `load` returns and what mlx-lm's and our own generation loops call.

Owns the names of the MLX shard layout (`language_model.model.*`) and the public calls. The decoder is in `text.py`;
vision and audio towers are not part of the graph yet, and their tensors are left out by `sanitize`.
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from ..cache import LayerCache
from ..config import Gemma4Config, TextConfig
from ..conversions.names import sanitize
from ..errors import UsageError
from .text import DecoderLayer, LanguageModel

KV_BITS = (16,)  # what `make_cache` accepts; compressed caches join here


class Model(nn.Module):
    """Gemma 4, one checkpoint of the family.

    >>> logits = model(tokens)                    # [B, L] -> [B, L, V], without a cache
    >>> cache = model.make_cache()
    >>> logits = model(tokens, cache=cache)       # the cache now holds L positions
    """

    def __init__(self, config: Gemma4Config):
        super().__init__()
        self.config = config
        self.model_type = config.model_type
        self.language_model = LanguageModel(config.text)

    def __call__(
        self,
        tokens: mx.array,
        cache: Sequence[LayerCache] | None = None,
        left_padding: Sequence[int] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """tokens int [B, L] -> logits float32 [B, L, V].

        Rows of unequal length are padded on the left: `left_padding` says by how much, row by row, in a call without
        cache; with one, it was said to `make_cache`. Logits at padded positions mean nothing.
        """
        padding = tuple(left_padding) if left_padding is not None and any(left_padding) else None
        return self.language_model(tokens, cache, padding, input_embeddings)

    def make_cache(self, kv_bits: float = 16, left_padding: Sequence[int] | None = None) -> list[LayerCache]:
        """An empty cache per layer that keeps keys and values of its own (sharing layers have none).

        Raises UsageError when `kv_bits` is not available.
        """
        if kv_bits not in KV_BITS:
            raise UsageError(
                f"kv_bits {kv_bits} is not available in this version; allowed: {', '.join(map(str, KV_BITS))}"
            )
        return self.language_model.make_cache(left_padding)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        return sanitize(weights, self.config)

    def private_arrays(self) -> list[mx.array]:
        """Arrays `parameters()` does not list, to be evaluated with them so that any thread may run the model."""
        return [t for rope in self.language_model.model._ropes.values() for t in rope._table or ()]

    @property
    def layers(self) -> list[DecoderLayer]:
        return self.language_model.model.layers

    @property
    def text_config(self) -> TextConfig:
        return self.config.text
