"""Decode and prefill speed against mlx-lm and mlx-vlm, paired: same checkpoint, types, tokens and cache precision.

    python -m benchmarks.speed --csv results.csv
    python -m benchmarks.speed --model FOLDER           # an MLX folder of your own instead of random checkpoints

One process per side, one active at a time, in rounds A B B A; medians, and the ratio ours/theirs per round. Prefill is
one chunk at the given context, decode a pipelined greedy run from it. Never a test: machines are noisy.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from .checkpoint import SHAPES, write_checkpoint

SIDES = ("ours", "mlx-lm", "mlx-vlm")
COLUMNS = ("tokens_per_second", "ours_over_it", "lowest", "highest", "by_cpu_time", "peak_mb", "cache_mb")


class Worker:
    def __init__(self, side: str, folder: Path):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.side", side, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if not os.environ.get("BENCH_DEBUG") else None,
            text=True,
        )
        self._answer()

    def _answer(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a side ended early: {self.process.args}; set BENCH_DEBUG=1 to see why")
        return json.loads(line)

    def run(self, **command: object) -> dict:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(folder: Path, label: str, sides: list[str], args: argparse.Namespace) -> list[dict]:
    workers = {side: Worker(side, folder) for side in sides}
    rows = []
    for do, tokens in (("decode", args.decode_tokens), ("prefill", args.prefill_tokens)):
        for context in args.contexts:
            runs: dict[str, list[dict]] = {side: [] for side in sides}
            for round_ in range(args.rounds):
                for side in sides if round_ % 2 == 0 else sides[::-1]:
                    runs[side].append(workers[side].run(do=do, context=context, tokens=tokens))
            for side in sides:
                rows.append({"checkpoint": label, "work": do, "context": context, "side": side})
                rows[-1] |= summary(runs["ours"], runs[side], tokens)
                print(" ".join(f"{v!s:>9}" for v in rows[-1].values()), f"load {os.getloadavg()[0]:.1f}", flush=True)
    for worker in workers.values():
        worker.close()
    return rows


def summary(ours: list[dict], theirs: list[dict], tokens: int) -> dict:
    """The columns of one side: medians over its rounds, and ratios round by round."""
    if failed := next((r["error"] for r in theirs if "error" in r), None):
        return {"tokens_per_second": failed} | dict.fromkeys(COLUMNS[1:], "")
    rates = [tokens / r["seconds"] for r in theirs]
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(ours, theirs, strict=True)]
    # On a shared machine processor time is steadier than the clock.
    cpu = [b["cpu_seconds"] / a["cpu_seconds"] for a, b in zip(ours, theirs, strict=True)]
    values = (
        round(statistics.median(rates), 2),
        round(statistics.median(ratios), 3),
        round(min(ratios), 3),
        round(max(ratios), 3),
        round(statistics.median(cpu), 3),
        round(theirs[-1]["peak_bytes"] / 1e6, 1),
        round(theirs[-1]["cache_bytes"] / 1e6, 2),
    )
    return dict(zip(COLUMNS, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="an MLX folder; default: random mid-size checkpoints")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--weights", nargs="+", default=["4bit/float32", "4bit/bfloat16", "plain/bfloat16"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--contexts", nargs="+", type=int, default=[128, 2048, 8192])
    parser.add_argument("--decode-tokens", type=int, default=16)
    parser.add_argument("--prefill-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as tmp:
        if args.model:
            rows += compare(args.model, args.model.name, args.sides, args)
        else:
            for shape in args.shapes:
                for kind in args.weights:
                    weights, dtype = kind.split("/")
                    folder = Path(tmp) / f"{shape}-{weights}-{dtype}"
                    write_checkpoint(folder, shape, weights, dtype)
                    rows += compare(folder, f"{shape} {kind}", args.sides, args)
    if args.csv:
        with args.csv.open("w", newline="") as f:
            writer = csv.DictWriter(f, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
