"""Where a conversion reads from: a folder of safetensors, in the Hub's layout or MLX's.

Owns what a source is to the rest (`Source`) and the folder kind of it: headers, bytes of a tensor, the small files,
and what tells that it changed. Leaves repositories that are still being downloaded to `hub_source.py`, the checks of
headers to `mlx_gemma4.loading`.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from mlx_gemma4.errors import Gemma4Error, WeightsError
from mlx_gemma4.safetensors_header import Tensor


class Source(Protocol):
    """Files of weights with their headers known, and the folder that holds the small files."""

    folder: Path  # config.json, tokenizer and the like
    headers: dict[str, dict[str, Tensor]]  # by file name, in the order in which files come to hand
    name: str  # for messages and the card
    repo: str | None  # the Hub repository, if it is one
    commit: str | None

    def identity(self) -> Any:
        """JSON that changes when the source does."""
        ...

    def missing_bytes(self) -> int:
        """What has still to be downloaded."""
        ...

    def start(self, files: Iterable[str]) -> None:
        """Says which files will be read, in order; they may be fetched in advance."""
        ...

    def path(self, file: str) -> Path:
        """The file, waiting for it where need be. Raises Gemma4Error."""
        ...

    def release(self, file: str) -> None:
        """Says that a file is not needed any more."""
        ...

    def close(self) -> None: ...


class Folder:
    """A local checkpoint. Nothing in it is ever changed or removed.

    Raises WeightsError naming what is missing or damaged (`loading.shards`).
    """

    repo: str | None = None
    commit: str | None = None

    def __init__(self, folder: Path, name: str | None = None) -> None:
        from mlx_gemma4.loading import shards

        self.folder = folder
        self.name = name or str(folder)
        found = shards(folder)
        self.headers = {path.name: header for path, header in found.items()}
        self._files = {path.name: path for path in found}

    def identity(self) -> Any:
        stats = {file: path.stat() for file, path in self._files.items()}
        return {file: [s.st_size, s.st_mtime_ns] for file, s in stats.items()}

    def missing_bytes(self) -> int:
        return 0

    def start(self, files: Iterable[str]) -> None:
        """Everything is there."""

    def path(self, file: str) -> Path:
        return self._files[file]

    def release(self, file: str) -> None:
        """The files are the user's."""

    def close(self) -> None:
        """Nothing is open."""


class Reader:
    """Bytes of a source's tensors, by `pread`: what was read is not held twice, and threads do not meet."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._open: dict[str, tuple[int, int]] = {}  # file -> (descriptor, bytes before the first tensor)

    def read(self, file: str, tensor: str, spans: list[tuple[int, int]]) -> np.ndarray:
        """The (offset, length) spans of one tensor, one after the other, as uint8. Raises WeightsError."""
        handle, start = self._file(file)
        begin = start + self._source.headers[file][tensor].begin
        out = np.empty(sum(length for _, length in spans), np.uint8)
        view, at = memoryview(cast(Any, out)), 0
        for offset, length in spans:
            done = 0
            while done < length:
                part = view[at + done : at + length]
                try:
                    # Linux moves at most 2 GiB at a time; blocks are far smaller.
                    count = os.preadv(handle, [part], begin + offset + done)
                except OSError as e:
                    raise WeightsError(f"{file}: tensor {tensor} cannot be read ({e.strerror})") from None
                if not count:
                    raise WeightsError(f"{file} ends within tensor {tensor}; download it again")
                done += count
            at += length
        return out

    def _file(self, file: str) -> tuple[int, int]:
        if file not in self._open:
            path = self._source.path(file)
            try:
                handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as e:
                raise Gemma4Error(f"{path} cannot be read ({e.strerror})") from None
            self._open[file] = handle, 8 + int.from_bytes(os.pread(handle, 8, 0), "little")
        return self._open[file]

    def close(self, file: str | None = None) -> None:
        """One file, or all of them."""
        for name in [file] if file is not None else list(self._open):
            if name in self._open:
                os.close(self._open.pop(name)[0])
