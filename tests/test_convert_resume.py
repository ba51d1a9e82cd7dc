"""Interruptions: a conversion that was killed, cut short or ran out of space ends with the bytes of an unbroken one."""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
import tiny
from checkpoints import one_line

from mlx_gemma4.conversions import convert as conversion
from mlx_gemma4.conversions import partial
from mlx_gemma4.conversions.convert import convert
from mlx_gemma4.errors import DoesNotFitError, Gemma4Error, UsageError, WeightsError

ROOT = Path(__file__).parent.parent

# Slow enough that a kill falls between tensors as well as within them.
RUN = """
import sys, time
from mlx_gemma4.conversions.convert import convert
from mlx_gemma4.errors import Gemma4Error
try:
    convert(sys.argv[1], sys.argv[2], 4, progress=lambda step: time.sleep(0.004))
except Gemma4Error as e:
    print(f"{type(e).__name__}: {e}", file=sys.stderr)
    sys.exit(e.exit_code)
"""


def contents(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.make_tiny(tmp_path_factory.mktemp("hf") / "26b", "26b-a4b", towers=True, dtype="bfloat16", shards=2)


@pytest.fixture(scope="module")
def unbroken(source, tmp_path_factory):
    target = tmp_path_factory.mktemp("whole") / "mlx"
    convert(source, target, 4)
    return contents(target)


def start(source, target, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RUN, str(source), str(target)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, **options)


def journal(target) -> list[dict]:
    path = partial.partial_of(target) / partial.JOURNAL
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_killed_at_random_moments(source, unbroken, tmp_path):
    target, rng, seen = tmp_path / "mlx", random.Random(4), []
    for _ in range(5):
        process = start(source, target)
        wanted = len(journal(target)) + rng.randrange(3, 30)
        while process.poll() is None and len(journal(target)) < wanted:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not target.exists()
        seen.append(len(journal(target)))
    assert seen == sorted(seen) and seen[-1] > seen[0] > 1  # each went on from the one before
    convert(source, target, 4)
    assert contents(target) == unbroken


def test_ctrl_c(source, unbroken, tmp_path):
    def interrupt(step):
        if step.tensors_done == 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "mlx", 4, progress=interrupt)
    assert not (tmp_path / "mlx").exists()
    steps = []
    convert(source, tmp_path / "mlx", 4, progress=steps.append)
    assert steps[0].stage == "note" and "going on" in steps[0].text
    assert steps[1].stage == "convert" and steps[1].tensors_done >= 40
    assert contents(tmp_path / "mlx") == unbroken


def interrupted(source, target, after: int, bits: int = 4) -> None:
    def stop(step):
        if step.stage == "convert" and step.tensors_done >= after:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        convert(source, target, bits, progress=stop)


def test_other_options_or_another_source_start_anew_and_say_so(unbroken, source, tmp_path):
    steps = []
    interrupted(source, tmp_path / "mlx", 30, bits=8)
    convert(source, tmp_path / "mlx", 4, progress=steps.append)
    notes = [s.text for s in steps if s.stage == "note"]
    assert len(notes) == 1 and "starts anew" in notes[0] and "\n" not in notes[0]
    assert contents(tmp_path / "mlx") == unbroken

    own = tiny.make_tiny(tmp_path / "own", "31b", dtype="bfloat16")
    interrupted(own, tmp_path / "second", 30)
    tiny.make_tiny(own, "31b", seed=1, dtype="bfloat16")
    steps.clear()
    convert(own, tmp_path / "second", 4, progress=steps.append)
    assert "starts anew" in steps[0].text
    convert(own, tmp_path / "third", 4)
    one, two = contents(tmp_path / "second"), contents(tmp_path / "third")
    assert one["model.safetensors"] == two["model.safetensors"]


def test_what_a_loss_of_power_lost_is_made_again(source, unbroken, tmp_path):
    """Lines of the journal whose bytes never reached the disk, and a line cut in the middle."""
    target = tmp_path / "mlx"
    interrupted(source, target, 60)
    folder = partial.partial_of(target)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(100_000)
        file.write(bytes(300_000))
    with (folder / partial.JOURNAL).open("ab") as file:
        file.write(b'{"item": 61, "cr')
    convert(source, target, 4)
    assert contents(target) == unbroken


def test_bytes_that_change_under_our_hands_are_noticed(source, unbroken, tmp_path, monkeypatch):
    """After the last flush nothing is compared until the end: the check at the end finds it, the next run mends it."""
    target = tmp_path / "mlx"
    flush = partial.Partial.flush

    def spoil(self):
        flush(self)
        with (self.folder / "model.safetensors").open("r+b") as file:
            file.seek(200_000)
            file.write(b"spoiled")

    monkeypatch.setattr(partial.Partial, "flush", spoil)
    with pytest.raises(WeightsError) as error:
        convert(source, target, 4)
    assert "run the same command again" in one_line(error) and not target.exists()
    monkeypatch.undo()
    convert(source, target, 4)
    assert contents(target) == unbroken


