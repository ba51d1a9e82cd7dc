"""The audio tower's part of config.json as a frozen dataclass, checked once when it is read.

Owns: what the fields of `audio_config` mean and which values the graph in `models/audio.py` computes. Leaves the
features the tower is fed with to `media/mel.py` and everything else in config.json to `config.py`.
"""

from dataclasses import dataclass
from typing import Any

from .errors import ConfigError

# Bins of a mel frame. config.json does not say it: transformers sizes `input_proj_linear` as if the number were
# `subsampling_conv_channels[0]`, which is 128 as well.
MEL_BINS = 128


@dataclass(frozen=True)
class AudioConfig:
    """The conformer of E2B and E4B. Names and defaults are those of transformers' `Gemma4AudioConfig`."""

    hidden_size: int = 1024
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    subsampling_conv_channels: tuple[int, int] = (128, 32)  # of the two convolutions, each halving time and frequency
    conv_kernel_size: int = 5  # of the causal depthwise convolution inside a layer
    residual_weight: float = 0.5  # what a feed-forward block adds of its output
    attention_chunk_size: int = 12  # positions attended to as one block
    attention_context_left: int = 13  # see `window`
    attention_logit_cap: float = 50.0
    attention_invalid_logits_value: float = -1e9
    use_clipped_linears: bool = True
    rms_norm_eps: float = 1e-6
    gradient_clipping: float = 1e10  # bounds on activations, too: the name is the checkpoint's
    output_proj_dims: int = 1536  # width of what the tower hands to `embed_audio`

    @property
    def window(self) -> int:
        """A query sees itself and the window - 1 positions before it.

        transformers lets distances below attention_context_left - 1 through (`modeling_gemma4.py:
        sliding_window_mask_function`), one key less than the field's name promises.
        """
        return self.attention_context_left - 1

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "AudioConfig":
        """`raw`: audio_config as it stands in config.json. Raises ConfigError."""
        names = cls.__dataclass_fields__
        fields: dict[str, Any] = {name: value for name, value in raw.items() if name in names and value is not None}
        fields["subsampling_conv_channels"] = tuple(raw.get("subsampling_conv_channels") or (128, 32))
        config = cls(**fields)
        _check(config, raw)
        return config


def _check(config: AudioConfig, raw: dict[str, Any]) -> None:
    """What the published files always satisfy and the graph relies on."""
    model_type = raw.get("model_type", "gemma4_audio")
    if model_type != "gemma4_audio":
        raise ConfigError(f"audio_config is of type {model_type!r}; this graph computes gemma4_audio")
    if raw.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"audio_config has hidden_act {raw['hidden_act']!r}; this graph computes silu")
    if raw.get("attention_context_right"):
        raise ConfigError("audio_config lets attention see the future; no published Gemma 4 does, nor this graph")
    # Blocks that see exactly the block before them: where that fails, transformers' table of relative positions does
    # not hold true distances either.
    if config.attention_context_left != config.attention_chunk_size + 1:
        raise ConfigError(
            f"audio_config has attention_context_left {config.attention_context_left}; this graph computes "
            f"attention_chunk_size + 1 ({config.attention_chunk_size + 1}), as in every published Gemma 4"
        )
    if config.hidden_size % config.num_attention_heads or config.hidden_size % 2:
        raise ConfigError(
            f"audio_config's hidden_size {config.hidden_size} is no even multiple of "
            f"num_attention_heads {config.num_attention_heads}"
        )
    if len(config.subsampling_conv_channels) != 2 or config.subsampling_conv_channels[0] != MEL_BINS:
        raise ConfigError(
            f"audio_config has subsampling_conv_channels {list(config.subsampling_conv_channels)}; this graph computes "
            f"two convolutions, the first with {MEL_BINS} channels, as in every published Gemma 4"
        )
