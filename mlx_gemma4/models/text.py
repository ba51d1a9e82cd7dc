"""Gemma 4's text decoder, top to bottom, for all four sizes.

Axes: B batch, L positions of this call, H query heads, D head width, E hidden size, P per-layer-embedding width,
V vocabulary. Attribute names are the checkpoint's tensor names. What a layer remembers, and how it is attended to, is
the cache's business (`mlx_gemma4.cache`); the towers and the outer model are in `gemma4.py`.

Source of truth: transformers 5.23 `modeling_gemma4.py`. Attention scale is 1.0 throughout: q_norm and k_norm carry it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from ..cache import (
    ChunkView,
    CompressedCache,
    CompressedOneVectorCache,
    CompressedSlidingCache,
    GlobalCache,
    KeyForm,
    LayerCache,
    OneVectorCache,
    SlidingCache,
    View,
    WindowView,
)
from ..cache.compressed_one_vector import rotated_width
from ..config import GLOBAL, SLIDING, TextConfig
from ..kernels.sliding_attention import block_reach
from ..kernels.turboquant import codec
from ..kv_bits import EXACT, KvBits, check_reach
from ..ple_disk import DiskTable
from .fused import geglu, soft_cap
from .merging import Soft
from .moe import Experts, Router
from .rope import Rope

Table = tuple[mx.array, mx.array]  # cos and sin


@dataclass(frozen=True)
class Step:
    """What all layers of one forward call share: where it stands, and its rotary tables by attention kind."""

    start: int  # position of the first token, padding included
    left_padding: tuple[int, ...] | None
    tables: dict[str, Table]  # cos, sin: [L, pairs], or [B, 1, L, pairs] with padding
    reach: mx.array | None = None  # how far sliding layers' queries see ahead: `sliding_attention.block_reach`


class Attention(nn.Module):
    """Grouped-query attention, sliding or global, with its own keys and values or a producer's."""

    def __init__(self, config: TextConfig, layer: int, rope: Rope):
        super().__init__()
        E, D = config.hidden_size, config.width_of(layer)
        self.kind = config.layer_types[layer]
        self.heads, self.kv_heads, self.width = config.num_attention_heads, config.kv_heads_of(layer), D
        self.window = config.sliding_window if config.is_sliding(layer) else None
        self.eps = config.rms_norm_eps
        self.k_is_v = config.k_is_v(layer)
        self.shares = layer >= config.first_shared_layer
        self._rope = rope

        self.q_proj = nn.Linear(E, self.heads * D, bias=False)
        self.q_norm = nn.RMSNorm(D, eps=self.eps)
        if not self.shares:
            self.k_proj = nn.Linear(E, self.kv_heads * D, bias=False)
            self.k_norm = nn.RMSNorm(D, eps=self.eps)
            if not self.k_is_v:
                self.v_proj = nn.Linear(E, self.kv_heads * D, bias=False)
        self.o_proj = nn.Linear(self.heads * D, E, bias=False)

    def __call__(self, x: mx.array, step: Step, cache: LayerCache | None, view: View | None) -> tuple[mx.array, View]:
        """x [B, L, E] -> (the same shape, the view that sharing layers attend to)."""
        B, L, _ = x.shape
        q = self.q_norm(self.q_proj(x).reshape(B, L, self.heads, self.width)).swapaxes(1, 2)
        q = self._rope.rotate(q, *step.tables[self.kind])
        if view is None:
            view = self._remember(x, step, cache)
        if step.reach is None or self.window is None:
            out = view.attend(q)  # [B, H, L, D]
        else:
            out = cast(WindowView, view).attend(q, reach=step.reach)
        return self.o_proj(out.swapaxes(1, 2).reshape(B, L, -1)), view

    def _remember(self, x: mx.array, step: Step, cache: LayerCache | None) -> View:
        """This step's keys and values into the cache (or nowhere, without one); what its queries may see."""
        B, L, _ = x.shape
        table = step.tables[self.kind]
        raw = self.k_proj(x).reshape(B, L, self.kv_heads, self.width)
        if self.k_is_v:
            vectors = mx.fast.rms_norm(raw, None, self.eps).swapaxes(1, 2)
            form = KeyForm(self.k_norm.weight, self._rope)
            if isinstance(cache, OneVectorCache | CompressedOneVectorCache):
                return cache.append(vectors, form)
            keys, values = form.keys(vectors, *table), vectors
        else:
            keys = self._rope.rotate(self.k_norm(raw).swapaxes(1, 2), *table)
            values = self.v_proj(x).reshape(B, L, self.kv_heads, self.width)
            values = mx.fast.rms_norm(values, None, self.eps).swapaxes(1, 2)
        if isinstance(cache, SlidingCache | GlobalCache | CompressedCache | CompressedSlidingCache):
            return cache.append(keys, values)
        padding = None if step.left_padding is None else mx.array(step.left_padding)
        return ChunkView(keys, values, 0, 0, self.window, padding)


