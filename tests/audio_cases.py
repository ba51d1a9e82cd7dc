"""Tiny audio towers and sounds that any machine makes alike, for the audio tests and their references.

Owns the cases of `fixtures/audio/`, the weights of a tower from a seed, and sounds by integer arithmetic. What is in
the fixtures and how they were made: `fixtures/make_audio.py`.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import recipe

from mlx_gemma4.config_audio import AudioConfig
from mlx_gemma4.models.audio import AudioTower, channels_last
from mlx_gemma4.models.tower_parts import Projector

FOLDER = Path(__file__).parent / "fixtures" / "audio"
TEXT_WIDTH = 32
RATE = 16_000

_BOTH = {"model_type": "gemma4_audio", "hidden_act": "silu", "attention_context_right": 0}
_BOTH |= {"attention_invalid_logits_value": -1e9, "output_proj_dims": 24}
CASES: dict[str, dict[str, Any]] = {
    # As E2B and E4B, narrower.
    "published": _BOTH
    | {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "subsampling_conv_channels": [128, 4]}
    | {"attention_chunk_size": 12, "attention_context_left": 13, "attention_logit_cap": 50.0, "conv_kernel_size": 5}
    | {"residual_weight": 0.5, "rms_norm_eps": 1e-6, "gradient_clipping": 1e10, "use_clipped_linears": True},
    # Every number another, the cap and the bound on activations so small that they act, no clipped linears.
    "other": _BOTH
    | {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "subsampling_conv_channels": [128, 6]}
    | {"attention_chunk_size": 5, "attention_context_left": 6, "attention_logit_cap": 2.0, "conv_kernel_size": 3}
    | {"residual_weight": 0.7, "rms_norm_eps": 1e-5, "gradient_clipping": 1.5, "use_clipped_linears": False},
}
# Samples of the clips, in one batch: the lengths the tower is asked about, the shortest with a frame, and some whose
# last frame is not the first of its token.
SAMPLES = [3_200, 16_000, 160_000, 478_400, 161, 20_801, 9_000]
# Rows of a clip's features that are kept: every so many, and the last ones.
STEP, LAST = 37, 3


def sound(samples: int, seed: int = 0) -> np.ndarray:
    """float32 [samples] in [-1, 1]: a triangle that climbs in steps, noise, and gaps of silence."""
    t = np.arange(samples, dtype=np.int64)
    period = 40 + 8 * ((t // 4_000 + seed) % 9)
    triangle = np.abs(2 * (t % period) - period) / period - 0.5
    noise = recipe.uniform("sound", (samples,), seed) - 0.5
    loud = (t // 2_500 + seed) % 4 != 3
    return ((0.5 * triangle + 0.2 * noise) * loud).astype(np.float32)


def kept(count: int) -> np.ndarray:
    """The rows of which references are kept, of `count`."""
    return np.unique([*range(0, count, STEP), *range(max(0, count - LAST), count)])


def shapes(case: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of tower and projector as the Hub's files have them, less the leading `model.`."""
    raw = CASES[case]
    E, (c0, c1), a = raw["hidden_size"], raw["subsampling_conv_channels"], "audio_tower."
    s = a + "subsample_conv_projection."
    out: dict[str, tuple[int, ...]] = {
        s + "layer0.conv.weight": (c0, 1, 3, 3),
        s + "layer0.norm.weight": (c0,),
        s + "layer1.conv.weight": (c1, c0, 3, 3),
        s + "layer1.norm.weight": (c1,),
        s + "input_proj_linear.weight": (E, c0 // 4 * c1),
        a + "output_proj.weight": (raw["output_proj_dims"], E),
        a + "output_proj.bias": (raw["output_proj_dims"],),
        "embed_audio.embedding_projection.weight": (TEXT_WIDTH, raw["output_proj_dims"]),
    }
    linears = {f"feed_forward{i}.ffw_layer_{j}": (4 * E, E) if j == 1 else (E, 4 * E) for i in (1, 2) for j in (1, 2)}
    linears |= {f"self_attn.{name}": (E, E) for name in ("q_proj", "k_proj", "v_proj", "post")}
    linears |= {"lconv1d.linear_start": (2 * E, E), "lconv1d.linear_end": (E, E)}
    norms = [f"feed_forward{i}.{place}_layer_norm" for i in (1, 2) for place in ("pre", "post")]
    norms += ["lconv1d.pre_layer_norm", "lconv1d.conv_norm", "norm_pre_attn", "norm_post_attn", "norm_out"]
    for i in range(raw["num_hidden_layers"]):
        p = f"{a}layers.{i}."
        for name, shape in linears.items():
            out[f"{p}{name}.linear.weight"] = shape
            if raw["use_clipped_linears"]:
                out |= {f"{p}{name}.{side}_{end}": () for side in ("input", "output") for end in ("min", "max")}
        out |= {f"{p}{name}.weight": (E,) for name in norms}
        out[p + "self_attn.relative_k_proj.weight"] = (E, E)
        out[p + "self_attn.per_dim_scale"] = (E // raw["num_attention_heads"],)
        out[p + "lconv1d.depthwise_conv1d.weight"] = (E, 1, raw["conv_kernel_size"])
    return out


def weights(case: str, seed: int = 0) -> dict[str, np.ndarray]:
    """float32, every value a bfloat16; bounds that do clip, and each of them another."""
    out = {}
    for name, shape in shapes(case).items():
        if name.endswith(("_min", "_max")):
            x = (0.8 + recipe.uniform(name, shape, seed)) * (-1 if name.endswith("_min") else 1)
        elif name.endswith(("per_dim_scale", ".bias")):
            x = recipe.normal(name, shape, seed)
        elif "norm" in name:
            x = 1 + 0.2 * recipe.normal(name, shape, seed)
        else:
            x = recipe.normal(name, shape, seed) / np.sqrt(np.prod(shape[1:]))
        out[name] = recipe.to_bfloat16(x).reshape(shape)
    return out


def build(case: str, seed: int = 0, dtype: mx.Dtype = mx.float32) -> tuple[AudioTower, Projector]:
    """Our tower and projector on these weights."""
    config = AudioConfig.from_dict(CASES[case])
    tower, projector = AudioTower(config), Projector(config.output_proj_dims, TEXT_WIDTH, config.rms_norm_eps)
    found = channels_last({name: mx.array(value).astype(dtype) for name, value in weights(case, seed).items()})
    for module, prefix in ((tower, "audio_tower."), (projector, "embed_audio.")):
        mine = [(n.removeprefix(prefix), v) for n, v in found.items() if n.startswith(prefix)]
        module.load_weights(mine, strict=True)
    return tower, projector


def relative(found: np.ndarray, truth: np.ndarray) -> float:
    """Largest absolute difference over the truth's root mean square; NaN counts as infinite."""
    assert found.shape == truth.shape, (found.shape, truth.shape)
    worst = np.abs(found.astype(np.float64) - truth).max() / np.sqrt(np.mean(np.square(truth, dtype=np.float64)))
    return float(np.nan_to_num(worst, nan=np.inf))
