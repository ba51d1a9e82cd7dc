"""Checkpoints changed on purpose: repacked, renamed, spoiled; and how two models are compared.

Owns what `test_loading.py` and `test_bad_checkpoints.py` share. Leaves making them to `tiny.py`.
"""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import tiny
from mlx.utils import tree_flatten

from mlx_gemma4 import loading
from mlx_gemma4.errors import Gemma4Error

IDS = mx.array([[2, 108, 400, 9, 333, 107, 250, 11, 470, 64, 5, 77]])
LAYER = "language_model.model.layers.0."

PACKINGS = [
    *({"group_size": 32, "bits": b, "mode": "affine"} for b in (2, 3, 4, 5, 6, 8)),
    {"group_size": 64, "bits": 4},
    {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    {"group_size": 16, "bits": 4, "mode": "nvfp4"},
    {"group_size": 32, "bits": 8, "mode": "mxfp8"},
]


def save_packed(folder: Path, target: Path, settings: dict, choose=None, overrides=None) -> tuple[nn.Module, Path]:
    """Packs a checkpoint with MLX itself and writes it as converters do: (the packed model, its folder)."""
    model = loading.load_model(folder)
    nn.quantize(model, **settings, class_predicate=choose)
    save_as_mlx(folder, model, target)
    edit_config(target, quantization={**settings, **(overrides or {})})
    return model, target


def logits(model) -> mx.array:
    return model(IDS).astype(mx.float32)


def difference(a, b) -> float:
    return mx.max(mx.abs(logits(a) - logits(b))).item()


def one_line(error) -> str:
    text = str(error.value)
    assert isinstance(error.value, Gemma4Error) and "\n" not in text and len(text) < 500
    return text


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(folder: Path, change) -> None:
    """Replaces model.safetensors by what `change` makes of its tensors."""
    path = str(folder / "model.safetensors")
    weights = dict(mx.load(path))
    mx.eval(weights)
    mx.save_safetensors(path, change(weights))


def save_as_mlx(folder: Path, model: nn.Module, target: Path, prefix: str = "language_model.model.") -> Path:
    """The checkpoint in MLX's layout, as converters write it."""
    target.mkdir()
    for file in folder.glob("*.json*"):
        shutil.copy(file, target)
    shutil.copy(folder / "chat_template.jinja", target)
    weights = {n.replace("language_model.model.", prefix): v for n, v in tree_flatten(model.parameters())}
    tiny.write_shards(target, weights, format="mlx")
    return target