class MLP(nn.Module):
    """The dense feed-forward block: GeGLU."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))


class DecoderLayer(nn.Module):
    """Attention, feed-forward (dense, with experts beside it in 26B-A4B), per-layer input, layer scalar."""

    def __init__(self, config: TextConfig, layer: int, rope: Rope):
        super().__init__()

        def norm() -> nn.RMSNorm:
            return nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

        self.self_attn = Attention(config, layer, rope)
        self.mlp = MLP(config.hidden_size, config.mlp_width_of(layer))
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm()
        self.post_feedforward_layernorm = norm()
        self.has_experts = config.num_experts > 0
        if self.has_experts:
            self.router = Router(config)
            self.experts = Experts(config)
            self.post_feedforward_layernorm_1 = norm()
            self.post_feedforward_layernorm_2 = norm()
            self.pre_feedforward_layernorm_2 = norm()
        if config.hidden_size_per_layer_input:
            self.per_layer_input_gate = nn.Linear(config.hidden_size, config.hidden_size_per_layer_input, bias=False)
            self.per_layer_projection = nn.Linear(config.hidden_size_per_layer_input, config.hidden_size, bias=False)
            self.post_per_layer_input_norm = norm()
        self.layer_scalar = mx.ones((1,))

    def __call__(
        self, x: mx.array, step: Step, cache: LayerCache | None, view: View | None, per_layer: mx.array | None
    ) -> tuple[mx.array, View]:
        """x [B, L, E], per_layer [B, L, P] -> (the same shape as x, the view of this layer's keys and values)."""
        attended, view = self.self_attn(self.input_layernorm(x), step, cache, view)
        x = x + self.post_attention_layernorm(attended)
        x = x + self.post_feedforward_layernorm(self._feed_forward(x))
        if per_layer is not None:
            gated = geglu(self.per_layer_input_gate(x), per_layer)
            x = x + self.post_per_layer_input_norm(self.per_layer_projection(gated))
        return x * self.layer_scalar, view

    def _feed_forward(self, x: mx.array) -> mx.array:
        dense = self.mlp(self.pre_feedforward_layernorm(x))
        if not self.has_experts:
            return dense
        # The router sees the residual stream itself; its norm is its own.
        chosen, weights = self.router(x)
        sparse = self.experts(self.pre_feedforward_layernorm_2(x), chosen, weights)
        return self.post_feedforward_layernorm_1(dense) + self.post_feedforward_layernorm_2(sparse)


class TextModel(nn.Module):
    """Embeddings, layers and the final norm: tokens -> hidden states."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self._ropes = {
            SLIDING: Rope(config.rope_sliding, config.head_dim),
            GLOBAL: Rope(config.rope_global, config.global_head_dim),
        }
        self._producers = [config.producer_of(i) for i in range(config.num_hidden_layers)]
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [
            DecoderLayer(config, i, self._ropes[config.layer_types[i]]) for i in range(config.num_hidden_layers)
        ]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.hidden_size_per_layer_input:
            all_layers = config.num_hidden_layers * config.hidden_size_per_layer_input
            self.embed_tokens_per_layer: nn.Embedding | DiskTable = nn.Embedding(
                config.vocab_size_per_layer_input, all_layers
            )
            self.per_layer_model_projection = nn.Linear(config.hidden_size, all_layers, bias=False)
            self.per_layer_projection_norm = nn.RMSNorm(config.hidden_size_per_layer_input, eps=config.rms_norm_eps)

    def __call__(
        self,
        tokens: mx.array,
        cache: Sequence[LayerCache] | None = None,
        left_padding: tuple[int, ...] | None = None,
        input_embeddings: mx.array | None = None,
        media: Soft | None = None,
    ) -> mx.array:
        """tokens int [B, L] -> hidden states after the final norm, [B, L, E].

        `input_embeddings` [B, L, E], unscaled, replace the tokens' own in the residual stream; per-layer embeddings
        still come from `tokens`. `media`: what of the positions are no tokens.
        """
        if media is not None:
            tokens = media.replace_ids(tokens, self.config.pad_token_id)
        x = self.embed_tokens(tokens) if input_embeddings is None else input_embeddings
        x = x * self.config.hidden_size**0.5
        if media is not None:
            x = media.replace_embeddings(x)
        per_layer = self._per_layer_inputs(tokens, x) if self.config.hidden_size_per_layer_input else None
        # mxfp4, nvfp4 and mxfp8 embeddings come out as bfloat16 whatever the rest computes in. Scale and per-layer
        # inputs are taken in it, as the packages do that write such checkpoints.
        x = x.astype(self.norm.weight.dtype)
        step = self._step(tokens.shape[1], cache, left_padding, media)

        views: list[View] = []
        for i, layer in enumerate(self.layers):
            producer = self._producers[i]
            own = producer == i
            x, view = layer(
                x,
                step,
                cache[i] if cache is not None and own else None,
                None if own else views[producer],
                None if per_layer is None else per_layer[:, :, i],
            )
            views.append(view)
        return self.norm(x)

    def _step(
        self, L: int, cache: Sequence[LayerCache] | None, left_padding: tuple[int, ...] | None, media: Soft | None
    ) -> Step:
        start = cache[0].offset if cache is not None else 0
        if cache is not None:
            left_padding = cache[0].left_padding
        positions = mx.arange(start, start + L)
        if left_padding is not None:
            # Padded positions get 0: they are never seen.
            positions = mx.maximum(positions - mx.array(left_padding)[:, None], 0)[:, None]  # [B, 1, L]
        tables = {kind: rope.angles(positions) for kind, rope in self._ropes.items()}
        # A single position of a picture sees what any other does.
        blocks = media.blocks if media is not None and L > 1 else None
        return Step(start, left_padding, tables, None if blocks is None else block_reach(blocks, start))

    def _per_layer_inputs(self, tokens: mx.array, x: mx.array) -> mx.array:
        """One P-wide vector per layer and position from the token's own table and from its embedding: [B, L, N, P]."""
        config = self.config
        N, P = config.num_hidden_layers, config.hidden_size_per_layer_input
        own = self.embed_tokens_per_layer(tokens).reshape(*tokens.shape, N, P) * P**0.5
        projected = self.per_layer_model_projection(x) * config.hidden_size**-0.5
        projected = self.per_layer_projection_norm(projected.reshape(*tokens.shape, N, P))
        return (projected + own) * 2.0**-0.5


class LanguageModel(nn.Module):
    """`TextModel` with its output head: tokens -> logits."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.model = TextModel(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(
        self,
        tokens: mx.array,
        cache: Sequence[LayerCache] | None = None,
        left_padding: tuple[int, ...] | None = None,
        input_embeddings: mx.array | None = None,
        media: Soft | None = None,
    ) -> mx.array:
        """tokens int [B, L] -> logits float32 [B, L, V]."""
        x = self.model(tokens, cache, left_padding, input_embeddings, media)
        logits = self.model.embed_tokens.as_linear(x) if self.config.tie_word_embeddings else self.lm_head(x)
        cap = self.config.final_logit_softcapping
        return logits.astype(mx.float32) if cap is None else soft_cap(cap, logits)

    def make_cache(self, left_padding: Sequence[int] | None = None, bits: KvBits = EXACT) -> list[LayerCache]:
        """An empty cache per layer that has keys and values of its own, in layer order.

        Raises UsageError when `bits` asks for a compression that no layer has.
        """
        check_reach(bits, self.config)
        return [self._layer_cache(i, left_padding, bits) for i in range(self.config.first_shared_layer)]

    def _layer_cache(self, layer: int, left_padding: Sequence[int] | None, bits: KvBits) -> LayerCache:
        config = self.config
        width = config.width_of(layer)
        if config.is_sliding(layer):
            if not bits.compresses_sliding:
                return SlidingCache(config.sliding_window, left_padding)
            both = codec(width, bits.sliding, bits.mode)
            return CompressedSlidingCache(config.sliding_window, both, both, left_padding)
        if not config.k_is_v(layer):
            if not bits.compresses_global:
                return GlobalCache(left_padding)
            keys, values = (codec(width, b, bits.mode) for b in (bits.keys, bits.values))
            return CompressedCache(keys, values, left_padding)
        if not bits.compresses_global:
            return OneVectorCache(left_padding)
        rotated = rotated_width(self.model._ropes[GLOBAL].pairs)
        vectors, turned = (codec(w, bits.keys, bits.mode) for w in (width, rotated))
        return CompressedOneVectorCache(vectors, turned, left_padding)
