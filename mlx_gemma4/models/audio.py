"""The audio tower of E2B and E4B: log-mel frames to soft tokens, and those into the text stream.

Owns: the two convolutions, the conformer with chunked local attention and relative positions, the batching of clips
of unequal length. Leaves features to `media/mel.py`, sound files to `media/audio.py`, and the places in the prompt
where soft tokens go to whoever merges them.

Axes: B clips, T mel frames (10 ms), L soft tokens (40 ms, T / 4), E width of the tower, N heads, D head width,
U blocks of W positions. Attribute names are the checkpoint's tensor names.
Source of truth: transformers 5.23 `modeling_gemma4.py: Gemma4AudioModel` and the classes it is made of.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..config_audio import MEL_BINS, AudioConfig
from ..errors import UsageError
from .fused import soft_cap
from .tower_parts import ClippedLinear, linear, swish

if TYPE_CHECKING:
    from ..media.audio import ProcessedClip
    from .gemma4 import Model

# The norms that the published classes give no eps of the configuration.
NORM_EPS = 1e-6

# Clips encoded together: so many at most, and no more than this part of the frames may be padding.
MOST_CLIPS, MOST_PADDING = 8, 0.2


def relative_positions(config: AudioConfig) -> np.ndarray:
    """What `relative_k_proj` reads of distances W, W-1, ..., 0: float32 [W + 1, E], sines beside cosines.

    Source: transformers `Gemma4AudioRelPositionalEncoding`.
    """
    scales = config.hidden_size // 2
    step = math.log(10_000.0) / max(scales - 1, 1)
    inverse = np.exp(np.arange(scales, dtype=np.float32) * np.float32(-step))
    angles = np.arange(config.attention_chunk_size, -1, -1, dtype=np.float32)[:, None] * inverse
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)


def _silu(x: mx.array) -> mx.array:
    return swish(x, x)


class SubsampleLayer(nn.Module):
    """A convolution that halves time and frequency, a norm over its channels, ReLU."""

    def __init__(self, input_channels: int, channels: int, eps: float):
        super().__init__()
        self.conv = nn.Conv2d(input_channels, channels, kernel_size=3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(channels, eps=eps, bias=False)

    def __call__(self, x: mx.array, mask: mx.array) -> tuple[mx.array, mx.array]:
        """x [B, T, F, C], mask [B, T] -> the same of half the length, rounded up; F is halved, too."""
        x = mx.where(mask[..., None, None], x, 0.0)  # what stands behind a clip's end must not reach into it
        return nn.relu(self.norm(self.conv(x))), mask[:, ::2]


class Subsample(nn.Module):
    """Mel frames -> vectors of the tower, one for four frames."""

    def __init__(self, config: AudioConfig):
        super().__init__()
        first, second = config.subsampling_conv_channels
        self.layer0 = SubsampleLayer(1, first, config.rms_norm_eps)
        self.layer1 = SubsampleLayer(first, second, config.rms_norm_eps)
        self.input_proj_linear = nn.Linear(MEL_BINS // 4 * second, config.hidden_size, bias=False)

    def __call__(self, mel: mx.array, mask: mx.array) -> tuple[mx.array, mx.array]:
        """mel [B, T, 128], mask [B, T] -> ([B, L, E], [B, L])"""
        x = mel.astype(self.layer0.conv.weight.dtype)[..., None]
        x, mask = self.layer0(x, mask)
        x, mask = self.layer1(x, mask)
        return linear(self.input_proj_linear, x.flatten(2)), mask


class Bounded(nn.Module):
    """A part of the conformer whose activations are kept inside +-`gradient_clipping`."""

    def __init__(self, config: AudioConfig):
        super().__init__()
        self.bound = config.gradient_clipping

    def bounded(self, x: mx.array) -> mx.array:
        """The bound, or the largest number of x's type where that is smaller: infinities become finite."""
        bound = min(self.bound, mx.finfo(x.dtype).max)
        return mx.clip(x, -bound, bound)


class FeedForward(Bounded):
    """Half a step: the conformer has one before and one after attention and convolution."""

    def __init__(self, config: AudioConfig):
        super().__init__(config)
        E, clipped = config.hidden_size, config.use_clipped_linears
        self.scale = config.residual_weight
        self.pre_layer_norm = nn.RMSNorm(E, eps=NORM_EPS)
        self.ffw_layer_1 = ClippedLinear(E, 4 * E, clipped)
        self.ffw_layer_2 = ClippedLinear(4 * E, E, clipped)
        self.post_layer_norm = nn.RMSNorm(E, eps=NORM_EPS)

    def __call__(self, x: mx.array) -> mx.array:
        """[B, L, E] -> [B, L, E]"""
        y = self.ffw_layer_2(_silu(self.ffw_layer_1(self.pre_layer_norm(self.bounded(x)))))
        return x + self.post_layer_norm(self.bounded(y)) * self.scale


