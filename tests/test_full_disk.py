"""A real disk that runs full, a small tmpfs: `convert` says so in one line and, given room, ends with the same bytes.

Owns the cases; the rounds are those of `full_disk.py`, which runs where it may mount: as root in a mount namespace of
its own, otherwise in one where it is root. Skipped where neither is allowed.
"""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from checkpoints import one_line
from full_disk import TOKENS

from mlx_gemma4.conversions import calibrate, partial
from mlx_gemma4.conversions.convert import convert
from mlx_gemma4.conversions.scratch import Scratch
from mlx_gemma4.errors import DoesNotFitError

TESTS = Path(__file__).parent
NAMESPACES = (["unshare", "-m"], ["unshare", "-rm"])


@pytest.fixture(scope="module")
def namespace(tmp_path_factory) -> list[str]:
    """The words before a command that let it mount a tmpfs."""
    folder, said = tmp_path_factory.mktemp("probe"), []
    for words in NAMESPACES:
        try:
            command = [*words, "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
            return words
        except FileNotFoundError as e:
            said.append(f"{' '.join(words)}: {e.strerror}")
        except subprocess.CalledProcessError as e:
            said.append(f"{' '.join(words)}: {e.stderr.strip()}")
    pytest.skip(f"no tmpfs can be mounted here; run as root or where user namespaces are allowed ({'; '.join(said)})")


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.mark.parametrize("kind", ["plain", "calibrated"])
def test_a_disk_that_runs_full_again_and_again(kind, namespace, tmp_path, monkeypatch):
    """From its first page on: while the folder is made, within tensors, at the small files, in a calibration's own."""
    monkeypatch.setattr(calibrate, "token_rows", lambda *_: TOKENS)
    if kind == "plain":
        source = tiny.make_tiny(tmp_path / "hf", "26b-a4b", dtype="bfloat16", shards=2)
        convert(source, tmp_path / "mlx", 4)
        options, met = ["--bits", "4"], {"__init__", "write", "add"}
    else:
        kinds = ["full_attention", "sliding_attention", "full_attention"]
        source = tiny.make_tiny(tmp_path / "hf", "e2b", dtype="bfloat16", layer_types=kinds, num_kv_shared_layers=1)
        convert(source, tmp_path / "mlx", target_bits=4.6)
        options, met = ["--target-bits", "4.6"], {"save", "write", "add"}
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        [*namespace, sys.executable, str(TESTS / "full_disk.py"), str(source), str(disk), "3", *options],
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS)))},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])

    small = found["small"]
    assert (small["code"], small["left"]) == (DoesNotFitError.exit_code, [])
    assert small["errors"].count("\n") == 1 and "32.8 kB free; make room" in small["errors"]

    *full, last = found["rounds"]
    assert len(full) > 6 and {r["at"] for r in full} >= met
    for r in full:
        assert (r["code"], r["there"]) == (DoesNotFitError.exit_code, False)
        assert r["errors"].count("\n") == 1 and "disk filled up" in r["errors"], r["errors"]
        assert "goes on where it stopped" in r["errors"]
    # Nothing is lost from one round to the next.
    for folder in (".mlx.partial", ".mlx.calibration"):
        lines = [r["journals"].get(folder, 0) for r in full]
        assert lines == sorted(lines)
    assert last["code"] == 0 and last["errors"] == ""
    assert found["names"] == ["mlx"]
    assert found["files"] == hashes(tmp_path / "mlx")


def test_a_disk_that_says_so_only_when_flushed(tmp_path, monkeypatch):
    """As network file systems do; and the journal's last line."""
    source = tiny.make_tiny(tmp_path / "hf", "31b", dtype="bfloat16")
    convert(source, tmp_path / "whole" / "mlx", 4)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real = os.write
    for name, fake in (("fsync", full), ("write", lambda h, data: full() if b"flushed" in data else real(h, data))):
        monkeypatch.setattr(os, name, fake)
        with pytest.raises(DoesNotFitError) as error:
            convert(source, tmp_path / "mlx", 4)
        assert "disk filled up" in one_line(error) and not (tmp_path / "mlx").exists()
        monkeypatch.undo()
    convert(source, tmp_path / "mlx", 4)
    assert hashes(tmp_path / "mlx") == hashes(tmp_path / "whole" / "mlx")


def test_no_room_for_another_folder(tmp_path, monkeypatch):
    """A file system that is out of inodes: the folder itself cannot be made."""
    source = tiny.make_tiny(tmp_path / "hf", "31b", dtype="bfloat16")

    def full(self, *_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(DoesNotFitError) as error:
        convert(source, tmp_path / "mlx", 4)
    assert str(partial.partial_of(tmp_path / "mlx")) in one_line(error) and "make room" in one_line(error)
    with pytest.raises(DoesNotFitError) as error:
        Scratch(tmp_path / "work")
    assert str(tmp_path / "work") in one_line(error) and "make room" in one_line(error)
