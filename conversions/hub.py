"""A Hub repository into the local Hub cache: only the files a model needs, and every failure as one line.

Owns: the list of files, the disk check before the first byte, and the translation of what the real client
(`huggingface_hub`) raises into our errors. Cache folder, token, endpoint and offline mode are the client's
own, set by HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE. Leaves progress to
`hub_progress.py`, family names to `catalog.py` and reading the files to `loading.py`.
"""

import errno
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_gemma4.conversions.hub_progress import Line, Progress, Stopped, Transfer, default_line, size
from mlx_gemma4.errors import DoesNotFitError, Gemma4Error, ModelNotFoundError, UsageError, WeightsError
from mlx_gemma4.safetensors_header import Tensor, check_header

log = logging.getLogger(__name__)

# Weights in any number of shards, configuration, tokenizer and template. Not: GGUF, PyTorch pickles, tensors
# in other names (consolidated.safetensors), and anything in a folder (`original/`; `*` also matches `/`).
NEEDED = [
    "model*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
]
NOT_NEEDED = ["*/*"]
# Tells a converted model's card the licence.
README = "README.md"
# Bytes of a download that a broken connection costs.
PIECE = 128 << 10


def download(
    repo: str,
    revision: str | None = None,
    *,
    token: str | None = None,
    progress: Progress | bool | None = None,
) -> Path:
    """The folder with `repo` at `revision` (branch, tag or commit; None: main), fetched where missing.

    progress: a callable (bytes done, bytes in all); None draws one line on stderr if that is a terminal and
    HF_HUB_DISABLE_PROGRESS_BARS is not set; False draws nothing. Within one call a dropped connection is
    taken up again where it broke (HTTP ranges). A call that failed leaves complete files in the cache and
    nothing else, so the next one goes on with the rest.

    Raises ModelNotFoundError (no such repository or revision, gated, offline and not cached), DoesNotFitError
    (disk), UsageError (not a repository id), Gemma4Error (connection lost, Hub out of order).
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import DryRunError, LocalEntryNotFoundError

    wanted: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "allow_patterns": NEEDED,
        "ignore_patterns": NOT_NEEDED,
        "library_name": "mlx-gemma4",
    }
    try:
        plan = hub.snapshot_download(repo, dry_run=True, tqdm_class=Transfer().bar_class(), **wanted)
    except DryRunError as e:
        # The Hub did not answer, or refused. As the client itself does, be content with a complete copy.
        cause = e.__cause__ or e
        try:
            found = Path(hub.snapshot_download(repo, local_files_only=True, **wanted))
        except LocalEntryNotFoundError as missing:
            raise _explain(cause, repo, revision, token, missing) from e
        log.info("%s could not be asked for (%s); using the copy in the cache", repo, cause)
        return found
    except Exception as e:
        raise _explain(e, repo, revision, token) from e

    _check_contents(repo, [f.filename for f in plan])
    missing_bytes = sum(f.file_size or 0 for f in plan if f.will_download)
    _check_disk(repo, missing_bytes)
    report = progress if callable(progress) else None
    if progress is None and missing_bytes:
        report = default_line(_at(repo.rsplit("/", 1)[-1], revision))
    transfer = Transfer(missing_bytes, report)
    try:
        bar = transfer.bar_class()
        return Path(_interruptible(lambda: hub.snapshot_download(repo, tqdm_class=bar, **wanted), transfer))
    except Exception as e:
        if transfer.error is not None:
            raise transfer.error from None
        raise _explain(e, repo, revision, token, started=True) from e
    finally:
        if isinstance(report, Line):
            report.close()


def listing(repo: str, revision: str | None = None, *, token: str | None = None) -> list[Any] | None:
    """The files of a repository that a model needs, and its README: the client's own records, nothing downloaded.

    Each has filename, file_size, commit_hash, is_cached and local_path. None when the Hub does not answer and a
    complete copy lies in the cache: `download` finds it. Raises as `download`.
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import DryRunError, LocalEntryNotFoundError

    wanted: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "allow_patterns": [*NEEDED, README],
        "ignore_patterns": NOT_NEEDED,
        "library_name": "mlx-gemma4",
    }
    try:
        files = list(hub.snapshot_download(repo, dry_run=True, tqdm_class=Transfer().bar_class(), **wanted))
    except DryRunError as e:
        cause = e.__cause__ or e
        wanted["allow_patterns"] = NEEDED
        try:
            hub.snapshot_download(repo, local_files_only=True, **wanted)
        except LocalEntryNotFoundError as missing:
            raise _explain(cause, repo, revision, token, missing) from e
        return None
    except Exception as e:
        raise _explain(e, repo, revision, token) from e
    _check_contents(repo, [f.filename for f in files])
    return files


