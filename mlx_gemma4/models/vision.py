"""The vision tower: patches of pictures to features, and features to the text decoder's embeddings.

Owns `VisionTower` and `encode_images`, which runs it and the projector over pictures of any sizes within bounded
memory. Leaves the projector to `tower_parts.py`, pixels to `media/images.py`, the configuration to `config_vision.py`
and the place of a picture's tokens in a prompt to the caller.

Axes: N patches of all pictures of a pass, one after the other; H heads, D head width, E width of the tower. Pictures
are never padded: linears and norms see one long row of patches, attention sees each picture alone. Attribute names are
the checkpoint's tensor names.

Source of truth: transformers 5.23 `modeling_gemma4.py: Gemma4VisionModel, Gemma4MultimodalEmbedder`. Attention scale
is 1.0: q_norm and k_norm carry it.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..config import RopeConfig
from ..config_vision import VisionConfig
from ..errors import UsageError
from .fused import fused, geglu
from .rope import Rope, rotate_pairs
from .tower_parts import LOG2_E, ClippedLinear, geglu_by_power, linear, on_cpu

if TYPE_CHECKING:
    from ..media.images import ProcessedImage
    from .gemma4 import Model

Table = tuple[mx.array, mx.array]  # cos and sin, float32 [N, 1, 2, D/4]: angles of x, then of y

# Patches of one pass of `encode_images`: one picture of the largest budget (1,120 tokens) or sixteen of the smallest.
# Memory is bounded by this, not by how many pictures there are.
MAX_PATCHES = 10_080
# Head widths for which GPUs have a kernel that keeps scores out of memory. 26B and 31B have 72, which becomes 80.
FUSED_WIDTHS = (64, 80, 128)
# Attention scores computed in one go elsewhere: 4 MB in float32, which stay in a processor's cache.
MAX_SCORES = 1 << 20


class PatchEmbedder(nn.Module):
    """Pixels to the residual stream, plus a learned vector for the column and one for the row."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.input_proj = nn.Linear(config.patch_width, config.hidden_size, bias=False)
        self.position_embedding_table = mx.zeros((2, config.position_embedding_size, config.hidden_size))

    def __call__(self, patches: mx.array, positions: mx.array) -> mx.array:
        """patches in [0, 1] [N, patch_width], positions (x, y) [N, 2] -> [N, E]."""
        table = self.position_embedding_table
        pixels = (2 * (patches - 0.5)).astype(table.dtype)
        return linear(self.input_proj, pixels) + (table[0][positions[:, 0]] + table[1][positions[:, 1]])


class VisionAttention(nn.Module):
    """Every patch of a picture sees every patch of the same picture."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        E, D, clipped = config.hidden_size, config.head_dim, config.use_clipped_linears
        self.heads, self.kv_heads, self.width = config.num_attention_heads, config.num_key_value_heads, D
        self.eps = config.rms_norm_eps
        self.q_proj = ClippedLinear(E, self.heads * D, clipped)
        self.k_proj = ClippedLinear(E, self.kv_heads * D, clipped)
        self.v_proj = ClippedLinear(E, self.kv_heads * D, clipped)
        self.o_proj = ClippedLinear(self.heads * D, E, clipped)
        self.q_norm = nn.RMSNorm(D, eps=self.eps)
        self.k_norm = nn.RMSNorm(D, eps=self.eps)

    def __call__(self, x: mx.array, table: Table, lengths: Sequence[int]) -> mx.array:
        """x [N, E] -> the same shape; lengths: patches of each picture, N in all."""
        N, D = x.shape[0], self.width
        q = _rotate(self.q_norm(self.q_proj(x).reshape(N, self.heads, D)), table)
        k = _rotate(self.k_norm(self.k_proj(x).reshape(N, self.kv_heads, D)), table)
        v = mx.fast.rms_norm(self.v_proj(x).reshape(N, self.kv_heads, D), None, self.eps)
        parts, start = [], 0
        for count, length in _runs(lengths):
            stop = start + count * length
            # [N, H, D] -> [pictures, H, patches, D]
            q_, k_, v_ = (t[start:stop].reshape(count, length, -1, D).swapaxes(1, 2) for t in (q, k, v))
            parts.append(_attend(q_, k_, v_).swapaxes(1, 2).reshape(count * length, -1))
            start = stop
        return self.o_proj(parts[0] if len(parts) == 1 else mx.concatenate(parts))


class VisionMLP(nn.Module):
    """The feed-forward block: GeGLU."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        E, inner, clipped = config.hidden_size, config.intermediate_size, config.use_clipped_linears
        self.gate_proj = ClippedLinear(E, inner, clipped)
        self.up_proj = ClippedLinear(E, inner, clipped)
        self.down_proj = ClippedLinear(inner, E, clipped)

    def __call__(self, x: mx.array) -> mx.array:
        activation = geglu_by_power if on_cpu() else geglu
        return self.down_proj(activation(self.gate_proj(x), self.up_proj(x)))


