"""Tensor names: the Hub's layout to MLX's, the layout mlx-lm and mlx-vlm read.

    model.language_model.layers.0.self_attn.q_proj.weight -> language_model.model.layers.0.self_attn.q_proj.weight
    model.vision_tower.x -> vision_tower.x                  model.embed_vision.x -> embed_vision.x
    ...experts.gate_up_proj [E, 2F, H] -> ...experts.switch_glu.{gate,up}_proj.weight [E, F, H] each
    ...experts.down_proj -> ...experts.switch_glu.down_proj.weight

Owns the mapping and which tensors a graph does not use. Idempotent: names already in MLX's layout stay.
"""

import re

import mlx.core as mx

from mlx_gemma4.config import Gemma4Config

TOWERS = ("vision_tower.", "embed_vision.", "audio_tower.", "embed_audio.")
# Keys and values a sharing layer never reads, yet the published files still carry.
_SHARED_UNUSED = re.compile(r"\.layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm)\.")


def to_mlx_name(name: str) -> str:
    """The MLX name of a checkpoint tensor; for `experts.gate_up_proj` see `sanitize`."""
    if name.startswith("model.language_model."):
        name = "language_model.model." + name.removeprefix("model.language_model.")
    elif name.startswith("model.") and name.removeprefix("model.").startswith(TOWERS):
        name = name.removeprefix("model.")
    elif name.startswith("model."):
        name = "language_model." + name  # a text-only checkpoint
    elif name.startswith("lm_head."):
        name = "language_model." + name
    if name.endswith(".experts.down_proj"):
        name = name.removesuffix("down_proj") + "switch_glu.down_proj.weight"
    return name


def is_tower(mlx_name: str) -> bool:
    return mlx_name.startswith(TOWERS)


def is_unused(mlx_name: str, config: Gemma4Config) -> bool:
    """Whether no graph reads this tensor: keys and values of sharing layers, a tied head, rotary buffers."""
    if "rotary_emb" in mlx_name:
        return True
    if mlx_name == "language_model.lm_head.weight":
        return config.text.tie_word_embeddings
    found = _SHARED_UNUSED.search(mlx_name)
    return (
        found is not None
        and mlx_name.startswith("language_model.")
        and int(found.group(1)) >= config.text.first_shared_layer
    )


def sanitize(weights: dict[str, mx.array], config: Gemma4Config, towers: tuple[str, ...] = ()) -> dict[str, mx.array]:
    """A graph's tensors under its own names, from either layout; unused tensors are left out.

    towers: those of `TOWERS` the graph has besides the text decoder; the others are left out, too.
    """
    out: dict[str, mx.array] = {}
    for name, value in weights.items():
        name = to_mlx_name(name)
        if (is_tower(name) and not name.startswith(towers)) or is_unused(name, config):
            continue
        if name.endswith(".experts.gate_up_proj"):
            base = name.removesuffix("gate_up_proj") + "switch_glu."
            gate, up = mx.split(value, 2, axis=-2)
            out[base + "gate_proj.weight"], out[base + "up_proj.weight"] = gate, up
        else:
            out[name] = value
    return out
