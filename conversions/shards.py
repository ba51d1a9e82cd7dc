"""Writes a model as a folder of MLX shards: weights, index, config.json and the files that go with them.

Owns the layout mlx-lm and mlx-vlm read: keys `language_model.model.*`, `quantization` equal to
`quantization_config`, metadata {"format": "mlx"}. The folder is written beside its target and renamed when complete.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_gemma4.errors import UsageError
from mlx_gemma4.models.gemma4 import Model

# Copied as they are when the source has them.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "processor_config.json",
)


def write_model(model: Model, source: Path, target: Path, quantization: dict[str, Any] | None, dtype: str) -> None:
    """Writes `model`, loaded from folder `source`, to the new folder `target`.

    `dtype` is recorded in config.json. Raises UsageError when `target` exists.
    """
    if target.exists():
        raise UsageError(f"{target} exists; choose another folder or remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as name:
        partial = Path(name) / target.name
        partial.mkdir()
        weights = dict(tree_flatten(model.parameters()))
        shard = "model.safetensors"
        mx.save_safetensors(str(partial / shard), weights, metadata={"format": "mlx"})
        index = {
            "metadata": {"total_size": sum(w.nbytes for w in weights.values())},
            "weight_map": dict.fromkeys(sorted(weights), shard),
        }
        _write_json(partial / "model.safetensors.index.json", index)
        _write_json(partial / "config.json", _config_of(model, quantization, dtype))
        for companion in COMPANIONS:
            if (source / companion).exists():
                shutil.copy(source / companion, partial / companion)
        partial.rename(target)


def _config_of(model: Model, quantization: dict[str, Any] | None, dtype: str) -> dict[str, Any]:
    raw = {k: v for k, v in model.config.raw.items() if k not in ("quantization", "quantization_config")}
    raw["dtype"] = dtype
    # mlx-lm reads the vocabulary size here and assumes the published 262,144 otherwise.
    raw.setdefault("vocab_size", model.text_config.vocab_size)
    if quantization is not None:
        raw["quantization"] = raw["quantization_config"] = quantization
    return raw


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
