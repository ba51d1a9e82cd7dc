"""The per-layer embedding table on disk against the same table in memory: resident bytes and decode speed.

    python -m benchmarks.ple_disk [--width 128] [--csv results.csv]

Owns the checkpoint (10 small layers with a table of 262,144 rows, written and removed), one process per side for
memory, and one process with both sides in turn for speed. "waiting" is the disk side without `ple_disk.late`: the
graph of a step is built only when its token is known.
"""

import argparse
import csv
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from benchmarks.checkpoint import config_of, save
from mlx_gemma4.config import Gemma4Config
from mlx_gemma4.generation import generate_step
from mlx_gemma4.loading import load_model
from mlx_gemma4.models.gemma4 import Model

ROWS = 262_144
PROMPT, TOKENS = 64, 32


def write(folder: Path, width: int, packed: bool, dtype: str) -> int:
    """Writes the checkpoint; returns the bytes of its table."""
    raw = config_of("e-family")
    raw |= {"hidden_size_per_layer_input": width, "vocab_size_per_layer_input": ROWS, "dtype": dtype}
    mx.random.seed(3)
    model = Model(Gemma4Config.from_dict(raw))
    model.update(tree_map(lambda a: a.astype(getattr(mx, dtype)), model.parameters()))
    save(folder, raw, model, packed)
    table = dict(mx.load(str(folder / "model.safetensors")))
    return sum(v.nbytes for k, v in table.items() if ".embed_tokens_per_layer." in k)


def prompt_of(model: Model, length: int) -> mx.array:
    return mx.array(np.random.default_rng(5).integers(3, model.text_config.vocab_size, length).astype(np.int32))


def decode(model: Model, waiting: bool = False) -> tuple[float, float]:
    """Seconds for TOKENS tokens after a prompt: by the clock, and of the processor (steadier on a shared machine)."""
    sampler = (lambda logprobs: mx.argmax(logprobs, axis=-1)) if waiting else None
    steps = generate_step(prompt_of(model, PROMPT), model, max_tokens=TOKENS + 1, sampler=sampler)
    next(steps)
    begin = time.perf_counter(), time.process_time()
    for _ in steps:
        pass
    return time.perf_counter() - begin[0], time.process_time() - begin[1]


def resident() -> dict[str, int]:
    """Bytes of this process now (Linux only) and at its peak."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmRSS:"))
        found["now"] = int(line.split()[1]) * 1024
    return found


def side(folder: str, ple: str, dtype: str) -> None:
    """One side's process: loads, reads a prompt, decodes, prints what it holds."""
    model = load_model(folder, ple=ple, dtype=dtype)
    mx.clear_cache()
    decode(model)
    mx.clear_cache()
    print(json.dumps(resident()))


def measure(folder: Path, table: int, dtype: str, rounds: int) -> dict[str, float | str]:
    held = {}
    for ple in ("memory", "disk"):
        command = [
            sys.executable,
            "-m",
            "benchmarks.ple_disk",
            "--side",
            ple,
            "--folder",
            str(folder),
            "--dtype",
            dtype,
        ]
        held[ple] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    kind = "now" if "now" in held["disk"] else "peak"
    saved = held["memory"][kind] - held["disk"][kind]
    models = {"memory": load_model(folder, dtype=dtype), "disk": load_model(folder, ple="disk", dtype=dtype)}
    ids = prompt_of(models["disk"], 300)[None]
    same = mx.array_equal(models["memory"](ids), models["disk"](ids)).item()
    for model in models.values():
        decode(model)
    took: dict[str, list[tuple[float, float]]] = {"memory": [], "disk": [], "waiting": []}
    for number in range(rounds):
        order = list(took)
        for name in (*order[number % 3 :], *order[: number % 3]):
            took[name].append(decode(models["memory" if name == "memory" else "disk"], waiting=name == "waiting"))

    def over_memory(name: str, clock: int) -> float:
        pairs = zip(took["memory"], took[name], strict=True)
        return round(statistics.median(one[clock] / other[clock] for one, other in pairs), 3)

    return {
        "table_bytes": table,
        "memory_side": held["memory"][kind],
        "disk_side": held["disk"][kind],
        "saved_over_table": round(saved / table, 4),
        "logits_identical": str(same),
        "memory_tokens_per_second": round(TOKENS / min(wall for wall, _ in took["memory"]), 1),
        "disk_over_memory": over_memory("disk", 0),
        "disk_by_cpu_time": over_memory("disk", 1),
        "waiting_over_memory": over_memory("waiting", 0),
        "waiting_by_cpu_time": over_memory("waiting", 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=128, help="values per layer and row (E2B: 256)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--weights", choices=("plain", "4bit", "both"), default="both")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--side", choices=("memory", "disk"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        side(args.folder, args.side, args.dtype)
        return
    rows = []
    for packed in {"plain": (False,), "4bit": (True,), "both": (False, True)}[args.weights]:
        with tempfile.TemporaryDirectory() as name:
            table = write(Path(name), args.width, packed, args.dtype)
            row = {"weights": "4-bit" if packed else args.dtype, "computes_in": args.dtype}
            row |= measure(Path(name), table, args.dtype, args.rounds)
        rows.append(row)
        print(row, flush=True)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
