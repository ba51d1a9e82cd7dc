"""The README's memory table: cache bytes of the four published sizes at growing contexts.

Owns the table between the two `memory-table` comments of README.md. Leaves the arithmetic to `mlx_gemma4.memory` and
the shapes to `mlx_gemma4.catalog`: no weights, no network, the same figures on every machine.

    python -m benchmarks.memory_table            prints the table
    python -m benchmarks.memory_table --write    puts it into README.md
"""

import argparse
from pathlib import Path

from mlx_gemma4.catalog import published_config
from mlx_gemma4.cli.tui.status import size
from mlx_gemma4.kv_bits import request
from mlx_gemma4.memory import cache_bytes, plain_cache_bytes

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- memory-table: begin -->\n", "<!-- memory-table: end -->\n"
MODELS = {"e2b": "E2B", "e4b": "E4B", "26b-a4b": "26B-A4B", "31b": "31B"}
CONTEXTS = (8, 32, 128, 256)  # thousands of 1,024 tokens


def table() -> str:
    """Markdown, one row per size and way of remembering; one sequence, decimal units."""
    rows = ["| model | layers remember | " + " | ".join(f"{k}K" for k in CONTEXTS) + " |"]
    rows.append("|---|---|" + "---:|" * len(CONTEXTS))
    for name, title in MODELS.items():
        config = published_config(name).text
        one_vector = any(config.k_is_v(i) for i in range(config.num_hidden_layers))
        kinds = {"keys and values": plain_cache_bytes}
        if one_vector:
            kinds["one vector"] = lambda *a: cache_bytes(*a)["total"]
        kinds["**3.5 bits**"] = lambda *a: cache_bytes(*a, bits=request(3.5))["total"]
        for i, (kind, measure) in enumerate(kinds.items()):
            cells = [
                size(measure(config, k * 1024)) if k * 1024 <= config.max_position_embeddings else "-" for k in CONTEXTS
            ]
            rows.append(f"| {title if i == 0 else ''} | {kind} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def in_readme(text: str) -> str:
    """The table as it stands in the README."""
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="replace the table in README.md")
    if not parser.parse_args().write:
        print(table(), end="")
        return
    text = README.read_text(encoding="utf-8")
    README.write_text(text.replace(BEGIN + in_readme(text) + END, BEGIN + table() + END), encoding="utf-8")


if __name__ == "__main__":
    main()
