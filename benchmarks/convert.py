"""Time and peak memory of a conversion to 4 bits: ours beside mlx-lm's and mlx-vlm's, on a random checkpoint.

    python -m benchmarks.convert --folder DIR            # writes a 6.4 GB checkpoint there, converts it by each in turn
    python -m benchmarks.convert --folder DIR --shape moe

Owns the checkpoints (true tables of E2B, true expert matrices of 26B-A4B; nothing trained), one process per side, and
the figures: wall time, processor time and the largest resident memory the kernel saw. All sides pack every matrix to 4
bits in groups of 64, ours with the package's own checks, hashes and verification, which the others do not have.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from mlx_gemma4.config import GLOBAL, SLIDING

_COMMON: dict[str, Any] = {
    "model_type": "gemma4_text",
    "vocab_size": 262_144,
    "vocab_size_per_layer_input": 262_144,
    "head_dim": 256,
    "global_head_dim": 512,
    "hidden_activation": "gelu_pytorch_tanh",
    "final_logit_softcapping": 30.0,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
    "rope_parameters": {
        GLOBAL: {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
        SLIDING: {"rope_theta": 1e4, "rope_type": "default"},
    },
}
SHAPES: dict[str, dict[str, Any]] = {
    # E2B with narrow MLPs: its embedding of 0.8 GB, its per-layer table of 4.7 GB, all its attention.
    "e2b": {
        "layer_types": ([SLIDING] * 4 + [GLOBAL]) * 7,
        "hidden_size": 1536,
        "intermediate_size": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "num_global_key_value_heads": None,
        "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 256,
        "sliding_window": 512,
        "attention_k_eq_v": False,
        "enable_moe_block": False,
    },
    # Three layers of 26B-A4B: 1.5 GB of experts each, and its embedding of 1.5 GB.
    "moe": {
        "layer_types": [SLIDING, SLIDING, GLOBAL],
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 2,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "hidden_size_per_layer_input": 0,
        "sliding_window": 1024,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
    },
}

_OURS = """
import sys
from mlx_gemma4.conversions.convert import convert
from mlx_gemma4.conversions.recipe import uniform
convert(sys.argv[1], sys.argv[2], recipe=uniform(4))
"""
_MLX_LM = """
import sys
from pathlib import Path
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
model, config = load_model(Path(sys.argv[1]), lazy=True)
model, config = quantize_model(model, config, 64, 4, quant_predicate=model.quant_predicate)
save_model(sys.argv[2], model, donate_model=True)
save_config(config, Path(sys.argv[2]) / "config.json")
"""
_MLX_VLM = """
import sys
from pathlib import Path
from mlx_vlm.quant_utils import quantize_model
from mlx_vlm.utils import load_config, load_model, save_config, save_weights, skip_multimodal_module
folder = Path(sys.argv[1])
model, config = load_model(folder, lazy=True), load_config(folder)
chosen = lambda path, module: not skip_multimodal_module(path) and model.quant_predicate(path, module)
model, config = quantize_model(model, config, 64, 4, mode="affine", quant_predicate=chosen)
save_weights(sys.argv[2], model, donate_weights=True)
save_config(config, Path(sys.argv[2]) / "config.json")
"""
SIDES = {"ours": _OURS, "mlx-lm": _MLX_LM, "mlx-vlm": _MLX_VLM}


def write_checkpoint(folder: Path, shape: str, shard_bytes: int = 5_000_000_000) -> int:
    """A checkpoint as the Hub has it, in shards, bfloat16; returns its tensor bytes. Random values, made once and
    repeated: no converter looks for that."""
    from mlx.utils import tree_flatten

    from mlx_gemma4.config import Gemma4Config
    from mlx_gemma4.models.gemma4 import Model

    text = _COMMON | SHAPES[shape]
    text["num_hidden_layers"] = len(text["layer_types"])
    raw = {"model_type": "gemma4", "text_config": text, "eos_token_id": [1, 106], "dtype": "bfloat16"}
    raw |= {"vocab_size": text["vocab_size"], "tie_word_embeddings": True}
    tensors: dict[str, tuple[int, ...]] = {}
    flat: list[Any] = tree_flatten(Model(Gemma4Config.from_dict(raw)).parameters())  # type: ignore[assignment]
    for name, value in flat:
        name, size = name.replace("language_model.model.", "model.language_model."), tuple(value.shape)
        if name.endswith(".switch_glu.up_proj.weight"):
            continue  # the second half of gate_up_proj
        if ".switch_glu." in name:
            joint = name.endswith("gate_proj.weight")
            name = name.partition(".switch_glu.")[0] + (".gate_up_proj" if joint else ".down_proj")
            size = (size[0], 2 * size[1], size[2]) if joint else size
        tensors[name] = size
    noise = np.random.default_rng(7).standard_normal(16 << 20, np.float32) * np.float32(0.03)
    block = (noise.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, size in tensors.items():
        length = 2 * int(np.prod(size))
        if shards[-1] and filled + length > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = size
        filled += length
    folder.mkdir(parents=True, exist_ok=True)
    where, total = {}, 0
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        entries, at = {}, 0
        for name, size in shard.items():
            length = 2 * int(np.prod(size))
            entries[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [at, at + length]}
            at += length
        header = json.dumps(entries).encode()
        with (folder / file).open("wb") as f:
            f.write(len(header).to_bytes(8, "little") + header)
            for begin in range(0, at, len(block)):
                f.write(block[: min(len(block), at - begin)])
        where |= dict.fromkeys(shard, file)
        total += at
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    return total


def measure(side: str, source: Path, target: Path) -> tuple[float, float, int]:
    """(wall seconds, processor seconds, peak resident bytes) of one conversion in a process of its own."""
    shutil.rmtree(target, ignore_errors=True)
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", SIDES[side], str(source), str(target)])
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - start
    if status:
        raise SystemExit(f"{side} failed")
    unit = 1 if sys.platform == "darwin" else 1024
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where to write; about 12 GB")
    parser.add_argument("--shape", choices=SHAPES, default="e2b")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    source = args.folder / args.shape
    total = write_checkpoint(source, args.shape)
    print(f"{args.shape}: {total / 1e9:.2f} GB of bfloat16")
    print("side      round  seconds  cpu seconds  peak resident GB  result GB", flush=True)
    for number in range(args.rounds):
        for side in args.sides if number % 2 == 0 else reversed(args.sides):
            target = args.folder / f"{args.shape}-{side}"
            wall, cpu, peak = measure(side, source, target)
            made = sum(p.stat().st_size for p in target.glob("*.safetensors"))
            print(
                f"{side:<9} {number:>5} {wall:>8.1f} {cpu:>12.1f} {peak / 1e9:>17.2f} {made / 1e9:>10.2f}", flush=True
            )
            shutil.rmtree(target)
    shutil.rmtree(source)


if __name__ == "__main__":
    main()
