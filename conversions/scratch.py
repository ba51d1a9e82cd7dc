"""What a calibration has found so far: a hidden folder beside the target, so that an interrupted one is taken up.

Owns `.NAME.calibration`: a journal of figures, and files of arrays, each written under another name and then renamed,
with its checksum in the journal. A process killed at any moment loses the file at work. Leaves what is kept to
`sensitivity.py` and `compensate.py`.
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlx_gemma4.conversions.disk import refused
from mlx_gemma4.errors import UsageError, WeightsError

JOURNAL = "journal.jsonl"
_CHUNK = 8 << 20
_KINDS = {mx.float32: "F32", mx.bfloat16: "BF16", mx.float16: "F16", mx.uint32: "U32"}


class Scratch:
    """The folder of one calibration, locked while it is open. Close it; `remove` it when nothing in it is needed.

    `fresh` says why an earlier run's was thrown away, if it was; `resumed` whether one is taken up.
    """

    def __init__(self, folder: Path, identity: Any = None) -> None:
        """identity: JSON that two runs must agree in for one to take up the other.

        Raises UsageError when another process is at work on it, Gemma4Error when it cannot be written.
        """
        self.folder = folder
        self.fresh: str | None = None
        self.resumed = False
        self.records: list[dict[str, Any]] = []
        self._sums: dict[str, int] = {}
        self._checked: set[str] = set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._journal = os.open(folder / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(self._journal)
                raise UsageError(f"another calibration is at work in {folder}; wait for it, or end it") from None
            self._take_up(hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest())
        except OSError as e:
            raise refused(self.folder, e) from None

    def _take_up(self, digest: str) -> None:
        text = os.pread(self._journal, os.fstat(self._journal).st_size, 0)
        records, read = [], 0
        # A line cut short by a kill does not count.
        for line in text[: text.rfind(b"\n") + 1].splitlines(keepends=True):
            try:
                records.append(json.loads(line))
            except ValueError:
                break
            read += len(line)
        if records and records[0].get("calibration") == digest:
            os.ftruncate(self._journal, read)
            self.records = records[1:]
            self._sums = {r["file"]: r["crc"] for r in self.records if "file" in r}
            self.resumed = bool(self.records)
            return
        if records:
            self.fresh = "the source or the options changed since the interrupted calibration; it starts anew"
        os.ftruncate(self._journal, 0)
        for path in self.folder.iterdir():
            if path.name != JOURNAL:
                path.unlink()
        self._append({"calibration": digest})

    def note(self, **record: Any) -> None:
        """Keeps figures: what `records` will hold in a run that takes this one up."""
        self.records.append(record)
        self._append(record)

    def found(self, key: str) -> list[Any]:
        """The values noted under a key, in order."""
        return [record[key] for record in self.records if key in record]

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def has(self, name: str) -> bool:
        """Whether a file is there and what was written to it."""
        if name in self._checked:
            return True
        if name not in self._sums or not self.path(name).is_file():
            return False
        if _checksum(self.path(name)) != self._sums[name]:
            return False
        self._checked.add(name)
        return True

    def save(self, name: str, arrays: Mapping[str, mx.array]) -> None:
        """Writes arrays as a file of safetensors. Raises DoesNotFitError when the disk is full."""
        entries: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
        parts, at = [], 0
        # Wide types first, so that every tensor is aligned.
        for key in sorted(arrays, key=lambda k: (-arrays[k].itemsize, k)):
            value = arrays[key]
            entries[key] = {"dtype": _KINDS[value.dtype], "shape": list(value.shape)}
            length = math.prod(value.shape) * value.itemsize
            entries[key]["data_offsets"] = [at, at + length]
            at += length
            parts.append(value)
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        half = self.path(name).with_suffix(".half")
        try:
            with half.open("wb") as file:
                crc = zlib.crc32(header, zlib.crc32(length_ := len(header).to_bytes(8, "little")))
                file.write(length_ + header)
                for value in parts:
                    data = _raw(value)
                    crc = zlib.crc32(data, crc)
                    file.write(data)
            half.rename(self.path(name))
        except OSError as e:
            raise refused(self.folder, e) from None
        self._sums[name] = crc
        self._checked.add(name)
        self._append({"file": name, "crc": crc})

    def load(self, name: str) -> dict[str, mx.array]:
        """The arrays of a file, read when they are used. Raises WeightsError when it is gone or damaged."""
        if not self.has(name):
            raise WeightsError(f"{self.path(name)} is gone or damaged; delete {self.folder} and run the command again")
        return cast(dict[str, mx.array], mx.load(str(self.path(name))))

    def drop(self, name: str) -> None:
        """A file that is not needed any more."""
        self._checked.discard(name)
        self.path(name).unlink(missing_ok=True)

    def close(self) -> None:
        with suppress(OSError):
            os.close(self._journal)

    def remove(self) -> None:
        """Closes it and deletes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def _append(self, record: dict[str, Any]) -> None:
        data = json.dumps(record).encode() + b"\n"
        try:
            while data:
                data = data[os.write(self._journal, data) :]
        except OSError as e:
            raise refused(self.folder, e) from None


def _raw(value: mx.array) -> memoryview:
    """An array's bytes, by way of numpy, which knows no bfloat16."""
    value = mx.contiguous(value.view(mx.uint16) if value.dtype in (mx.bfloat16, mx.float16) else value)
    mx.eval(value)
    flat: Any = np.array(value, copy=False).reshape(-1)
    return memoryview(flat).cast("B")


def _checksum(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while part := file.read(_CHUNK):
            crc = zlib.crc32(part, crc)
    return crc