class Attention(nn.Module):
    """Local attention in blocks of W: each sees itself and the block before it, masked to the last W positions.

    A score is q.k + q.r(distance), bent by a soft cap; in float32 whatever the weights are.
    """

    def __init__(self, config: AudioConfig):
        super().__init__()
        E, clipped = config.hidden_size, config.use_clipped_linears
        self.heads, self.width = config.num_attention_heads, config.head_dim
        self.chunk, self.cap = config.attention_chunk_size, config.attention_logit_cap
        self.invalid = config.attention_invalid_logits_value
        self.q_proj = ClippedLinear(E, E, clipped)
        self.k_proj = ClippedLinear(E, E, clipped)
        self.v_proj = ClippedLinear(E, E, clipped)
        self.post = ClippedLinear(E, E, clipped)
        self.relative_k_proj = nn.Linear(E, E, bias=False)
        self.per_dim_scale = mx.zeros((self.width,))

    def __call__(self, x: mx.array, positions: mx.array, visible: mx.array) -> mx.array:
        """x [B, L, E], positions [W + 1, E], visible bool [B, 1, U, W, 2W] -> [B, L, E]"""
        (B, L, E), W = x.shape, self.chunk
        scale = self.width**-0.5 / math.log(2) * nn.softplus(self.per_dim_scale.astype(mx.float32))
        q = self._blocks(self.q_proj(x)) * scale
        k = _with_previous(self._blocks(self.k_proj(x)) * (math.log(1 + math.e) / math.log(2)))
        v = _with_previous(self._blocks(self.v_proj(x)))

        distances = self.relative_k_proj(positions.astype(x.dtype)).astype(mx.float32)
        distances = distances.reshape(W + 1, self.heads, self.width).transpose(1, 2, 0)
        relative = (q.flatten(2, 3) @ distances).reshape(*q.shape[:-1], W + 1)
        scores = soft_cap(self.cap, q @ k.swapaxes(-1, -2) + _shifted(relative))
        weights = mx.softmax(mx.where(visible, scores, self.invalid), axis=-1)
        out = (weights @ v).transpose(0, 2, 3, 1, 4).reshape(B, -1, E)[:, :L]
        return self.post(out.astype(x.dtype))

    def _blocks(self, x: mx.array) -> mx.array:
        """[B, L, E] -> float32 [B, N, U, W, D], zeros behind the end"""
        B, L, _ = x.shape
        x = mx.pad(x.astype(mx.float32), [(0, 0), (0, -L % self.chunk), (0, 0)])
        return x.reshape(B, -1, self.chunk, self.heads, self.width).transpose(0, 3, 1, 2, 4)


def _with_previous(x: mx.array) -> mx.array:
    """Blocks [B, N, U, W, D] with the one before in front of each: [B, N, U, 2W, D]."""
    before = mx.concatenate([mx.zeros_like(x[:, :, :1]), x[:, :, :-1]], axis=2)
    return mx.concatenate([before, x], axis=3)


def _shifted(x: mx.array) -> mx.array:
    """Scores by distance W .. 0 -> by key of the block before and this one: [..., W, W + 1] -> [..., W, 2W].

    Row w moves right by w: a row one longer than the result, read on without its last column, begins one earlier each
    time. What the shift leaves outside the band is never visible.
    """
    *lead, W, _ = x.shape
    x = mx.pad(x, [(0, 0)] * (len(lead) + 1) + [(0, W)])
    return x.flatten(-2)[..., : W * 2 * W].reshape(*lead, W, 2 * W)


class LightConv(Bounded):
    """A gated causal depthwise convolution."""

    def __init__(self, config: AudioConfig):
        super().__init__(config)
        E, clipped = config.hidden_size, config.use_clipped_linears
        self.reach = config.conv_kernel_size - 1
        self.pre_layer_norm = nn.RMSNorm(E, eps=config.rms_norm_eps)
        self.linear_start = ClippedLinear(E, 2 * E, clipped)
        self.depthwise_conv1d = nn.Conv1d(E, E, config.conv_kernel_size, groups=E, bias=False)
        self.conv_norm = nn.RMSNorm(E, eps=config.rms_norm_eps)
        self.linear_end = ClippedLinear(E, E, clipped)

    def __call__(self, x: mx.array) -> mx.array:
        """[B, L, E] -> [B, L, E]"""
        y = swish(*mx.split(self.linear_start(self.pre_layer_norm(x)), 2, axis=-1))
        y = self.depthwise_conv1d(mx.pad(y, [(0, 0), (self.reach, 0), (0, 0)]))
        return x + self.linear_end(_silu(self.conv_norm(self.bounded(y))))


class AudioLayer(Bounded):
    """One conformer layer."""

    def __init__(self, config: AudioConfig):
        super().__init__(config)
        self.feed_forward1 = FeedForward(config)
        self.self_attn = Attention(config)
        self.lconv1d = LightConv(config)
        self.feed_forward2 = FeedForward(config)
        self.norm_pre_attn = nn.RMSNorm(config.hidden_size, eps=NORM_EPS)
        self.norm_post_attn = nn.RMSNorm(config.hidden_size, eps=NORM_EPS)
        self.norm_out = nn.RMSNorm(config.hidden_size, eps=NORM_EPS)

    def __call__(self, x: mx.array, positions: mx.array, visible: mx.array) -> mx.array:
        """x [B, L, E] -> [B, L, E]; the other arguments as in `Attention`"""
        x = self.feed_forward1(x)
        attended = self.self_attn(self.norm_pre_attn(self.bounded(x)), positions, visible)
        x = x + self.norm_post_attn(self.bounded(attended))
        return self.norm_out(self.bounded(self.feed_forward2(self.lconv1d(x))))


