"""The vision tower's part of config.json (`vision_config`) as a frozen dataclass, checked once when it is read.

Owns which of its fields the tower uses and what each means. Leaves the text decoder to `config.py`, the graph to
`models/vision.py` and pictures to `media/images.py`.
"""

from dataclasses import dataclass
from typing import Any

from .errors import ConfigError

MODEL_TYPE = "gemma4_vision"


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower. Names are config.json's own.

    Source: transformers `configuration_gemma4.py: Gemma4VisionConfig`.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 16
    num_attention_heads: int = 12
    num_key_value_heads: int = 12
    head_dim: int = 64  # a multiple of 4: two rotated halves each for x and y
    patch_size: int = 16  # pixels along a side
    pooling_kernel_size: int = 3  # patches along a side that become one token
    position_embedding_size: int = 10240  # rows of the table for each axis
    rms_norm_eps: float = 1e-6
    rope_theta: float = 100.0
    # Every linear clamps what goes in and what comes out to bounds that are stored with it (E2B, E4B).
    use_clipped_linears: bool = False
    # Pooled features are shifted and scaled by stored vectors (26B, 31B).
    standardize: bool = False
    default_output_length: int = 280  # tokens of a picture at most, unless the user says otherwise

    @property
    def patch_width(self) -> int:
        """Numbers in a patch: rows, columns, three colours."""
        return 3 * self.patch_size**2

    @property
    def patches_per_token(self) -> int:
        return self.pooling_kernel_size**2

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "VisionConfig":
        """Reads `vision_config`; what it leaves out has transformers' default.

        Raises ConfigError when the fields describe no tower this graph computes.
        """
        kind = raw.get("model_type", MODEL_TYPE)
        if kind != MODEL_TYPE:
            raise ConfigError(f"vision_config is a {kind!r}; this package runs {MODEL_TYPE!r} towers")
        if raw.get("attention_bias"):
            raise ConfigError("vision_config sets attention_bias; no published Gemma 4 has it")
        activation = raw.get("hidden_activation", "gelu_pytorch_tanh")
        if activation != "gelu_pytorch_tanh":
            raise ConfigError(f"vision_config has activation {activation!r}; Gemma 4's is gelu_pytorch_tanh")
        rope = raw.get("rope_parameters") or {}
        # The Hub's files say "default" and transformers writes "axial"; both are angles of x and y apart.
        if rope.get("rope_type", "axial") not in ("default", "axial"):
            raise ConfigError(f"vision_config has rope_type {rope['rope_type']!r}; this graph knows 'default', 'axial'")
        fields = {name: raw[name] for name in cls.__dataclass_fields__ if raw.get(name) is not None}
        config = cls(**{**fields, "rope_theta": float(rope.get("rope_theta", 100.0))})
        config._check()
        return config

    def _check(self) -> None:
        for name, kind in self.__class__.__annotations__.items():
            value = getattr(self, name)
            if kind is int and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"vision_config has {name} {value!r}; it must be a whole number above 0")
        if self.head_dim % 4:
            raise ConfigError(
                f"vision_config has head_dim {self.head_dim}; rotary angles of x and y need a multiple of 4"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError("vision_config: num_attention_heads is no multiple of num_key_value_heads")
