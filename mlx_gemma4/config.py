"""Gemma 4's config.json as frozen dataclasses, checked once when it is read.

Owns: which fields the text graph uses, what each means, which combinations exist, and the derived tables every other
file asks for (layer kinds, head widths, which layer's keys and values a sharing layer reads). Leaves the towers'
configuration as plain dictionaries to the files that build them, and weights to `loading.py`.

Reads both published styles: `global_head_dim` / `num_global_key_value_heads` (the files on the Hub) and
`per_layer_config` (what transformers 5.23 `save_pretrained` writes).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ConfigError

SLIDING = "sliding_attention"
GLOBAL = "full_attention"

MODEL_TYPES = ("gemma4", "gemma4_text")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of one attention kind."""

    # Base of the geometric progression of wavelengths: 1e4 in sliding layers, 1e6 in global ones.
    theta: float
    # "default" rotates every pair; "proportional" rotates the first `rotated_fraction` of the pairs of a head and
    # leaves the others still (angle 0), with frequencies spaced over the whole head.
    kind: str
    rotated_fraction: float = 1.0
    # Divides every frequency (position interpolation); 1 in all published files.
    factor: float = 1.0


@dataclass(frozen=True)
class TextConfig:
    """The text decoder. Names are config.json's own wherever one exists."""

    vocab_size: int  # rows of the token embedding, which is also the output head
    hidden_size: int  # width of the residual stream
    intermediate_size: int  # width of the dense MLP (twice that in sharing layers if use_double_wide_mlp)
    num_hidden_layers: int
    layer_types: tuple[str, ...]  # SLIDING or GLOBAL, one per layer
    num_attention_heads: int  # query heads, the same in every layer
    num_key_value_heads: int  # of sliding layers, and of global ones unless the next field says otherwise
    num_global_key_value_heads: int  # of global layers
    head_dim: int  # sliding layers
    global_head_dim: int  # global layers
    sliding_window: int  # a sliding query sees itself and the sliding_window - 1 positions before it
    max_position_embeddings: int  # the context the model was trained for
    rope_sliding: RopeConfig
    rope_global: RopeConfig
    rms_norm_eps: float = 1e-6
    # Logits become cap * tanh(logits / cap); None: no cap.
    final_logit_softcapping: float | None = 30.0
    # Global layers have no v_proj: their value is the normalised k_proj output before k_norm and RoPE.
    attention_k_eq_v: bool = False
    # The last so many layers have no k_proj/v_proj and read the last own K/V of their kind before them.
    num_kv_shared_layers: int = 0
    use_double_wide_mlp: bool = False
    # Width of the per-layer embeddings (PLE) of E2B/E4B; 0: none.
    hidden_size_per_layer_input: int = 0
    vocab_size_per_layer_input: int = 0
    # Mixture of experts beside the dense MLP (26B-A4B); 0 experts: none.
    num_experts: int = 0
    top_k_experts: int = 0
    moe_intermediate_size: int = 0
    # "vision": tokens of one image see each other in sliding layers; None: causal everywhere.
    use_bidirectional_attention: str | None = None
    tie_word_embeddings: bool = True
    pad_token_id: int = 0

    @property
    def first_shared_layer(self) -> int:
        """Layers from here on read another layer's keys and values."""
        return self.num_hidden_layers - self.num_kv_shared_layers

    def is_sliding(self, layer: int) -> bool:
        return self.layer_types[layer] == SLIDING

    def width_of(self, layer: int) -> int:
        """Width of one attention head of this layer."""
        return self.head_dim if self.is_sliding(layer) else self.global_head_dim

    def kv_heads_of(self, layer: int) -> int:
        return self.num_key_value_heads if self.is_sliding(layer) else self.num_global_key_value_heads

    def k_is_v(self, layer: int) -> bool:
        """Whether one vector per position serves as key and value."""
        return self.attention_k_eq_v and not self.is_sliding(layer)

    def producer_of(self, layer: int) -> int:
        """The layer whose keys and values this one attends to: itself, or the last own one of its kind."""
        if layer < self.first_shared_layer:
            return layer
        kind = self.layer_types[layer]
        own = self.layer_types[: self.first_shared_layer]
        return max(i for i, t in enumerate(own) if t == kind)

    def mlp_width_of(self, layer: int) -> int:
        wide = self.use_double_wide_mlp and layer >= self.first_shared_layer
        return self.intermediate_size * (2 if wide else 1)


