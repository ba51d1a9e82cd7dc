"""`gemma4 cache-size`: what a conversation of a given length keeps in memory, from shapes alone.

Owns the table. Leaves the arithmetic to `mlx_gemma4.memory`, the published shapes to `mlx_gemma4.catalog`.
Needs no weights and no network.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_gemma4.errors import UsageError

from . import options
from .tui.status import size
from .tui.stream import wants_style

if TYPE_CHECKING:
    from mlx_gemma4.config import Gemma4Config

# Width in bytes of what a cache element is stored as.
_DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}

APART = "keys and values apart"
TABLE = "cos/sin table, once per model"


def command(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="e2b, e4b, 26b-a4b, 31b, demo or a folder. Default: the four."),
    ] = None,
    context: Annotated[
        str, typer.Option(metavar="N,N,...", help="Context lengths in tokens; 1k is 1,024.")
    ] = "1k,8k,32k",
    dtype: Annotated[str, typer.Option(metavar="TYPE", help=f"Cache type: {', '.join(_DTYPES)}.")] = "bfloat16",
    kv_bits: options.KvBits = None,
    kv_key_bits: options.KvKeyBits = None,
    kv_value_bits: options.KvValueBits = None,
    kv_bits_sliding: options.KvBitsSliding = None,
    kv_mode: options.KvMode = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, in bytes.")] = False,
) -> None:
    """Cache bytes of a conversation at given lengths, without weights."""
    from mlx_gemma4 import memory

    if dtype not in _DTYPES:
        raise UsageError(f"--dtype takes {', '.join(_DTYPES)}, not {dtype!r}")
    bits = options.kv_request(kv_bits, kv_key_bits, kv_value_bits, kv_bits_sliding, kv_mode)
    lengths = [options.token_count(part, "--context") for part in context.split(",")]
    table: dict[str, dict[int, dict[str, int]]] = {}
    for name in models or ["e2b", "e4b", "26b-a4b", "31b"]:
        text = config_of(name).text
        for length in lengths:
            if length > text.max_position_embeddings:
                raise UsageError(
                    f"--context {length:,} is more than the {text.max_position_embeddings:,} tokens of {name}"
                )
        table[name] = {}
        for length in lengths:
            kinds = memory.cache_bytes(text, length, _DTYPES[dtype], bits)
            apart = memory.plain_cache_bytes(text, length, _DTYPES[dtype])
            turns = memory.rotary_table_bytes(text, length, bits)
            table[name][length] = kinds | {TABLE: turns, APART: apart}
    if as_json:
        print(json.dumps({"dtype": dtype, "kv_bits": dataclasses.asdict(bits), "bytes": table}))
        return
    _print(_rows(table), [f"{n:,}" for n in lengths])


def config_of(name: str) -> Gemma4Config:
    """The shapes of a folder, of the built-in model or of a published family; nothing is downloaded."""
    from pathlib import Path

    from mlx_gemma4 import catalog
    from mlx_gemma4.config import Gemma4Config

    if Path(name).is_dir():
        return Gemma4Config.from_folder(name)
    if name == options.DEMO:
        from mlx_gemma4 import demo

        return Gemma4Config.from_folder(demo.path())
    entry = catalog.find(name)
    if entry is None:
        raise catalog.unknown(name)
    return catalog.published_config(entry.name)


def _rows(table: dict[str, dict[int, dict[str, int]]]) -> list[list[str]]:
    """[model, kind, bytes at each length]: the kinds of cache the model has, their total, beside it the table
    that one-vector layers share, and for comparison what storing keys and values apart would take, where more."""
    rows = []
    for name, by_length in table.items():
        columns = list(by_length.values())
        kinds = [kind for kind in columns[0] if any(c[kind] for c in columns)]
        if all(c[APART] == c["total"] for c in columns):
            kinds.remove(APART)
        for i, kind in enumerate(kinds):
            label = f"({kind})" if kind in (APART, TABLE) else kind
            rows.append([name if i == 0 else "", label, *(size(c[kind]) for c in columns)])
    return rows


def _print(rows: list[list[str]], lengths: list[str]) -> None:
    head = ["model", "cache", *lengths]
    if wants_style(sys.stdout):
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, header_style="bold", pad_edge=False)
        for i, title in enumerate(head):
            table.add_column(title, justify="left" if i < 2 else "right")
        for row in rows:
            table.add_row(*row, style={"total": "bold", f"({APART})": "dim", f"({TABLE})": "dim"}.get(row[1]))
        Console().print(table)
        return
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        cells = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(cells).rstrip())