def small_files(repo: str, commit: str, *, token: str | None = None) -> Path:
    """The folder of a repository's small files: everything in `listing` but weights. Raises as `download`."""
    import huggingface_hub as hub

    patterns = [p for p in (*NEEDED, README) if not p.endswith(".safetensors")]
    bar = Transfer().bar_class()
    try:
        return Path(
            hub.snapshot_download(
                repo, revision=commit, token=token, allow_patterns=patterns, ignore_patterns=NOT_NEEDED, tqdm_class=bar
            )
        )
    except Exception as e:
        raise _explain(e, repo, commit, token, started=True) from e


def header(repo: str, file: str, commit: str, *, token: str | None = None) -> dict[str, Tensor]:
    """The header of one file of weights, by range requests. Raises WeightsError, and as `download`."""
    import huggingface_hub as hub
    from huggingface_hub.errors import SafetensorsParsingError

    try:
        found = hub.HfApi(token=token).parse_safetensors_file_metadata(repo, file, revision=commit)
    except SafetensorsParsingError:
        raise WeightsError(f"{file} of {repo} is no safetensors file, or damaged; choose another repository") from None
    except Exception as e:
        raise _explain(e, repo, commit, token, started=True) from e
    return check_header(f"{file} of {repo}", {name: vars(info) for name, info in found.tensors.items()})


def fetch(repo: str, file: str, commit: str, transfer: Transfer, *, token: str | None = None) -> Path:
    """One file into the cache. Setting `transfer.stop` ends it. Raises as `download`, and Stopped."""
    import huggingface_hub as hub
    from huggingface_hub import constants

    # What arrived of a piece is lost with the connection: in pieces of 10 MB, the client's own, a line that breaks more
    # often never gets on.
    constants.DOWNLOAD_CHUNK_SIZE = min(constants.DOWNLOAD_CHUNK_SIZE, PIECE)
    try:
        bar: Any = transfer.bar_class()
        return Path(hub.hf_hub_download(repo, file, revision=commit, token=token, tqdm_class=bar))
    except Stopped:
        raise
    except Exception as e:
        raise _explain(e, repo, commit, token, started=True) from e


def cache_folder() -> tuple[Path, int]:
    """The client's cache folder and the bytes free where it is, or will be."""
    return _free_disk()


def explain(error: BaseException, repo: str, token: str | None = None) -> BaseException:
    """Our error for what the client raised about `repo`, or `error` itself if it is of no known kind."""
    return _explain(error, repo, None, token, started=True)


def _check_contents(repo: str, files: list[str]) -> None:
    if "config.json" not in files:
        raise ModelNotFoundError(f"{repo} has no config.json; choose a repository that holds a model")
    if not any(f.endswith(".safetensors") for f in files):
        raise ModelNotFoundError(
            f"{repo} has no model*.safetensors, and GGUF or other formats are not read; "
            "choose a repository with safetensors"
        )


def _check_disk(repo: str, needed: int) -> None:
    cache, free = _free_disk()
    if needed > free:
        raise DoesNotFitError(
            f"{repo} needs {size(needed)} more on disk and {cache} has {size(free)} free; "
            "make room or set HF_HOME to a folder on another disk"
        )