@dataclass(frozen=True)
class Gemma4Config:
    """A whole checkpoint: the text decoder and what else its folder declares."""

    text: TextConfig
    model_type: str = "gemma4"
    vision: dict[str, Any] | None = None  # vision_config as it stands in the file
    audio: dict[str, Any] | None = None  # audio_config as it stands in the file
    eos_token_ids: tuple[int, ...] = ()
    quantization: dict[str, Any] | None = None  # MLX shards: group_size, bits, mode and per-path overrides
    dtype: str | None = None  # what the file says its weights are stored in
    raw: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Gemma4Config":
        """Reads `folder`/config.json. Raises ConfigError."""
        path = Path(folder) / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path.parent} has no config.json; point --model at a checkpoint folder") from None
        except (UnicodeDecodeError, json.JSONDecodeError) as e:
            raise ConfigError(f"{path} is not valid JSON ({e}); download it again") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{path} holds no JSON object; download it again")
        return cls.from_dict(raw)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Gemma4Config":
        """Raises ConfigError when the dictionary is not a Gemma 4 this graph computes."""
        model_type = raw.get("model_type")
        if model_type not in MODEL_TYPES:
            raise ConfigError(
                f"model_type {model_type!r} is not supported; this package runs {', '.join(MODEL_TYPES)} checkpoints"
            )
        text = raw if model_type == "gemma4_text" else raw.get("text_config")
        if not isinstance(text, dict):
            raise ConfigError("config.json has no text_config; is this a complete Gemma 4 checkpoint?")
        eos = raw.get("eos_token_id", text.get("eos_token_id"))
        quantization = raw.get("quantization") or raw.get("quantization_config")
        if quantization is not None and "bits" not in quantization:
            raise ConfigError(
                f"quantization {quantization.get('quant_method', '?')!r} is not an MLX format; "
                "convert the original checkpoint instead"
            )
        return cls(
            text=_text_config(text, raw.get("tie_word_embeddings")),
            model_type=model_type,
            vision=raw.get("vision_config"),
            audio=raw.get("audio_config"),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,)),
            quantization=quantization,
            dtype=raw.get("dtype") or raw.get("torch_dtype") or text.get("dtype"),
            raw=raw,
        )