class VisionLayer(nn.Module):
    """Attention and feed-forward, each normalised before and after."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        E, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = VisionAttention(config)
        self.mlp = VisionMLP(config)
        self.input_layernorm = nn.RMSNorm(E, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(E, eps=eps)
        self.pre_feedforward_layernorm = nn.RMSNorm(E, eps=eps)
        self.post_feedforward_layernorm = nn.RMSNorm(E, eps=eps)

    def __call__(self, x: mx.array, table: Table, lengths: Sequence[int]) -> mx.array:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), table, lengths))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class VisionEncoder(nn.Module):
    """The layers, under the name the checkpoint gives them."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = [VisionLayer(config) for _ in range(config.num_hidden_layers)]


class VisionTower(nn.Module):
    """Patches of one or more pictures to features.

    >>> tower = VisionTower(config)
    >>> features = tower(patches, positions)             # one picture: [P, 768], [P, 2] -> [P / 9, E]
    >>> features = tower(patches, positions, [630, 54])  # two, one after the other
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self._rope = Rope(RopeConfig(config.rope_theta, "default"), config.head_dim // 2)
        self.patch_embedder = PatchEmbedder(config)
        self.encoder = VisionEncoder(config)
        if config.standardize:
            self.std_bias = mx.zeros((config.hidden_size,))
            self.std_scale = mx.ones((config.hidden_size,))

    @property
    def dtype(self) -> mx.Dtype:
        """What the tower computes in."""
        return self.patch_embedder.position_embedding_table.dtype

    def __call__(
        self, patches: mx.array, positions: np.ndarray | mx.array, lengths: Sequence[int] | None = None
    ) -> mx.array:
        """Features of pictures that stand one after the other.

        patches: [N, patch_width], uint8 or in [0, 1]; numbers of a patch in the order row, column, colour.
        positions: integers (x, y) [N, 2], each place of a picture's grid once, in any order; no padding.
        lengths: patches of each picture; None is one picture. Equal ones side by side are attended in one call.
        Returns [N / pooling_kernel_size**2, E] in the tower's type, each picture's tokens row by row.

        Raises UsageError when positions and lengths describe no complete grids.
        """
        where = np.asarray(positions)
        lengths = [len(where)] if lengths is None else list(lengths)
        order = pooling_order(where, lengths, self.config)
        places = mx.array(where.astype(np.int32))
        if patches.dtype == mx.uint8:
            patches = patches.astype(mx.float32) / 255
        x = self.patch_embedder(patches, places)
        cos, sin = self._rope.angles(places)
        table = cos[:, None], sin[:, None]
        for layer in self.encoder.layers:
            x = layer(x, table, lengths)
            # One layer's activations at a time: the queue would otherwise allocate for several ahead.
            mx.eval(x)
        return self._pool(x, mx.array(order))

    def _pool(self, x: mx.array, order: mx.array) -> mx.array:
        """Means over squares of patches, in float32: after the scale, float16 would overflow."""
        E = x.shape[-1]
        pooled = x[order].astype(mx.float32).reshape(-1, self.config.patches_per_token, E).mean(axis=1) * E**0.5
        if self.config.standardize:
            pooled = (pooled - self.std_bias.astype(mx.float32)) * self.std_scale.astype(mx.float32)
        return pooled.astype(x.dtype)


def encode_images(
    model: "Model", images: "Sequence[ProcessedImage]", *, max_patches: int = MAX_PATCHES
) -> list[mx.array]:
    """Each picture's embeddings for the text stream, [n_tokens, hidden_size] in the model's type, evaluated.

    Pictures of any sizes, in any number: they go through the tower in passes of at most `max_patches` patches (a
    larger one goes alone), those of equal size side by side, and none is padded. The result does not depend on what
    else is in the list beyond rounding.

    Raises UsageError when the model was loaded without a vision tower.
    """
    tower = getattr(model, "vision_tower", None)
    if tower is None:
        why = "was loaded without towers; load(..., towers=True)" if model.config.vision else "has no vision tower"
        raise UsageError(f"pictures need a model that sees, and this one {why}")
    for image in images:
        if image.patches.shape[1] != tower.config.patch_width:
            raise UsageError(
                f"patches of {image.patches.shape[1]} numbers do not fit a tower of {tower.config.patch_width}"
            )
    out: list[mx.array | None] = [None] * len(images)
    for group in _passes([len(image.patches) for image in images], max_patches):
        chosen = [images[i] for i in group]
        patches = mx.array(np.concatenate([image.patches for image in chosen]))
        positions = np.concatenate([image.positions for image in chosen])
        features = model.embed_vision(tower(patches, positions, [len(image.patches) for image in chosen]))
        stops = np.cumsum([image.tokens for image in chosen])[:-1].tolist()
        parts = mx.split(features, stops) if stops else [features]
        mx.eval(parts)
        for i, part in zip(group, parts, strict=True):
            out[i] = part
    return [part for part in out if part is not None]


def pooling_order(positions: np.ndarray, lengths: Sequence[int], config: VisionConfig) -> np.ndarray:
    """Which patches to read so that each token's stand together: int32 [N], from positions (x, y) [N, 2].

    Raises UsageError when a picture's positions are not a complete grid of whole squares.
    """
    k, parts, start = config.pooling_kernel_size, [], 0
    if positions.ndim != 2 or positions.shape[1] != 2 or sum(lengths) != len(positions):
        raise UsageError(f"positions of shape {list(positions.shape)} do not fit pictures of {list(lengths)} patches")
    for length in lengths:
        x, y = positions[start : start + length].T.astype(np.int64)
        width, height = (int(x.max()) + 1, int(y.max()) + 1) if length else (0, 0)
        complete = length and min(x.min(), y.min()) >= 0 and len(np.unique(y * width + x)) == length == width * height
        if not complete or width % k or height % k or max(width, height) > config.position_embedding_size:
            raise UsageError(
                f"the positions of a picture of {length} patches are no grid of whole {k} x {k} squares within "
                f"{config.position_embedding_size} places; leave padding out"
            )
        token = (y // k) * (width // k) + x // k
        parts.append(np.argsort(token, kind="stable") + start)
        start += length
    return np.concatenate(parts).astype(np.int32)


def _passes(lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Indices of pictures that go through the tower together: `limit` patches at most, equal lengths adjacent."""
    group: list[int] = []
    total = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if group and total + lengths[i] > limit:
            yield group
            group, total = [], 0
        group.append(i)
        total += lengths[i]
    if group:
        yield group


