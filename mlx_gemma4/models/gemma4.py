"""The outer model: what `load` returns and what mlx-lm's and our own generation loops call.

Owns the names of the MLX shard layout (`language_model.model.*`) and the public calls. The decoder is in `text.py`,
the towers in `vision.py` and `audio.py`; `sanitize` leaves out the tensors of towers the graph was not asked to have.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..cache import LayerCache
from ..config import Gemma4Config, TextConfig
from ..config_audio import AudioConfig
from ..config_vision import VisionConfig
from ..conversions.names import TOWERS, sanitize
from ..kv_bits import PLAIN, request
from ..ple_disk import DiskTable
from .audio import AudioTower, channels_last
from .merging import Soft
from .text import DecoderLayer, LanguageModel
from .tower_parts import Projector
from .vision import VisionTower


class Model(nn.Module):
    """Gemma 4, one checkpoint of the family.

    >>> logits = model(tokens)                    # [B, L] -> [B, L, V], without a cache
    >>> cache = model.make_cache()
    >>> logits = model(tokens, cache=cache)       # the cache now holds L positions
    """

    def __init__(self, config: Gemma4Config, towers: bool = False):
        super().__init__()
        self.config = config
        self.model_type = config.model_type
        self.language_model = LanguageModel(config.text)
        if towers and config.vision is not None:
            vision = VisionConfig.from_dict(config.vision)
            self.vision_tower = VisionTower(vision)
            self.embed_vision = Projector(vision.hidden_size, config.text.hidden_size, vision.rms_norm_eps)
        if towers and config.audio is not None:
            audio = AudioConfig.from_dict(config.audio)
            self.audio_tower = AudioTower(audio)
            self.embed_audio = Projector(audio.output_proj_dims, config.text.hidden_size, audio.rms_norm_eps)
        self.kv_bits: float = PLAIN  # of caches for which no other number is asked

    def __call__(
        self,
        tokens: mx.array,
        cache: Sequence[LayerCache] | None = None,
        left_padding: Sequence[int] | None = None,
        input_embeddings: mx.array | None = None,
        media: Soft | None = None,
    ) -> mx.array:
        """tokens int [B, L] -> logits float32 [B, L, V].

        Rows of unequal length are padded on the left: `left_padding` says by how much, row by row, in a call without
        cache; with one, it was said to `make_cache`. Logits at padded positions mean nothing. media: what of these
        positions are pictures or sound, see `merging.py`; the tokens there count for nothing.
        """
        padding = tuple(left_padding) if left_padding is not None and any(left_padding) else None
        return self.language_model(tokens, cache, padding, input_embeddings, media)

    def make_cache(
        self,
        kv_bits: float | None = None,
        left_padding: Sequence[int] | None = None,
        *,
        kv_key_bits: float | None = None,
        kv_value_bits: float | None = None,
        kv_bits_sliding: float | None = None,
        kv_mode: str | None = None,
    ) -> list[LayerCache]:
        """An empty cache per layer that keeps keys and values of its own (sharing layers have none).

        kv_bits: bits per number in global layers, one of `kv_bits.BITS`; 16 keeps them as they are computed, None is
        what `load` was given. kv_key_bits, kv_value_bits: for keys and values apart. kv_bits_sliding: the same for the
        rings of sliding layers, exact by default. kv_mode: how codes are found, see `kernels/turboquant.py`.

        Raises UsageError for a value that is not allowed, and for a request that reaches no layer of this model.
        """
        both = self.kv_bits if kv_bits is None else kv_bits
        bits = request(both, kv_key_bits, kv_value_bits, kv_bits_sliding, kv_mode)
        return self.language_model.make_cache(left_padding, bits)

    @property
    def cache_identity(self) -> str:
        """What `cache.save` and `cache.load` call this model: a hash of the graph's shapes, not of its weights."""
        text = dataclasses.replace(self.config.text, max_position_embeddings=0)  # the graph does not depend on it
        return f"{self.model_type} {hashlib.sha256(repr(text).encode()).hexdigest()[:16]}"

    @property
    def weights_identity(self) -> str:
        """`cache_identity` and a hash of some numbers of every tensor: what a saved conversation must agree with.

        Sixteen numbers of each, so the files are not read again; a tensor changed elsewhere only is not noticed.
        """
        flat: list[tuple[str, mx.array]] = tree_flatten(self.parameters())  # type: ignore[assignment]
        digest = hashlib.sha256(repr([(name, a.shape, str(a.dtype)) for name, a in flat]).encode())
        rows = [a.reshape(-1) for _, a in flat]
        some = mx.concatenate([r[begin : begin + 8].astype(mx.float32) for r in rows for begin in (0, r.size // 2)])
        digest.update(np.array(some).tobytes())
        return f"{self.cache_identity} weights {digest.hexdigest()[:16]}"

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        return channels_last(sanitize(weights, self.config, self.towers))

    @property
    def towers(self) -> tuple[str, ...]:
        """The prefixes of `names.TOWERS` that this graph has."""
        return tuple(prefix for prefix in TOWERS if prefix.removesuffix(".") in self)

    def private_arrays(self) -> list[mx.array]:
        """Arrays `parameters()` does not list, to be evaluated with them so that any thread may run the model."""
        return [t for rope in self.language_model.model._ropes.values() for t in rope._table or ()]

    @property
    def disk_table(self) -> DiskTable | None:
        """The per-layer embedding table where it was left in its file (`load(..., ple="disk")`)."""
        table = getattr(self.language_model.model, "embed_tokens_per_layer", None)
        return table if isinstance(table, DiskTable) else None

    @property
    def layers(self) -> list[DecoderLayer]:
        return self.language_model.model.layers

    @property
    def text_config(self) -> TextConfig:
        return self.config.text
