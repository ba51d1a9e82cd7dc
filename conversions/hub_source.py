"""A Hub repository as the source of a conversion: headers first, then shard after shard while others are converted.

Owns the order of downloads, one ahead of the conversion, and freeing what was downloaded for it. Leaves requests and
their errors to `hub.py`, folders to `sources.py`.
"""

import json
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_gemma4.conversions import hub
from mlx_gemma4.conversions.hub_progress import Transfer
from mlx_gemma4.errors import DoesNotFitError, WeightsError
from mlx_gemma4.safetensors_header import Tensor, read_header

INDEX = "model.safetensors.index.json"


class HubRepo:
    """A repository at one commit. Nothing but headers and small files is downloaded before `start`.

    delete_source: a file that this object downloaded, or that `mine` names, is removed when it is released; files that
    were in the cache before stay there.
    """

    def __init__(self, repo: str, files: list[Any], token: str | None = None, delete_source: bool = False) -> None:
        """files: of `hub.listing`. Raises Gemma4Error."""
        self.repo: str | None = repo
        self.name = self._repo = repo
        self.commit: str | None = files[0].commit_hash
        self._at: str = files[0].commit_hash
        self.delete_source = delete_source
        self.whole = False  # whether all of it is needed before any file can be released
        self.mine: set[str] = set()
        # Called on the downloading thread with a file's name when it has come.
        self.on_fetched: Callable[[str], Any] = lambda file: None
        # Called with (bytes done, bytes in all) of the file being downloaded.
        self.progress: Callable[[int, int], Any] | None = None
        self._token = token
        self.folder = hub.small_files(repo, self._at, token=token)
        listed = {f.filename: f for f in files}
        names = sorted(n for n in listed if n.endswith(".safetensors"))
        if INDEX in listed:
            names = _indexed(self.folder / INDEX, repo, set(names))
        self._files = {name: listed[name] for name in names}
        with ThreadPoolExecutor(4) as pool:
            self.headers: dict[str, dict[str, Tensor]] = dict(zip(names, pool.map(self._header, names), strict=True))
        self._pool = ThreadPoolExecutor(1)
        self._transfer = Transfer()
        self._waiting: list[str] = []
        self._coming: dict[str, Future[Path]] = {}

    def _header(self, file: str) -> dict[str, Tensor]:
        record = self._files[file]
        if record.is_cached:
            return read_header(Path(record.local_path))
        return hub.header(self._repo, file, self._at, token=self._token)

    def identity(self) -> Any:
        return [self.repo, self.commit]

    def missing_bytes(self) -> int:
        """With `delete_source`, what lies on the disk at a time: a shard and the one that comes meanwhile."""
        missing = (f for name, f in self._files.items() if not f.is_cached and name not in self.mine)
        sizes = sorted((f.file_size or 0 for f in missing), reverse=True)
        return sum(sizes[:2] if self.delete_source and not self.whole else sizes)

    def start(self, files: Iterable[str]) -> None:
        self._waiting = list(files)
        self._fetch_next()

    def path(self, file: str) -> Path:
        while file not in self._coming:
            self._fetch_next()
        found = self._coming[file].result()
        self._fetch_next()
        return found

    def _fetch_next(self) -> None:
        if self._waiting:
            file = self._waiting.pop(0)
            self._coming[file] = self._pool.submit(self._fetch, file)

    def _fetch(self, file: str) -> Path:
        record = self._files[file]
        if record.is_cached:
            return Path(record.local_path)
        self._transfer.total, self._transfer.report = record.file_size or 0, self.progress
        self._transfer.counts.clear()
        path = hub.fetch(self._repo, file, self._at, self._transfer, token=self._token)
        if read_header(path) != self.headers[file]:
            raise WeightsError(
                f"{path} is not what its header on the Hub says; delete it and run the same command again"
            )
        self.mine.add(file)
        self.on_fetched(file)
        return path

    def release(self, file: str) -> None:
        if self.delete_source and file in self.mine:
            path = Path(self._files[file].local_path)
            # The cache keeps contents as blobs; the snapshot has links to them.
            for part in (path.resolve(), path):
                with suppress(FileNotFoundError):
                    part.unlink()

    def close(self) -> None:
        if any(not f.done() for f in self._coming.values()):
            hub.abort(self._transfer)
        self._pool.shutdown(wait=True, cancel_futures=True)


def _indexed(index: Path, repo: str, present: set[str]) -> list[str]:
    """The files of weights an index names, in order. Raises WeightsError."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise WeightsError(f"{index.name} of {repo} is damaged; choose another repository or revision") from None
    if missing := [n for n in names if n not in present]:
        raise WeightsError(f"{repo} lacks {missing[0]}, which its {index.name} names; choose another revision")
    return names


def check_disk(source: Any, target: Path, needed: int) -> None:
    """Raises DoesNotFitError unless `needed` bytes fit beside the target, and what is still to come into the cache."""
    existing = next(p for p in (target.parent, *target.parent.parents) if p.exists())
    missing, cache = source.missing_bytes(), None
    if missing:
        folder, free = hub.cache_folder()
        cache = next(p for p in (folder, *folder.parents) if p.exists())
        if missing > free:
            raise DoesNotFitError(
                f"{source.name} needs {hub.size(missing)} in {folder}, which has {hub.size(free)} free; make room, "
                "give --delete-source, or set HF_HOME to a folder on another disk"
            )
    same = cache is not None and cache.stat().st_dev == existing.stat().st_dev
    total, free = needed + (missing if same else 0), shutil.disk_usage(existing).free
    if total > free:
        download = f" and {hub.size(missing)} of downloads" if same else ""
        raise DoesNotFitError(
            f"{target} takes {hub.size(needed)}{download}, and {existing} has {hub.size(free)} free; "
            "make room or choose another disk"
        )