def _free_disk() -> tuple[Path, int]:
    """The client's cache folder and the bytes free where it is, or will be."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).expanduser()
    existing = next(p for p in (cache, *cache.parents) if p.exists())
    return cache, shutil.disk_usage(existing).free


def _interruptible(fetch: Callable[[], str], transfer: Transfer) -> str:
    """Runs `fetch` on a helper thread, so that Ctrl-C in this one ends the transfer.

    The client's own pool would wait for the files in flight, which can be many gigabytes; here the next
    chunk of each of them meets `transfer.stop` and gives up.
    """
    with ThreadPoolExecutor(1) as pool:
        try:
            return pool.submit(fetch).result()
        except BaseException:
            abort(transfer)
            raise


def abort(transfer: Transfer) -> None:
    """Ends a transfer from another thread."""
    transfer.stop.set()
    if "hf_xet" in sys.modules:
        # Transfers in Rust never come by `stop`. Private name; without it Ctrl-C waits for the file.
        with suppress(ImportError):
            from huggingface_hub.utils._xet import abort_xet_session

            abort_xet_session()


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The exception and what led to it, outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _explain(
    error: BaseException,
    repo: str,
    revision: str | None,
    token: str | None,
    missing: BaseException | None = None,
    started: bool = False,
) -> BaseException:
    """Our error for what the client raised, or `error` itself if it is of no known kind.

    missing: what looking into the cache raised, where that was tried. started: bytes were flowing already.
    """
    from huggingface_hub import constants, errors, get_token

    chain = list(_chain(error))
    host, cache, what = constants.ENDPOINT, constants.HF_HUB_CACHE, _at(repo, revision)
    has_token = bool(token or get_token())

    def first(kind: type) -> Any:
        return next((e for e in chain if isinstance(e, kind)), None)

    if first(errors.HFValidationError):
        return UsageError(f"{repo!r} is not a Hub repository id; those look like owner/name")
    if any(_is_disk_full(e) for e in chain):
        free = size(_free_disk()[1])
        return DoesNotFitError(
            f"the disk filled up while downloading {what} ({cache} has {free} free); "
            "make room and run the same command again: complete files are kept"
        )
    if first(errors.GatedRepoError):
        if has_token:
            return ModelNotFoundError(f"your token has no access to {repo}; ask for it at {host}/{repo}")
        return ModelNotFoundError(
            f"{repo} is gated; accept its terms at {host}/{repo}, then set HF_TOKEN or run `hf auth login`"
        )
    if first(errors.RevisionNotFoundError):
        return ModelNotFoundError(f"{repo} has no revision {revision!r}; {host}/{repo}/commits lists them")
    if first(errors.RepositoryNotFoundError):
        private = "hidden from your token" if has_token else "private: then set HF_TOKEN"
        return ModelNotFoundError(f"no folder {repo} here and no such repository on {host} (or it is {private})")
    if first(errors.OfflineModeIsEnabled):
        partly = "only partly" if type(missing).__name__ == "IncompleteSnapshotError" else "not"
        return ModelNotFoundError(
            f"HF_HUB_OFFLINE is set and {what} is {partly} in the cache {cache}; unset it once to download"
        )
    if http := first(errors.HfHubHTTPError):
        status = http.response.status_code
        if status in (401, 403):
            return ModelNotFoundError(
                f"{host} refuses access to {what} ({status}); check HF_TOKEN or run `hf auth login`"
            )
        return Gemma4Error(f"{host} answered {status} for {what}; try again later")
    if any(_is_network(e) for e in chain):
        if started:
            return Gemma4Error(
                f"the connection was lost while downloading {what}; run the same command again: complete files are kept"
            )
        return ModelNotFoundError(
            f"cannot reach {host}, and {what} is not in the cache {cache}; "
            "check the connection and run the same command again"
        )
    if first(errors.FileMetadataError) or first(json.JSONDecodeError):
        return Gemma4Error(f"{host} does not answer as a Hub does; check HF_ENDPOINT, the proxy or a login page")
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return Gemma4Error(
            f"cannot write to {error.filename or cache} ({os.strerror(error.errno)}); "
            "set HF_HOME to a folder of your own"
        )
    return error


def _is_disk_full(error: BaseException) -> bool:
    # hf_xet reports it as text only.
    number = error.errno if isinstance(error, OSError) else None
    return number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def _is_network(error: BaseException) -> bool:
    # The client moved from httpx to httpx2; neither is imported here just to name its exceptions.
    transport = type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2")
    # The client's words for a body that ended early.
    short = "Consistency check failed" in str(error)
    return transport or short or isinstance(error, ConnectionError | TimeoutError)


def _at(repo: str, revision: str | None) -> str:
    return f"{repo}@{revision}" if revision else repo