def test_a_full_disk(source, unbroken, tmp_path):
    """The kernel refuses the bytes behind a limit, as a full disk does; with room again, the run goes on."""
    target = tmp_path / "mlx"

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))

    process = start(source, target, preexec_fn=limit)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == DoesNotFitError.exit_code, errors
    assert "disk filled up" in errors and "goes on where it stopped" in errors and "Traceback" not in errors
    assert not target.exists()
    convert(source, target, 4)
    assert contents(target) == unbroken


def test_no_space_left_in_the_middle(source, unbroken, tmp_path, monkeypatch):
    target, written = tmp_path / "mlx", 0
    real = os.pwrite

    def pwrite(handle, data, offset):
        nonlocal written
        written += len(data)
        if written > 300_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(DoesNotFitError) as error:
        convert(source, target, 4)
    assert "disk filled up" in one_line(error)
    monkeypatch.undo()
    steps = []
    convert(source, target, 4, progress=steps.append)
    assert "going on" in steps[0].text
    assert contents(target) == unbroken


def test_space_is_checked_before_the_first_byte(source, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=500_000))
    with pytest.raises(DoesNotFitError) as error:
        convert(source, tmp_path / "mlx", 4)
    assert "500.0 kB free" in one_line(error) and not list(tmp_path.iterdir())


def test_force_replaces_only_when_the_new_one_is_complete(source, unbroken, tmp_path):
    target = tmp_path / "mlx"
    convert(source, target, 8)
    eight = contents(target)

    def stop(step):
        assert contents(target) == eight
        if step.tensors_done >= 60:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        convert(source, target, 4, force=True, progress=stop)
    assert contents(target) == eight
    convert(source, target, 4, force=True)
    assert contents(target) == unbroken
    assert [p.name for p in tmp_path.iterdir()] == ["mlx"]


def test_killed_between_the_two_names(source, unbroken, tmp_path, monkeypatch):
    """With --force: the old folder is aside, the new one has no name yet. Nothing is lost, the next run ends it."""
    target = tmp_path / "mlx"
    convert(source, target, 8)
    eight = contents(target)
    rename, calls = Path.rename, []

    def second_fails(self, to):
        calls.append(to)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(KeyboardInterrupt):
        convert(source, target, 4, force=True)
    monkeypatch.undo()
    assert not target.exists() and contents(partial.replaced_of(target)) == eight
    convert(source, target, 4)
    assert contents(target) == unbroken
    assert [p.name for p in tmp_path.iterdir()] == ["mlx"]


def test_two_at_once(source, tmp_path):
    target, second = tmp_path / "mlx", []

    def another(step):
        if step.stage == "convert" and not second:
            second.append(True)
            with pytest.raises(UsageError) as error:
                convert(source, target, 4)
            assert "another conversion" in one_line(error)

    convert(source, target, 4, progress=another)
    assert second


def test_a_folder_that_cannot_be_written(source, tmp_path, monkeypatch):
    def mkdir(self, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(Gemma4Error) as error:
        convert(source, tmp_path / "mlx", 4)
    assert "cannot write" in one_line(error) and "Read-only" in one_line(error)


def test_memory_does_not_grow_with_the_model(tmp_path):
    """A table of 268 MB, with blocks of 8 MiB: what a conversion adds to the process is far less than the table."""
    folder = tiny.make_tiny(tmp_path / "hf", "e2b", dtype="bfloat16", vocab_size_per_layer_input=262_144)
    assert (folder / "model.safetensors").stat().st_size > 250e6
    code = """
import resource, sys
import mlx.core as mx
from mlx_gemma4.conversions import blocks, convert
from mlx_gemma4.models import gemma4
blocks.ranges.__defaults__ = (8 << 20,)
mx.eval(mx.quantize(mx.zeros((64, 64)), bits=4))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert.convert(sys.argv[1], sys.argv[2], 4)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "mlx")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout) * (1 if sys.platform == "darwin" else 1024)
    assert grown < 120e6, f"{grown / 1e6:.0f} MB"
    weights = dict(mx.load(str(tmp_path / "mlx" / "model.safetensors")))
    assert weights["language_model.model.embed_tokens_per_layer.scales"].shape[0] == 262_144


def test_an_error_of_the_reading_thread_comes_out(source, tmp_path, monkeypatch):
    """And ends both threads."""

    def read(self, *args):
        raise WeightsError("the shard is gone")

    monkeypatch.setattr(conversion.Reader, "read", read)
    with pytest.raises(WeightsError, match="the shard is gone"):
        convert(source, tmp_path / "mlx", 4)
