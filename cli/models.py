"""`gemma4 list` and `gemma4 info`: which models there are and what one consists of.

Owns the two tables. Leaves names to `mlx_gemma4.catalog`, shapes to `mlx_gemma4.config`; downloads nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cache_size import config_of
from .tui.status import size

if TYPE_CHECKING:
    from mlx_gemma4.config import Gemma4Config

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def list_models(as_json: AsJson = False) -> None:
    """The models this package knows by name, and which of them are in the Hub cache of this machine."""
    from huggingface_hub import try_to_load_from_cache

    from mlx_gemma4 import catalog

    records = [
        {
            "name": e.name,
            "repository": e.repo,
            "context": e.context,
            "modalities": list(e.modalities),
            "parameters": e.parameters,
            "download_bytes": e.download_bytes,
            "cached": isinstance(try_to_load_from_cache(e.repo, "config.json"), str),
        }
        for e in catalog.entries()
    ]
    if as_json:
        print(json.dumps(records))
        return
    print(f"{'name':<13} {'parameters':>10} {'download':>9} {'context':>8}  repository")
    print(f"{'demo':<13} {'':>10} {'':>9} {'':>8}  in this package, no download")
    for r in records:
        here = "  (on this machine)" if r["cached"] else ""
        print(
            f"{r['name']:<13} {r['parameters']:>9}B {size(r['download_bytes']):>9} {r['context'] // 1024:>7}k"
            f"  {r['repository']}{here}"
        )


def _modalities(model: str, config: Gemma4Config) -> list[str]:
    """What the checkpoint has towers for; this version uses its text part."""
    from mlx_gemma4 import catalog

    entry = catalog.find(model)
    if entry is not None:
        return list(entry.modalities)
    return ["text", *(["image", "video"] if config.vision else []), *(["audio"] if config.audio else [])]


def _converted(model: str) -> str | None:
    """What a converted folder's record says: source, recipe, bits, converter; None where there is no record."""
    if not Path(model).is_dir():
        return None
    from mlx_gemma4.conversions.verify import record_of

    record = record_of(Path(model))
    if record is None:
        return None
    source = record["source"]["name"] + (f" at {record['source']['commit'][:12]}" if record["source"]["commit"] else "")
    return (
        f"from {source}, recipe {record['recipe']['name']}, {record['bits_per_parameter']:.2f} bits per parameter, "
        f"mlx-gemma4 {record['converter']['mlx-gemma4']}"
    )


def _table(model: str, config: Gemma4Config) -> str | None:
    """Where the per-layer embedding table lies; None where there is none, or no shard of the model on this machine."""
    from mlx_gemma4.loading import locate, shards
    from mlx_gemma4.ple_disk import describe

    folder = locate(model)
    if not config.text.hidden_size_per_layer_input or not isinstance(folder, Path):
        return None
    if not any(folder.glob("*.safetensors")):
        return None
    file, nbytes = describe(shards(folder))
    return f"{size(nbytes)} in {file.name}; --ple disk leaves it there"


def info(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="e2b, e4b, 26b-a4b, 31b, demo or a folder.")] = "demo",
    as_json: AsJson = False,
) -> None:
    """What a model consists of, from its config.json; no weights are read."""
    config = config_of(model)
    text = config.text
    record = {
        "model": model,
        "layers": text.num_hidden_layers,
        "sliding_layers": sum(text.is_sliding(i) for i in range(text.num_hidden_layers)),
        "layers_sharing_keys_and_values": text.num_kv_shared_layers,
        "hidden_size": text.hidden_size,
        "attention_heads": text.num_attention_heads,
        "key_value_heads": [text.num_key_value_heads, text.num_global_key_value_heads],
        "head_width": [text.head_dim, text.global_head_dim],
        "one_vector_for_key_and_value": text.attention_k_eq_v,
        "experts": [text.num_experts, text.top_k_experts],
        "per_layer_embedding": text.hidden_size_per_layer_input,
        "per_layer_embedding_table": _table(model, config),
        "vocabulary": text.vocab_size,
        "window": text.sliding_window,
        "context": text.max_position_embeddings,
        "weights": config.dtype,
        "quantization": {k: v for k, v in (config.quantization or {}).items() if not isinstance(v, dict)} or None,
        "reads": _modalities(model, config),
        "converted": _converted(model),
    }
    if as_json:
        print(json.dumps(record))
        return
    for name, value in record.items():
        if isinstance(value, bool):
            shown = "yes" if value else "no"
        elif isinstance(value, list):
            shown = " / ".join(v if isinstance(v, str) else f"{v:,}" for v in value)
        elif isinstance(value, int):
            shown = f"{value:,}"
        else:
            shown = str(value) if value is not None else "none"
        print(f"{name.replace('_', ' '):<31} {shown}")
