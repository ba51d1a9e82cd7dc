"""The small files of a converted model: config.json, the index, what is copied, and the record of the conversion.

Owns the layout mlx-lm, mlx-vlm and LM Studio read: one shape of config.json, `quantization` equal to
`quantization_config`. Leaves weights to `partial.py` and the model card to `card.py`.
"""

import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

from mlx_gemma4.config import Gemma4Config
from mlx_gemma4.conversions.plan import FLOATS, Plan
from mlx_gemma4.conversions.recipe import Recipe
from mlx_gemma4.conversions.sources import Source

RECORD = "conversion.json"
INDEX = "model.safetensors.index.json"
# Copied as they are when the source has them; the last two serve media only.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
)
_FOR_MEDIA = COMPANIONS[-2:]


def config_of(config: Gemma4Config, plan: Plan, dtype: str | None, text_only: bool) -> dict[str, Any]:
    """config.json of the result.

    A text-only checkpoint (model_type gemma4_text) is wrapped as `text_config` of a gemma4 one: that is the layout
    whose tensor names every runtime shares.
    """
    raw = {k: v for k, v in config.raw.items() if k not in ("quantization", "quantization_config")}
    if config.model_type == "gemma4_text":
        outer = ("architectures", "eos_token_id", "bos_token_id", "pad_token_id", "dtype", "torch_dtype")
        raw = {k: raw[k] for k in outer if k in raw} | {"model_type": "gemma4", "text_config": raw}
        raw["tie_word_embeddings"] = config.text.tie_word_embeddings
    else:
        raw["text_config"] = dict(raw["text_config"])
    if text_only:
        # Their absence is how runtimes tell that there are no towers.
        raw.pop("vision_config", None)
        raw.pop("audio_config", None)
    if dtype is not None or config.dtype is None:
        kinds = {kind: name for name, kind in FLOATS.items()}
        name = dtype or kinds[plan.items[0].dtype]
        raw.pop("torch_dtype", None)
        raw["dtype"] = raw["text_config"]["dtype"] = name
    # mlx-lm reads the vocabulary size here and assumes the published 262,144 otherwise.
    raw.setdefault("vocab_size", config.text.vocab_size)
    quantization = plan.quantization()
    if quantization is not None:
        raw["quantization"] = raw["quantization_config"] = quantization
    return raw


def index_of(plan: Plan) -> dict[str, Any]:
    where = {name: plan.files[place.shard] for name, place in plan.places.items()}
    return {"metadata": {"total_size": plan.tensor_bytes}, "weight_map": dict(sorted(where.items()))}


def companions(folder: Path, text_only: bool) -> dict[str, bytes]:
    """The files of the source that go with the weights, by name."""
    names = [n for n in COMPANIONS if not (text_only and n in _FOR_MEDIA)]
    return {n: (folder / n).read_bytes() for n in names if (folder / n).is_file()}


def record_of(
    source: Source, plan: Plan, recipe: Recipe, options: dict[str, Any], hashes: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """conversion.json: what was made of what and how, and every file's length and SHA-256. No dates, no local paths."""
    parameters = parameters_of(plan)
    packed = [i for i in plan.items if i.packing is not None]
    return {
        "converter": {"mlx-gemma4": metadata.version("mlx-gemma4"), "mlx": metadata.version("mlx")},
        "source": {"name": source.repo or Path(source.name).name, "commit": source.commit},
        "recipe": {"name": recipe.name, "description": recipe.description},
        "options": options,
        "tensors": sum(len(item.outputs) for item in plan.items),
        "packed_matrices": len(packed),
        "q4_0_matrices": sum(item.q4_0 for item in plan.items),
        "parameters": parameters,
        "bits_per_parameter": round(plan.tensor_bytes * 8 / parameters, 3),
        "files": hashes,
    }


def parameters_of(plan: Plan) -> int:
    return sum(item.rows * item.columns for item in plan.items)


def hashed(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
