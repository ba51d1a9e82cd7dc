"""Trains the codec's tables and measures them: `python -m mlx_gemma4.kernels.codebooks.train [NAME ...]`.

Owns `codebooks.safetensors` and `distortion.json` beside it; without names all are trained, two to four minutes for
each trellis on one core. Not part of an installed package.

After the rotation a row's coordinates are close to independent standard normals whatever the row was, so tables are
trained on normals and serve every width and model.

    paper     Lloyd-Max (Lloyd 1982, Max 1960) on the exact density, first coordinate ceil(bits), second floor(bits)
    pairs     Linde-Buzo-Gray (1980) on samples, from the best of several starts
    trellis   the same two steps with a path for a nearest entry: encode rows by Viterbi, move every entry to the mean
              of the pairs coded by it

Means are kept over passes with a growing memory, so that each pass can see fresh and few samples (Cappe and Moulines
2009, online EM).
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np

from mlx_gemma4.kernels import turboquant
from mlx_gemma4.kernels.reference.turboquant import ROWS, best_path

HERE = Path(__file__).resolve().parent
STEPS = 256  # pairs per training row: the widest head


def lloyd_max(levels: int, tolerance: float = 1e-12) -> np.ndarray:
    """The scalar quantiser of least squared error for a standard normal: float64 [levels], ascending."""
    grid = np.linspace(-8, 8, 1 << 17)
    density = np.exp(-(grid**2) / 2)
    mass, moment = np.append(0, np.cumsum(density)), np.append(0, np.cumsum(density * grid))
    centres = np.quantile(np.repeat(grid, np.round(density * 100).astype(int)), (np.arange(levels) + 0.5) / levels)
    while True:
        edges = np.searchsorted(grid, (centres[1:] + centres[:-1]) / 2)
        edges = np.concatenate([[0], edges, [len(grid)]])
        moved = np.diff(moment[edges]) / np.diff(mass[edges])
        if np.abs(moved - centres).max() < tolerance:
            return moved
        centres = moved


def paper_table(pair_bits: int) -> np.ndarray:
    """Product of two scalar quantisers, float32 [2**pair_bits, 2]; the first coordinate gets the odd bit."""
    first, second = lloyd_max(1 << -(-pair_bits // 2)), lloyd_max(1 << pair_bits // 2)
    return np.stack(np.meshgrid(first, second, indexing="ij"), axis=-1).reshape(-1, 2).astype(np.float32)


def normals(rng: np.random.Generator, rows: int) -> mx.array:
    return mx.array(rng.standard_normal((rows, STEPS, 2), dtype=np.float32))


def assign(pairs: mx.array, table: np.ndarray, pair_bits: int) -> np.ndarray:
    """Indices of the entries that code pairs [R, T, 2], slab by slab: [R * T]."""
    codebook, out = mx.array(table), []
    for start in range(0, pairs.shape[0], ROWS):
        out.append(np.array(best_path(pairs[start : start + ROWS], codebook, pair_bits)).ravel())
    return np.concatenate(out)


def sums(pairs: np.ndarray, index: np.ndarray, entries: int) -> np.ndarray:
    """Count, and sums of both coordinates, of the pairs [N, 2] coded by each entry: [entries, 3]."""
    weights = (None, pairs[:, 0], pairs[:, 1])
    return np.stack([np.bincount(index, w, entries) for w in weights], axis=-1)


def refine(
    table: np.ndarray, pair_bits: int, rng: np.random.Generator, passes: int, rows: int, memory: float = 0.0
) -> tuple[np.ndarray, float]:
    """`passes` of encoding fresh normals and moving entries to their means; -> (table, last relative error).

    memory: how much of the sums of earlier passes is kept at the end; it grows from none over the first half.
    """
    kept = np.zeros((len(table), 3))
    error = math.inf
    for n in range(passes):
        batch = normals(rng, rows)
        index, pairs = assign(batch, table, pair_bits), np.array(batch).reshape(-1, 2)
        error = float(np.square(pairs - table[index]).mean() / np.square(pairs).mean())
        kept = kept * memory * min(1.0, 2 * n / passes) + sums(pairs, index, len(table))
        seen = kept[:, 0] > 0.5
        table = table.copy()
        table[seen] = kept[seen, 1:] / kept[seen, :1]
    return table, error


def trained(pair_bits: int, window_bits: int, starts: int, passes: int, rows: int) -> np.ndarray:
    """The best of several starts from random normals, then refined: float32 [2**window_bits, 2]."""
    first = []
    for seed in range(starts):
        rng = np.random.default_rng(seed)
        table = rng.standard_normal((1 << window_bits, 2)).astype(np.float32)
        first.append(refine(table, pair_bits, rng, max(4, passes // 4), rows, memory=0.8))
    table, _ = min(first, key=lambda found: found[1])
    return refine(table, pair_bits, np.random.default_rng(starts), passes, rows, memory=0.97)[0]


def recipes() -> dict[str, Callable[[], np.ndarray]]:
    """Name -> how its table is made."""
    made: dict[str, Callable[[], np.ndarray]] = {}
    for bits in turboquant.PAPER_BITS:
        kv = int(2 * bits)
        made[f"paper-{bits:g}"] = lambda kv=kv: paper_table(kv)
        if bits in turboquant.BITS:
            made[f"pairs-{bits:g}"] = lambda kv=kv: trained(kv, kv, starts=8, passes=120, rows=512)
            made[f"trellis-{bits:g}"] = lambda kv=kv: trained(
                kv, turboquant.TRELLIS_WINDOW, starts=3, passes=200, rows=256
            )
    return made


def distortion(table: mx.array, pair_bits: int, width: int, rows: int) -> float:
    """Relative squared error of coding `rows` normal rows of root mean square 1, all of one width."""
    x = mx.array(np.random.default_rng(width).standard_normal((rows, width // 2, 2), dtype=np.float32))
    x = x * mx.rsqrt(mx.square(x).mean(axis=(1, 2), keepdims=True))
    error = 0.0
    for start in range(0, rows, ROWS):
        slab = x[start : start + ROWS]
        miss = slab - table.astype(mx.float32)[best_path(slab, table, pair_bits)]
        error += float(np.array(mx.square(miss).sum()))
    return error / x.size


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help="tables to train, as trellis-3.5; all if none is given")
    names = parser.parse_args().names or list(recipes())
    tables_file, errors_file = HERE / "codebooks.safetensors", HERE / "distortion.json"
    tables: dict[str, mx.array] = {}
    if tables_file.exists():
        tables |= cast(dict[str, mx.array], mx.load(str(tables_file)))
    errors = json.loads(errors_file.read_text(encoding="utf-8")) if errors_file.exists() else {}
    for name in names:
        begun = time.perf_counter()
        tables[name] = mx.array(recipes()[name]()).astype(mx.float16)
        kv = int(2 * float(name.split("-")[1]))
        # As many coordinates at every width.
        errors[name] = {
            str(width): round(distortion(tables[name], kv, width, (1 << 20) // width), 6) for width in turboquant.WIDTHS
        }
        print(f"{name:12} {errors[name]['512']:.5f} at width 512, {time.perf_counter() - begun:.0f} s", flush=True)
        mx.save_safetensors(str(tables_file), {n: tables[n] for n in sorted(tables)})
        errors_file.write_text(json.dumps(errors, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
