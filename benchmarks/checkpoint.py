"""Mid-size random checkpoints with Gemma 4's true head widths, for benchmarks: MLX folders every runtime loads.

    python -m benchmarks.checkpoint FOLDER --shape e-family --weights 4bit --dtype float32

Owns the shapes and the writing; nothing here is trained, so the text such a model writes means nothing.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from mlx_gemma4.config import GLOBAL, SLIDING, Gemma4Config
from mlx_gemma4.conversions.convert import convert
from mlx_gemma4.conversions.recipe import uniform
from mlx_gemma4.models.gemma4 import Model

SHAPES: dict[str, dict[str, Any]] = {
    # E2B in small: per-layer embeddings, one KV head, sharing layers with a double-wide MLP.
    "e-family": {
        "layer_types": [SLIDING] * 4 + [GLOBAL] + [SLIDING] * 4 + [GLOBAL],
        "num_kv_shared_layers": 4,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 64,
        "num_key_value_heads": 1,
        "sliding_window": 512,
        "intermediate_size": 1536,
    },
    # 31B in small: K=V global layers.
    "dense": {
        "layer_types": [SLIDING] * 5 + [GLOBAL],
        "attention_k_eq_v": True,
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 1,
        "sliding_window": 1024,
        "intermediate_size": 1536,
    },
    # 26B-A4B in small: the same with experts.
    "moe": {
        "layer_types": [SLIDING] * 5 + [GLOBAL],
        "attention_k_eq_v": True,
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 1,
        "sliding_window": 1024,
        "intermediate_size": 768,
        "enable_moe_block": True,
        "num_experts": 16,
        "top_k_experts": 4,
        "moe_intermediate_size": 256,
    },
}


def config_of(shape: str) -> dict[str, Any]:
    """config.json of a text-only checkpoint of this shape."""
    base: dict[str, Any] = {
        "model_type": "gemma4_text",
        "vocab_size": 8192,
        "vocab_size_per_layer_input": 8192,
        "hidden_size": 512,
        "hidden_size_per_layer_input": 0,
        "num_attention_heads": 8,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "num_global_key_value_heads": None,
        "attention_k_eq_v": False,
        "enable_moe_block": False,
        "head_dim": 256,
        "global_head_dim": 512,
        "max_position_embeddings": 131072,
        "final_logit_softcapping": 30.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_parameters": {
            GLOBAL: {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
            SLIDING: {"rope_theta": 1e4, "rope_type": "default"},
        },
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    base.update(SHAPES[shape])
    base["num_hidden_layers"] = len(base["layer_types"])
    return base


def write_checkpoint(folder: Path, shape: str, weights: str, dtype: str) -> None:
    """`weights` is "plain" or "4bit" (affine, groups of 64); `dtype` is what weights and scales are stored in."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = config_of(shape)
    mx.random.seed(7)
    model = Model(Gemma4Config.from_dict(raw))
    # Calm q and k norms: random deep networks amplify any rounding otherwise.
    for layer in model.layers:
        for norm in ("q_norm", "k_norm"):
            if norm in layer.self_attn:
                layer.self_attn[norm].weight = layer.self_attn[norm].weight * 0.1
    model.update(tree_map(lambda a: a.astype(getattr(mx, dtype)), model.parameters()))
    raw["dtype"] = dtype
    save(folder, raw, model, weights == "4bit")


def save(folder: Path, raw: dict[str, Any], model: Model, packed: bool) -> None:
    """Writes a model into an existing folder; `packed`: by our converter, every matrix in 4 bits, groups of 64."""
    plain = folder / "plain" if packed else folder
    plain.mkdir(exist_ok=True)
    # A text-only checkpoint has no outer model: keys `model.*`.
    arrays = {k.removeprefix("language_model."): v for k, v in tree_flatten(model.parameters())}
    mx.save_safetensors(str(plain / "model.safetensors"), arrays, metadata={"format": "mlx"})
    (plain / "config.json").write_text(json.dumps(raw, indent=2))
    if packed:
        convert(plain, folder / "packed", recipe=uniform(4))
        shutil.rmtree(plain)
        for file in (folder / "packed").iterdir():
            file.rename(folder / file.name)
        (folder / "packed").rmdir()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="e-family")
    parser.add_argument("--weights", choices=("plain", "4bit"), default="plain")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    write_checkpoint(args.folder, args.shape, args.weights, args.dtype)
    print(args.folder)