def _runs(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(how many, which length) of equal neighbours."""
    start = 0
    for i in range(1, len(lengths) + 1):
        if i == len(lengths) or lengths[i] != lengths[start]:
            yield i - start, lengths[start]
            start = i


def _rotate(x: mx.array, table: Table) -> mx.array:
    """Heads [N, H, D]: the first half turned by the angles of x, the second by those of y.

    Source: `Gemma4VisionRotaryEmbedding`, `apply_multidimensional_rope`.
    """
    N, H, D = x.shape
    halves = x.reshape(N, H, 2, D // 2)
    first, second = rotate_pairs(halves[..., : D // 4], halves[..., D // 4 :], *table)
    return mx.concatenate([first, second], axis=-1).reshape(N, H, D)


def _attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Softmax(q k) v of [b, H, n, D] each -> the same shape; scale 1, no mask, no scores in memory beyond a tile."""
    D = q.shape[-1]
    width = next((w for w in FUSED_WIDTHS if w >= D), None)
    if width is None or on_cpu():
        return _attend_in_tiles(q, k, v)
    if width > D:  # zeros add nothing to a score, and their columns of the result are dropped
        q, k, v = (mx.pad(t, [(0, 0), (0, 0), (0, 0), (0, width - D)]) for t in (q, k, v))
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :D]


def _attend_in_tiles(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """The same where MLX has no kernel that keeps scores out of memory: a tile at a time, divided by its sums last."""
    b, H, n, D = q.shape
    q, k, v = (t.reshape(b * H, n, D) for t in (q, k, v))
    k = mx.contiguous(k.swapaxes(1, 2))  # read by every tile
    heads, rows = max(1, MAX_SCORES // (n * n)), max(1, MAX_SCORES // n)
    out = []
    for head in range(0, b * H, heads):
        some, parts = slice(head, head + heads), []
        for start in range(0, n, rows):
            scores = q[some, start : start + rows] @ k[some]
            weights = _weights(scores, mx.max(scores, axis=-1, keepdims=True))
            sums = mx.sum(weights, axis=-1, keepdims=True)
            parts.append(((weights.astype(v.dtype) @ v[some]) / sums).astype(v.dtype))
            del scores, weights
            mx.eval(parts[-1])
        out.append(parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1))
    return mx.concatenate(out).reshape(b, H, n, D)


@fused
def _weights(scores: mx.array, highest: mx.array) -> mx.array:
    """exp(scores - highest) in float32; as a power of two, which on a CPU takes half as long.

    Of 2^-100 at least: that adds nothing to a sum that has a 1 in it, and smaller ones would make denormal products, at
    which a CPU crawls.
    """
    return mx.power(2.0, mx.maximum((scores.astype(mx.float32) - highest.astype(mx.float32)) * LOG2_E, -100.0))