class AudioTower(nn.Module):
    """Log-mel frames of a batch of clips -> features, with a mask that says which belong to a clip.

    >>> features, mask = tower(mel, mask)    # [B, T, 128], bool [B, T] -> [B, L, output_proj_dims], bool [B, L]

    L is T / 4, rounded up. Nothing flows from later to earlier positions and none from behind a clip's end, so a clip
    has the same features alone and in any batch. Rows where the mask is False mean nothing.
    """

    def __init__(self, config: AudioConfig):
        super().__init__()
        self.config = config
        self.subsample_conv_projection = Subsample(config)
        self.layers = [AudioLayer(config) for _ in range(config.num_hidden_layers)]
        self.output_proj = nn.Linear(config.hidden_size, config.output_proj_dims)

    def __call__(self, mel: mx.array, mask: mx.array) -> tuple[mx.array, mx.array]:
        x, mask = self.subsample_conv_projection(mel, mask)
        positions, visible = mx.array(relative_positions(self.config)), self._visible(mask)
        for layer in self.layers:
            x = layer(x, positions, visible)
        return self.output_proj(x), mask

    def _visible(self, mask: mx.array) -> mx.array:
        """Which keys of its own block and the one before a query sees: bool [B, 1, U, W, 2W] from mask [B, L]."""
        (B, L), W = mask.shape, self.config.attention_chunk_size
        # One block in front of the first; the ends are no sound.
        keys = mx.pad(mask, [(0, 0), (W, -L % W)]).reshape(B, -1, W)
        keys = mx.concatenate([keys[:, :-1], keys[:, 1:]], axis=-1)
        distance = mx.arange(W, 2 * W)[:, None] - mx.arange(2 * W)
        near = (distance >= 0) & (distance < self.config.window)
        return (keys[:, :, None] & near)[:, None]


def channels_last(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Convolution weights of the tower in MLX's axes, channels last, from those or the Hub's; others as they are.

    Names are MLX's (`audio_tower.*`). A kernel is as wide as it is high, and channels are more than that, so the axes
    tell one layout from the other: [out, in, 3, 3] and [out, 3, 3, in], [E, 1, 5] and [E, 5, 1].
    """
    out = dict(weights)
    for name, value in weights.items():
        if not name.startswith("audio_tower."):
            continue
        if name.endswith(".conv.weight") and value.ndim == 4 and value.shape[1] != value.shape[2]:
            out[name] = value.transpose(0, 2, 3, 1)
        elif name.endswith(".depthwise_conv1d.weight") and value.ndim == 3 and value.shape[1] == 1:
            out[name] = value.transpose(0, 2, 1)
    return out


def encode_clips(model: "Model", clips: "Sequence[ProcessedClip]") -> list[mx.array]:
    """What each clip becomes in the text stream: [n_tokens, hidden] each, in the order of `clips`, evaluated.

    These vectors stand where the clip's n_tokens `<|audio|>` placeholders are, as they are: token embeddings are
    scaled, these are not. Clips of similar length go through the tower together; the result does not depend on it.

    Raises UsageError for a model without an audio tower.
    """
    tower = getattr(model, "audio_tower", None)
    if tower is None and model.config.audio is None:
        raise UsageError("this model does not hear: only E2B and E4B have an audio tower; choose one of them")
    if tower is None:
        raise UsageError("the model was loaded without its towers; load it with towers=True to give it sound")
    out: dict[int, mx.array] = {}
    for group in _groups([len(clip.mel) for clip in clips]):
        longest = max(len(clips[i].mel) for i in group)
        mel = np.zeros((len(group), longest, MEL_BINS), np.float32)
        mask = np.zeros(mel.shape[:2], bool)
        for row, i in enumerate(group):
            mel[row, : len(clips[i].mel)], mask[row, : len(clips[i].mel)] = clips[i].mel, True
        features, _ = tower(mx.array(mel), mx.array(mask))
        # Frames end where the clip does, so its tokens are the first of its row.
        rows = [features[row, : clips[i].tokens] for row, i in enumerate(group)]
        embedded = mx.split(model.embed_audio(mx.concatenate(rows)), np.cumsum([len(r) for r in rows])[:-1].tolist())
        mx.eval(embedded)  # one group's activations at a time
        out |= zip(group, embedded, strict=True)
    return [out[i] for i in range(len(clips))]


def _groups(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of clips to encode together: from short to long, as many as keep padding small."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        group = [*groups[-1], i] if groups else [i]
        padding = 1 - sum(lengths[j] for j in group) / (len(group) * lengths[i])
        if not groups or len(group) > MOST_CLIPS or padding > MOST_PADDING:
            groups.append([i])
        else:
            groups[-1] = group
    return groups