def _text_config(raw: dict[str, Any], outer_tie: bool | None) -> TextConfig:
    def need(key: str) -> Any:
        value = raw.get(key)
        if value is None:
            raise ConfigError(f"config.json lacks {key!r}, which the text decoder needs")
        return value

    kinds = tuple(need("layer_types"))
    for i, kind in enumerate(kinds):
        if kind not in (SLIDING, GLOBAL):
            raise ConfigError(f"layer {i} has attention kind {kind!r}; this graph knows {SLIDING} and {GLOBAL}")
    if len(kinds) != need("num_hidden_layers"):
        raise ConfigError(f"layer_types names {len(kinds)} layers, num_hidden_layers says {raw['num_hidden_layers']}")
    if raw.get("attention_bias"):
        raise ConfigError("attention_bias is set; no published Gemma 4 has it and this graph does not compute it")
    if raw.get("hidden_activation", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise ConfigError(f"hidden_activation {raw['hidden_activation']!r} is not Gemma 4's gelu_pytorch_tanh")

    per_global = _global_overrides(raw, kinds)
    moe = bool(raw.get("enable_moe_block"))
    rope = raw.get("rope_parameters") or {}
    tie = raw.get("tie_word_embeddings", outer_tie)
    text = TextConfig(
        vocab_size=need("vocab_size"),
        hidden_size=need("hidden_size"),
        intermediate_size=need("intermediate_size"),
        num_hidden_layers=len(kinds),
        layer_types=kinds,
        num_attention_heads=need("num_attention_heads"),
        num_key_value_heads=need("num_key_value_heads"),
        num_global_key_value_heads=per_global.get("num_key_value_heads") or need("num_key_value_heads"),
        head_dim=need("head_dim"),
        global_head_dim=per_global.get("head_dim") or need("head_dim"),
        sliding_window=need("sliding_window"),
        max_position_embeddings=need("max_position_embeddings"),
        rope_sliding=_rope(rope.get(SLIDING), SLIDING, RopeConfig(1e4, "default")),
        rope_global=_rope(rope.get(GLOBAL), GLOBAL, RopeConfig(1e6, "proportional", 0.25)),
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        final_logit_softcapping=raw.get("final_logit_softcapping"),
        attention_k_eq_v=bool(raw.get("attention_k_eq_v")),
        num_kv_shared_layers=raw.get("num_kv_shared_layers") or 0,
        use_double_wide_mlp=bool(raw.get("use_double_wide_mlp")),
        hidden_size_per_layer_input=raw.get("hidden_size_per_layer_input") or 0,
        vocab_size_per_layer_input=raw.get("vocab_size_per_layer_input") or raw["vocab_size"],
        num_experts=(raw.get("num_experts") or 0) if moe else 0,
        top_k_experts=(raw.get("top_k_experts") or 0) if moe else 0,
        moe_intermediate_size=(raw.get("moe_intermediate_size") or raw.get("expert_intermediate_size") or 0)
        if moe
        else 0,
        use_bidirectional_attention=raw.get("use_bidirectional_attention"),
        tie_word_embeddings=True if tie is None else bool(tie),
        pad_token_id=raw.get("pad_token_id") or 0,
    )
    _check(text, moe)
    return text


def _global_overrides(raw: dict[str, Any], kinds: tuple[str, ...]) -> dict[str, Any]:
    """What global layers have of their own (head_dim, num_key_value_heads), in either published style.

    `per_layer_config` ({"05": {"head_dim": 512, ...}, ...}) goes before the other two fields where both stand, and
    `num_global_key_value_heads` counts in K=V checkpoints only.
    Source: transformers `configuration_gemma4.py: Gemma4TextConfig.__post_init__`.
    """
    if raw.get("per_layer_config") is None:
        if raw.get("global_head_dim") is None:
            raise ConfigError("config.json lacks 'global_head_dim' (or per_layer_config), which the text decoder needs")
        heads = raw.get("num_global_key_value_heads") if raw.get("attention_k_eq_v") else None
        return {"head_dim": raw["global_head_dim"], "num_key_value_heads": heads}
    try:
        layers = {int(index): values for index, values in raw["per_layer_config"].items()}
    except ValueError:
        raise ConfigError("per_layer_config has keys that are not layer numbers") from None
    for index, values in layers.items():
        if index >= len(kinds) or kinds[index] != GLOBAL:
            raise ConfigError(f"per_layer_config overrides layer {index}, which is not a global layer")
        if unknown := set(values) - {"head_dim", "num_key_value_heads"}:
            raise ConfigError(f"per_layer_config sets {min(unknown)!r}; this graph knows head_dim, num_key_value_heads")
    found = [layers.get(index, {}) for index, kind in enumerate(kinds) if kind == GLOBAL]
    if any(values != found[0] for values in found):
        raise ConfigError("per_layer_config gives global layers different shapes; this graph knows one for all")
    return found[0] if found else {}


def _rope(raw: dict[str, Any] | None, kind: str, default: RopeConfig) -> RopeConfig:
    if not raw:
        return default
    rope_type = raw.get("rope_type", default.kind)
    if rope_type not in ("default", "proportional"):
        raise ConfigError(f"rope_type {rope_type!r} in {kind}; this graph knows 'default' and 'proportional'")
    return RopeConfig(
        theta=float(raw.get("rope_theta", default.theta)),
        kind=rope_type,
        rotated_fraction=float(raw.get("partial_rotary_factor", 1.0)) if rope_type == "proportional" else 1.0,
        factor=float(raw.get("factor", 1.0)),
    )


def _check(text: TextConfig, moe: bool) -> None:
    """What the published files always satisfy and the graph relies on."""
    if text.layer_types[-1] != GLOBAL:
        raise ConfigError("the last layer must be full_attention, as in every published Gemma 4")
    for name in ("num_key_value_heads", "num_global_key_value_heads"):
        if text.num_attention_heads % getattr(text, name):
            raise ConfigError(f"num_attention_heads {text.num_attention_heads} is no multiple of {name}")
    if moe and not (text.num_experts and text.moe_intermediate_size and 0 < text.top_k_experts <= text.num_experts):
        raise ConfigError("enable_moe_block is set, but num_experts, top_k_experts or moe_intermediate_size is missing")
    if not 0 <= text.num_kv_shared_layers < text.num_hidden_layers:
        raise ConfigError(f"num_kv_shared_layers {text.num_kv_shared_layers} leaves no layer with keys and values")
    own = set(text.layer_types[: text.first_shared_layer])
    for kind in text.layer_types[text.first_shared_layer :]:
        if kind not in own:
            raise ConfigError(f"a sharing layer is of kind {kind}, but no layer before it has keys and values of it")
    if text.use_bidirectional_attention not in (None, "vision"):
        raise ConfigError(f"use_bidirectional_attention {text.use_bidirectional_attention!r} is not known")
