"""A conversion on a disk that runs full again and again: a program of its own, run where it may mount a tmpfs.

    python full_disk.py SOURCE FOLDER SEED [options of `gemma4 convert`]

Owns the disk (a tmpfs on the empty FOLDER, which the caller's mount namespace takes with it) and the rounds: the same
command, each time with a little more room, until it succeeds. Prints one line of JSON: what the command did on a disk
that is too small from the start, what each round did, the SHA-256 of every file of the result and what else is there.
Leaves comparing to `test_full_disk.py`.
"""

import contextlib
import hashlib
import io
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from mlx_gemma4.cli import failures
from mlx_gemma4.cli.app import run
from mlx_gemma4.conversions import calibrate
from mlx_gemma4.conversions import convert as conversion

TOKENS = np.random.default_rng(1).integers(3, 500, (2, 12))
PAGE = 4


def room(folder: Path, kilobytes: int, remount: bool = True) -> None:
    options = f"{'remount,' if remount else ''}size={kilobytes}k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


def command(arguments: list[str]) -> dict:
    """Exit code, what it printed, and the function that met the error."""
    at, report, shown = [], failures.report, io.StringIO()

    def noting(error: BaseException) -> None:
        trace = error.__traceback__
        while trace is not None:
            at[:] = [trace.tb_frame.f_code.co_name]
            trace = trace.tb_next
        report(error)

    failures.report = noting
    try:
        with contextlib.redirect_stderr(shown):
            code = run(arguments)
    finally:
        failures.report = report
    return {"code": code, "errors": shown.getvalue(), "at": at[0] if at else None}


def main() -> None:
    source, folder, seed, *options = sys.argv[1:]
    disk, draw = Path(folder), random.Random(int(seed))
    arguments = ["convert", source, "--to", str(disk / "mlx"), "--quiet", *options]
    calibrate.token_rows = lambda *_: TOKENS
    room(disk, 8 * PAGE, remount=False)
    small = command(arguments) | {"left": [p.name for p in disk.iterdir()]}
    # From here on another program takes the room after the check, so to speak.
    conversion.check_disk = calibrate.check_disk = lambda *_: None
    rounds, size = [], PAGE
    while not rounds or rounds[-1]["code"] == 4:
        room(disk, size)
        done = command(arguments)
        journals = {p.parent.name: len(p.read_text().splitlines()) for p in disk.glob(".mlx.*/journal.jsonl")}
        rounds.append(done | {"kilobytes": size, "journals": journals, "there": (disk / "mlx").exists()})
        # The small files of the end are a few pages each.
        size += PAGE * draw.randrange(1, 14)
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (disk / "mlx").iterdir()}
    names = [p.name for p in disk.iterdir()]
    print(json.dumps({"small": small, "rounds": rounds, "files": files, "names": names}))
    shutil.rmtree(disk / "mlx")


if __name__ == "__main__":
    main()
