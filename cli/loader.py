"""From the model options of a command line to a loaded model, and what to tell about it.

Owns the lines that introduce a model. Leaves finding and reading it to `mlx_gemma4.loading`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

from mlx_gemma4.errors import UsageError

from .options import DEMO, token_count
from .tui.status import busy, size


def open_model(
    source: str,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    check: bool = False,
    context: str | None = None,
    ple: str = "memory",
    towers: bool = False,
) -> tuple[Any, Any]:
    """(model, tokenizer); with towers, also what it sees and hears with, read when it is first used. Shows a progress
    bar while downloading.

    Raises Gemma4Error.
    """
    limit = token_count(context, "--context") if context is not None else None
    from mlx_gemma4.loading import load

    with busy(f"loading {source}"):
        # One thread loads and runs here, so weights may wait in their files.
        lazily = "lazy" if towers else False
        model, tokenizer = load(source, revision=revision, dtype=dtype, ple=ple, towers=lazily, check=check)
    if limit is not None:
        text = model.config.text
        if limit > text.max_position_embeddings:
            raise UsageError(
                f"--context {limit:,} is more than the {text.max_position_embeddings:,} tokens of {source}"
            )
        # Only generation reads this number, to refuse what does not fit; the graph does not depend on it.
        text = dataclasses.replace(text, max_position_embeddings=limit)
        model.config = dataclasses.replace(model.config, text=text)
    return model, tokenizer


def introduction(source: str, model: Any, kv: dict[str, Any]) -> list[str]:
    """Two or three lines: what runs, how it computes, what its caches are when made with the options `kv`."""
    config = model.config
    weights = f"{config.quantization['bits']}-bit weights" if config.quantization else f"{config.dtype or '?'} weights"
    context = model.text_config.max_position_embeddings
    compute = str(model.compute_dtype).removeprefix("mlx.core.")
    lines = [f"{source} · {weights} · computes in {compute} · context {context:,} tokens"]
    if source == DEMO:
        lines.insert(0, demo_notice())
    kinds = Counter(cache.status().replace(", empty", "") for cache in model.make_cache(**kv))
    if (table := getattr(model, "disk_table", None)) is not None:
        lines.append(f"per-layer embeddings: {size(table.nbytes)} left in {table.file.name}, read as tokens come")
    lines.append("cache: " + "; ".join(f"{count} x {kind}" for kind, count in kinds.items()))
    return lines


def demo_notice() -> str:
    """Says plainly what the built-in model is."""
    from mlx_gemma4 import demo

    weights = sum(file.stat().st_size for file in Path(demo.path()).iterdir() if file.is_file())
    return (
        f"A {size(weights)} demonstration model, trained for this package: it knows mlx-gemma4, small sums, "
        "coloured shapes, beeps and what you tell it. For the real thing: gemma4 chat --model e2b"
    )
