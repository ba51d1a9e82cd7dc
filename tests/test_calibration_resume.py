"""A calibration that was killed, interrupted or ran out of space ends with the bytes of an unbroken one."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from checkpoints import one_line

from mlx_gemma4.conversions import calibrate
from mlx_gemma4.conversions import scratch as scratches
from mlx_gemma4.conversions.calibrate import folder_of
from mlx_gemma4.conversions.convert import convert
from mlx_gemma4.conversions.scratch import JOURNAL, Scratch
from mlx_gemma4.errors import DoesNotFitError, UsageError, WeightsError

ROOT = Path(__file__).parent.parent
TOKENS = np.random.default_rng(1).integers(3, 500, (2, 12))
RUN = """
import sys
import numpy as np
from mlx_gemma4.conversions import calibrate
from mlx_gemma4.conversions.convert import convert
tokens = np.random.default_rng(1).integers(3, 500, (2, 12))
calibrate.token_rows = lambda *_: tokens
convert(sys.argv[1], sys.argv[2], target_bits=4.6)
"""


def contents(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(calibrate, "token_rows", lambda *_: TOKENS)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Three layers, the last of which reads keys and values of the first."""
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    return tiny.make_tiny(
        tmp_path_factory.mktemp("hf") / "e2b", "e2b", dtype="bfloat16", layer_types=kinds, num_kv_shared_layers=1
    )


@pytest.fixture(scope="module")
def unbroken(source, tmp_path_factory):
    target, rows = tmp_path_factory.mktemp("whole") / "mlx", calibrate.token_rows
    calibrate.token_rows = lambda *_: TOKENS
    try:
        convert(source, target, target_bits=4.6)
    finally:
        calibrate.token_rows = rows
    return contents(target)


def journal(target) -> list[str]:
    path = folder_of(target) / JOURNAL
    return path.read_text().splitlines() if path.exists() else []


def test_killed_at_random_moments(source, unbroken, tmp_path):
    target, rng, seen = tmp_path / "mlx", random.Random(4), []
    for _ in range(3):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen([sys.executable, "-c", RUN, str(source), str(target)], env=environment)
        wanted = len(journal(target)) + rng.randrange(20, 60)
        while process.poll() is None and len(journal(target)) < wanted:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not target.exists()
        seen.append(len(journal(target)))
    assert seen == sorted(seen) and seen[-1] > seen[0] > 1  # each went on from the one before
    convert(source, target, target_bits=4.6)
    assert contents(target) == unbroken
    assert [p.name for p in tmp_path.iterdir()] == ["mlx"]


def test_interrupted_at_every_kind_of_write(source, unbroken, tmp_path, monkeypatch):
    """Ctrl-C before, within and after a file, and before a figure is noted, again and again until it is done."""
    target, save, note, rename = tmp_path / "mlx", Scratch.save, Scratch.note, Path.rename
    left = 0

    def counting(real):
        def run(*arguments, **named):
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            return real(*arguments, **named)

        return run

    monkeypatch.setattr(Scratch, "save", counting(save))
    monkeypatch.setattr(Scratch, "note", counting(note))
    monkeypatch.setattr(Path, "rename", counting(rename))
    rng, runs, notes = random.Random(8), 0, []
    while not target.exists():
        left, runs = rng.randrange(25, 70), runs + 1
        try:
            convert(source, target, target_bits=4.6, progress=notes.append)
        except KeyboardInterrupt:
            assert folder_of(target).exists()
    assert 4 < runs < 40
    assert sum("interrupted calibration" in step.text for step in notes if step.stage == "note") >= runs - 2
    assert contents(target) == unbroken


def test_a_conversion_stopped_after_its_calibration(source, unbroken, tmp_path):
    """Nothing is measured or packed anew."""
    target, stages = tmp_path / "mlx", []

    def stop(step):
        if step.stage == "convert" and step.tensors_done > 20:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        convert(source, target, target_bits=4.6, progress=stop)
    convert(source, target, target_bits=4.6, progress=lambda step: stages.append((step.stage, step.text)))
    assert {stage for stage, _ in stages} == {"note", "convert", "verify"}
    assert sum("going on" in text for stage, text in stages if stage == "note") == 2
    assert contents(target) == unbroken


def interrupted(source, target, **options):
    def stop(step):
        if step.stage == "compensate":
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        convert(source, target, progress=stop, **options)


def test_other_options_start_anew_and_say_so(source, unbroken, tmp_path):
    target, notes = tmp_path / "mlx", []
    interrupted(source, target, target_bits=6)
    convert(source, target, target_bits=4.6, progress=notes.append)
    assert "starts anew" in notes[0].text and "\n" not in notes[0].text
    assert contents(target) == unbroken


def test_no_space_left_in_the_middle(source, unbroken, tmp_path, monkeypatch):
    target, raw, written = tmp_path / "mlx", scratches._raw, 0

    def full(value):
        nonlocal written
        written += 1
        if written > 60:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return raw(value)

    monkeypatch.setattr(scratches, "_raw", full)
    with pytest.raises(DoesNotFitError) as error:
        convert(source, target, target_bits=4.6)
    assert "disk filled up" in one_line(error) and "goes on where it stopped" in one_line(error)
    monkeypatch.setattr(scratches, "_raw", raw)
    convert(source, target, target_bits=4.6)
    assert contents(target) == unbroken


def test_space_is_checked_before_anything_is_read(source, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=500_000))
    with pytest.raises(DoesNotFitError) as error:
        convert(source, tmp_path / "mlx", target_bits=4.6)
    assert "500.0 kB free" in one_line(error) and not list(tmp_path.iterdir())


def test_a_damaged_file_is_named(source, tmp_path):
    """What a loss of power can leave."""
    target = tmp_path / "mlx"

    def stop(step):
        if step.stage == "measure" and ".layers.1." in step.text:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        convert(source, target, target_bits=4.6, progress=stop)
    state = folder_of(target) / "state-0000-001.safetensors"
    state.write_bytes(state.read_bytes()[:-8] + b"spoilt!!")
    with pytest.raises(WeightsError) as error:
        convert(source, target, target_bits=4.6)
    assert "state-0000-001" in one_line(error) and "delete" in one_line(error)


def test_two_at_once(tmp_path):
    first = Scratch(tmp_path / "work")
    with pytest.raises(UsageError) as error:
        Scratch(tmp_path / "work")
    assert "another calibration" in one_line(error)
    first.close()
    Scratch(tmp_path / "work").remove()
