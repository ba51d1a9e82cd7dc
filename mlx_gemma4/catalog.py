"""The names people type for Gemma 4 and the Hub repositories behind them.

Owns: family names (`e2b`, `26b-a4b-base`, ...), what each published checkpoint is (context, media,
parameter counts, bytes) and the help for a name that is none of them. Leaves folders and repository ids to
`loading.resolve`, and the network to `conversions/hub.py`.
"""

import difflib
from dataclasses import dataclass
from typing import Any

from .config import GLOBAL, SLIDING, Gemma4Config
from .errors import ModelNotFoundError

DEMO = "demo"


@dataclass(frozen=True)
class Entry:
    """One published checkpoint. The counts and sizes are those of Google's own repositories."""

    name: str  # what one types: "e2b", or "e2b-base" for the pretrained model
    repo: str  # Hub repository of the original bfloat16 weights
    context: int  # positions the model was trained for
    modalities: tuple[str, ...]  # what the checkpoint can read
    parameters: float  # billions, as published (26b-a4b and 31b: the text model)
    active: float  # billions at work per token: without embedding tables (e2b, e4b) or idle experts (26b-a4b)
    download_bytes: int  # tensors of the repository, bfloat16


# name -> repository stem, context, media, published billions, active billions, tensor bytes
_FAMILIES = {
    "e2b": ("gemma-4-E2B", 131_072, ("text", "image", "video", "audio"), 5.1, 2.3, 10_246_621_918),
    "e4b": ("gemma-4-E4B", 131_072, ("text", "image", "video", "audio"), 8.0, 4.5, 15_992_595_884),
    "26b-a4b": ("gemma-4-26B-A4B", 262_144, ("text", "image", "video"), 25.2, 3.8, 51_611_872_412),
    "31b": ("gemma-4-31B", 262_144, ("text", "image", "video"), 30.7, 30.7, 62_546_177_752),
}
_SPELLINGS = {"26b": "26b-a4b", "26ba4b": "26b-a4b", "2b": "e2b", "4b": "e4b"}


def entries() -> list[Entry]:
    """Every known checkpoint: the four instruction-tuned ones, then the four pretrained ones."""
    found = []
    for suffix, tail in (("", "-it"), ("-base", "")):
        for name, (stem, *rest) in _FAMILIES.items():
            found.append(Entry(name + suffix, f"google/{stem}{tail}", *rest))
    return found


# The fields of text_config in which the four differ; pretrained and instruction-tuned files agree in all of
# them.
_TEXT: dict[str, dict[str, Any]] = {
    "e2b": {
        "layer_types": ([SLIDING] * 4 + [GLOBAL]) * 7,
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 256,
        "sliding_window": 512,
    },
    "e4b": {
        "layer_types": ([SLIDING] * 5 + [GLOBAL]) * 7,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 18,
        "hidden_size_per_layer_input": 256,
        "sliding_window": 512,
    },
    "26b-a4b": {
        "layer_types": ([SLIDING] * 5 + [GLOBAL]) * 5,
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 2,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
        "sliding_window": 1024,
        "use_bidirectional_attention": "vision",
    },
    "31b": {
        "layer_types": ([SLIDING] * 5 + [GLOBAL]) * 10,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "num_global_key_value_heads": 4,
        "attention_k_eq_v": True,
        "sliding_window": 1024,
        "use_bidirectional_attention": "vision",
    },
}


def published_config(name: str) -> Gemma4Config:
    """The text configuration of a published checkpoint, known without downloading it.

    Raises ModelNotFoundError for a name `find` does not know.
    """
    entry = find(name)
    if entry is None:
        raise unknown(name)
    text = _TEXT[entry.name.removesuffix("-base")]
    common = {
        "model_type": "gemma4_text",
        "vocab_size": 262_144,
        "vocab_size_per_layer_input": 262_144,
        "head_dim": 256,
        "global_head_dim": 512,
        "final_logit_softcapping": 30.0,
        "max_position_embeddings": entry.context,
        "num_hidden_layers": len(text["layer_types"]),
        "dtype": "bfloat16",
    }
    return Gemma4Config.from_dict({"model_type": "gemma4", "text_config": {**common, **text}, "eos_token_id": [1, 106]})


def find(name: str) -> Entry | None:
    """The entry for a family name: any case, `gemma-4-` in front or not, `-it` or `-base` behind or not."""
    short = name.strip().lower().replace("_", "-")
    for prefix in ("gemma-4-", "gemma4-"):
        short = short.removeprefix(prefix)
    base = short.endswith(("-base", "-pt"))
    for suffix in ("-base", "-pt", "-it"):
        short = short.removesuffix(suffix)
    short = _SPELLINGS.get(short, short) + ("-base" if base else "")
    return next((e for e in entries() if e.name == short), None)


def names() -> list[str]:
    """All names one can type, the built-in model first."""
    return [DEMO, *(e.name for e in entries())]


def unknown(name: str) -> ModelNotFoundError:
    """The error for a short name that is no family name and no folder: the nearest name, and all of them."""
    short = name.lower().removeprefix("gemma-4-").removeprefix("gemma4-").removesuffix("-it")
    if short.startswith("12b"):
        hint = "the 12B is of another architecture (gemma4_unified), which this version does not run; "
    else:
        nearest = difflib.get_close_matches(short, names(), n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return ModelNotFoundError(
        f"{name!r} is no model name and no folder: {hint}known names are {', '.join(names())}; "
        "or give a folder or a Hub repository (owner/name)"
    )
