"""Tiny vision towers and pictures that any machine makes alike, for the vision tests and their references.

Owns the cases of `fixtures/vision/`, the weights of a tower from a seed, and pictures by formula. What is in the
fixtures and how they were made: `fixtures/make_vision.py`.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import recipe

from mlx_gemma4.config_vision import VisionConfig
from mlx_gemma4.models.tower_parts import Projector
from mlx_gemma4.models.vision import VisionTower

FOLDER = Path(__file__).parent / "fixtures" / "vision"
TEXT_WIDTH = 32

_BOTH = {"model_type": "gemma4_vision", "hidden_activation": "gelu_pytorch_tanh", "patch_size": 16}
_BOTH |= {"pooling_kernel_size": 3, "rms_norm_eps": 1e-6, "rope_parameters": {"rope_theta": 100.0}}
# As E2B and E4B, and as 26B and 31B: heads whose quarters are even, and (72 = 4 * 18) not multiples of 4.
CASES: dict[str, dict[str, Any]] = {
    "clipped": _BOTH
    | {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3}
    | {"num_key_value_heads": 3, "head_dim": 16, "position_embedding_size": 256, "use_clipped_linears": True},
    "standardized": _BOTH
    | {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 2}
    | {"num_key_value_heads": 2, "head_dim": 24, "position_embedding_size": 256, "standardize": True},
}
# Patch grids (rows, columns): square, tall, wide, the smallest, and one strip.
GRIDS = [(6, 6), (12, 3), (3, 15), (3, 3), (9, 12), (6, 6)]

# (height, width, tokens) of pictures whose patches are kept: smaller, larger, thin, and just as large as the budget.
PICTURES = [(120, 200, 70), (64, 64, 70), (500, 90, 140), (333, 777, 280), (384, 384, 70), (1, 1, 70), (7, 900, 140)]
# Every so many patches of those.
STEP = 61


def shapes(case: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of tower and projector as the Hub's files have them, less the leading `model.`."""
    raw = CASES[case]
    E, inner, D = raw["hidden_size"], raw["intermediate_size"], raw["head_dim"]
    v = "vision_tower."
    out: dict[str, tuple[int, ...]] = {
        v + "patch_embedder.input_proj.weight": (E, 3 * raw["patch_size"] ** 2),
        v + "patch_embedder.position_embedding_table": (2, raw["position_embedding_size"], E),
        "embed_vision.embedding_projection.weight": (TEXT_WIDTH, E),
    }
    if raw.get("standardize"):
        out |= {v + "std_bias": (E,), v + "std_scale": (E,)}
    for i in range(raw["num_hidden_layers"]):
        p = f"{v}encoder.layers.{i}."
        linears = dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), (E, E))
        linears |= {"self_attn.o_proj": (E, E), "mlp.gate_proj": (inner, E), "mlp.up_proj": (inner, E)}
        linears["mlp.down_proj"] = (E, inner)
        for name, shape in linears.items():
            out[f"{p}{name}.linear.weight"] = shape
            if raw.get("use_clipped_linears"):
                out |= {f"{p}{name}.{side}_{end}": () for side in ("input", "output") for end in ("min", "max")}
        out |= {f"{p}self_attn.{name}_norm.weight": (D,) for name in "qk"}
        for place in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            out[f"{p}{place}_layernorm.weight"] = (E,)
    return out


def weights(case: str, seed: int = 0) -> dict[str, np.ndarray]:
    """float32, every value a bfloat16; bounds that do clip, and each of them another."""
    out = {}
    for name, shape in shapes(case).items():
        if name.endswith(("_min", "_max")):
            # What reaches the last linear of a layer is smaller, and hardly negative.
            size = 0.2 if ".down_proj." in name else 1.0
            x = size * (0.8 + recipe.uniform(name, shape, seed)) * (-1 if name.endswith("_min") else 1)
        elif name.endswith("position_embedding_table"):
            x = 0.5 * recipe.normal(name, shape, seed)
        elif name.endswith("std_scale"):
            x = 0.05 + 0.1 * recipe.uniform(name, shape, seed)
        elif name.endswith("std_bias"):
            x = recipe.normal(name, shape, seed)
        else:
            out[name] = recipe.tensor(name, shape, seed, qk_norm=1.0)
            continue
        out[name] = recipe.to_bfloat16(np.asarray(x)).reshape(shape)  # of a bound: no axis
    return out


def build(case: str, seed: int = 0, dtype: mx.Dtype = mx.float32) -> tuple[VisionTower, Projector]:
    config = VisionConfig.from_dict(CASES[case])
    tower, projector = VisionTower(config), Projector(config.hidden_size, TEXT_WIDTH, config.rms_norm_eps)
    parts: dict[str, list] = {"vision_tower": [], "embed_vision": []}
    for name, value in weights(case, seed).items():
        part, _, rest = name.partition(".")
        parts[part].append((rest, mx.array(value).astype(dtype)))
    tower.load_weights(parts["vision_tower"], strict=True)
    projector.load_weights(parts["embed_vision"], strict=True)
    return tower, projector


def grid(rows: int, columns: int) -> np.ndarray:
    """(x, y) of each patch, int32 [rows * columns, 2]."""
    y, x = np.mgrid[0:rows, 0:columns].astype(np.int32)
    return np.stack([x.ravel(), y.ravel()], axis=-1)


def patches(rows: int, columns: int, seed: int) -> np.ndarray:
    """uint8 [rows * columns, 768], noise."""
    count = rows * columns * 768
    return (recipe.uniform(f"patches {rows}x{columns}", (count,), seed) * 256).astype(np.uint8).reshape(-1, 768)


def picture(height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]: two ramps and fine stripes."""
    y, x = np.mgrid[0:height, 0:width]
    ramps = x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), (x * 7 + y * 13 + 5) % 256
    return np.stack(ramps, axis=-1).astype(np.uint8)


def relative(ours: mx.array | np.ndarray, reference: np.ndarray) -> float:
    """Largest difference as a share of the reference's root mean square; NaN counts as infinite."""
    ours = np.array(ours.astype(mx.float32)) if isinstance(ours, mx.array) else ours
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    worst = np.abs(ours.astype(np.float64) - reference).max() / rms(reference)
    return float(np.nan_to_num(worst, nan=np.inf))


def spread(ours: mx.array | np.ndarray, reference: np.ndarray) -> float:
    """Root mean square of the difference as a share of the reference's."""
    ours = np.array(ours.astype(mx.float32)) if isinstance(ours, mx.array) else ours
    return rms(ours.astype(np.float64) - reference) / rms(reference)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))
