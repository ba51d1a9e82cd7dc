"""The result while it is being made: a hidden folder beside the target, and the journal that lets a run be taken up.

Owns `.NAME.partial`: the shards at their final size, what has been written of them, when it is flushed, the check at
the end and the renaming. Leaves what the bytes are to `blocks.py` and where they go to `plan.py`.

`journal.jsonl` has one line per finished item, with the checksum of each of its tensors, written after the tensors. A
process killed at any moment loses the item at work. The machine losing power can lose lines and bytes in any order, so
shards are flushed now and then, and a line `flushed` follows; of what came after it the checksums are compared when the
conversion is taken up.
"""

import fcntl
import hashlib
import json
import os
import shutil
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_gemma4.conversions.disk import refused
from mlx_gemma4.conversions.plan import Item, Plan, Stored
from mlx_gemma4.errors import UsageError, WeightsError

JOURNAL = "journal.jsonl"
# Bytes between two flushes; also what a loss of power can cost.
FLUSH = 1 << 30
_CHUNK = 8 << 20


class Partial:
    """The folder of one conversion, locked while it is open. `done` are the items an earlier run finished."""

    def __init__(self, target: Path, plan: Plan, digest: str) -> None:
        """Opens or creates the folder. `fresh` says why an earlier run's was thrown away, if it was.

        Raises UsageError when another process is at work on it, Gemma4Error when it cannot be written.
        """
        self.target = target
        self.folder = partial_of(target)
        self.plan = plan
        self.done: dict[int, list[int]] = {}  # item -> checksum of each of its tensors
        self.fetched: set[str] = set()  # source files this conversion downloaded itself
        self.fresh: str | None = None
        self._unflushed = 0
        self._shards: list[int] = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._journal = os.open(self.folder / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as e:
            raise refused(self.folder, e) from None
        try:
            try:
                fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UsageError(f"another conversion is writing {target}; wait for it, or end it") from None
            self._take_up(digest)
            self._open_shards()
            self._check_unflushed()
        except OSError as e:
            self.close()
            raise refused(self.folder, e) from None
        except BaseException:
            self.close()
            raise

    def _take_up(self, digest: str) -> None:
        """Reads the journal, or begins a new one where there is none for this plan."""
        size_ = os.fstat(self._journal).st_size
        # A line cut short by a kill does not count.
        text = os.pread(self._journal, size_, 0)
        text = text[: text.rfind(b"\n") + 1]
        records, read = [], 0
        for line in text.splitlines(keepends=True):
            try:
                records.append(json.loads(line))
            except ValueError:
                break  # lost with the power
            read += len(line)
        if records and records[0].get("plan") == digest:
            os.ftruncate(self._journal, read)
            self._flushed = 0
            for record in records[1:]:
                if record.get("crc") == []:
                    self.done.pop(record["item"], None)
                elif "item" in record:
                    self.done[record["item"]] = record["crc"]
                elif "fetched" in record:
                    self.fetched.add(record["fetched"])
                elif "flushed" in record:
                    self._flushed = len(self.done)
            return
        if records:
            self.fresh = "the source or the options changed since the interrupted conversion; it starts anew"
        self._flushed = 0
        os.ftruncate(self._journal, 0)
        for path in self.folder.iterdir():
            if path.name != JOURNAL:
                path.unlink()
        self._append({"plan": digest})

    def _open_shards(self) -> None:
        for file, length, header in zip(self.plan.files, self.plan.sizes, self.plan.headers, strict=True):
            handle = os.open(self.folder / file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._shards.append(handle)
            if os.fstat(handle).st_size != length:
                os.ftruncate(handle, length)
            self._pwrite(handle, memoryview(header), 0)

    def _check_unflushed(self) -> None:
        """Forgets finished items whose bytes were lost with the power."""
        for index in list(self.done)[self._flushed :]:
            item = self.plan.items[index]
            if [self._checksum(o) for o in item.outputs] != self.done[index]:
                del self.done[index]

    def _checksum(self, output: Stored) -> int:
        place, crc = self.plan.places[output.name], 0
        for at in range(0, output.nbytes, _CHUNK):
            part = os.pread(self._shards[place.shard], min(_CHUNK, output.nbytes - at), place.begin + at)
            crc = zlib.crc32(part, crc)
        return crc

    def writer(self, index: int) -> "ItemWriter":
        return ItemWriter(self, self.plan.items[index], index)

    def write(self, output: Stored, offset: int, data: Any) -> None:
        """Bytes of one tensor from `offset` on. Raises DoesNotFitError when the disk is full."""
        place = self.plan.places[output.name]
        try:
            self._pwrite(self._shards[place.shard], memoryview(data), place.begin + offset)
        except OSError as e:
            raise refused(self.folder, e) from None
        self._unflushed += data.nbytes

    def finish(self, index: int, checksums: list[int]) -> None:
        """An item is written."""
        self._append({"item": index, "crc": checksums})
        self.done[index] = checksums
        if self._unflushed >= FLUSH:
            self.flush()

    def note_fetched(self, file: str) -> None:
        """A source file was downloaded by this conversion, which may therefore remove it."""
        self.fetched.add(file)
        self._append({"fetched": file})

    def flush(self) -> None:
        """Everything written so far survives a loss of power. Raises DoesNotFitError: some disks say so only now."""
        try:
            for handle in self._shards:
                os.fsync(handle)
            self._append({"flushed": len(self.done)})
            os.fsync(self._journal)
        except OSError as e:
            raise refused(self.folder, e) from None
        self._unflushed = 0

    @property
    def bytes_written(self) -> int:
        return sum(o.nbytes for index in self.done for o in self.plan.items[index].outputs)

    def verify(self, report: Any) -> dict[str, dict[str, Any]]:
        """Reads every shard back: {file: {"bytes", "sha256"}}. `report(bytes)` is called as it goes on.

        Raises WeightsError when a tensor is not what was written; what is wrong is forgotten, so that another run makes
        it again.
        """
        by_shard: dict[int, list[tuple[int, int, int, int]]] = {}
        for index, item in enumerate(self.plan.items):
            for o, crc in zip(item.outputs, self.done[index], strict=True):
                place = self.plan.places[o.name]
                by_shard.setdefault(place.shard, []).append((place.begin, o.nbytes, crc, index))
        out = {}
        for number, (file, length) in enumerate(zip(self.plan.files, self.plan.sizes, strict=True)):
            digest, handle = hashlib.sha256(), self._shards[number]
            header = os.pread(handle, len(self.plan.headers[number]), 0)
            digest.update(header)
            bad = header != self.plan.headers[number]
            for begin, nbytes, crc, index in sorted(by_shard.get(number, [])):
                found = 0
                for at in range(0, nbytes, _CHUNK):
                    part = os.pread(handle, min(_CHUNK, nbytes - at), begin + at)
                    digest.update(part)
                    found = zlib.crc32(part, found)
                    report(len(part))
                if found != crc:
                    self._append({"item": index, "crc": []})
                    bad = True
            if bad:
                raise WeightsError(
                    f"{self.folder / file} is not what was written to it; check the disk and run the same command again"
                )
            out[file] = {"bytes": length, "sha256": digest.hexdigest()}
        return out

    def add(self, name: str, content: bytes) -> None:
        """A small file of the result."""
        try:
            with (self.folder / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as e:
            raise refused(self.folder, e) from None

    def rename(self, force: bool) -> None:
        """Gives the folder its name; with `force`, what had that name is removed afterwards. Raises UsageError."""
        try:
            for handle in self._shards:
                os.fsync(handle)
            replaced = replaced_of(self.target)
            if self.target.exists():
                check_target(self.target, force)
                shutil.rmtree(replaced, ignore_errors=True)
                self.target.rename(replaced)
            # The journal goes last: killed before the new name, the next run only has this left to do.
            self.folder.rename(self.target)
            (self.target / JOURNAL).unlink()
            shutil.rmtree(replaced, ignore_errors=True)
            handle = os.open(self.target.parent, os.O_RDONLY)
            with suppress(OSError):  # some network file systems know no fsync of folders
                os.fsync(handle)
            os.close(handle)
        except OSError as e:
            raise refused(self.target, e) from None

    def close(self) -> None:
        for handle in (*self._shards, self._journal):
            with suppress(OSError):
                os.close(handle)
        self._shards = []

    def _append(self, record: dict[str, Any]) -> None:
        try:
            os.lseek(self._journal, 0, os.SEEK_END)
            self._write_all(self._journal, json.dumps(record).encode() + b"\n")
        except OSError as e:
            raise refused(self.folder, e) from None

    @staticmethod
    def _write_all(handle: int, data: bytes) -> None:
        while data:
            data = data[os.write(handle, data) :]

    @staticmethod
    def _pwrite(handle: int, view: memoryview, offset: int) -> None:
        while view:
            count = os.pwrite(handle, view[:_CHUNK], offset)
            view, offset = view[count:], offset + count


class ItemWriter:
    """Writes one item block by block and keeps the checksums of its tensors."""

    def __init__(self, partial: Partial, item: Item, index: int) -> None:
        self._partial, self._item, self._index = partial, item, index
        self._at = [0] * len(item.outputs)
        self._crc = [0] * len(item.outputs)

    def write(self, parts: list[Any]) -> None:
        """The next rows of every tensor of the item, uint8 arrays. Raises DoesNotFitError."""
        for i, (output, data) in enumerate(zip(self._item.outputs, parts, strict=True)):
            self._partial.write(output, self._at[i], data)
            self._crc[i] = zlib.crc32(memoryview(data), self._crc[i])
            self._at[i] += data.nbytes

    def finish(self) -> None:
        self._partial.finish(self._index, self._crc)


def partial_of(target: Path) -> Path:
    return target.parent / f".{target.name}.partial"


def replaced_of(target: Path) -> Path:
    """What --force moves aside until the new folder has its name."""
    return target.parent / f".{target.name}.replaced"


def check_target(target: Path, force: bool) -> None:
    """Raises UsageError when there is something at `target` that must not be replaced."""
    if not target.exists() and not target.is_symlink():
        return
    if not force:
        raise UsageError(f"{target} exists; choose another folder, or give --force to replace it when the new is done")
    models = target.is_dir() and not target.is_symlink() and (target / "config.json").is_file()
    if not models:
        raise UsageError(f"{target} is no model folder, so --force does not replace it; remove it yourself")
