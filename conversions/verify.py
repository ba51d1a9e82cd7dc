"""Looks at a finished model folder: files against their record, tensors against config.json, every value, one token.

Owns the order of the checks, cheapest first, and what each reports. Leaves headers and shapes to `loading.py` and
`plan.py`, values to `weight_check.py`.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_gemma4.config import Gemma4Config
from mlx_gemma4.conversions.files import RECORD
from mlx_gemma4.conversions.hub_progress import size
from mlx_gemma4.conversions.plan import build
from mlx_gemma4.errors import Gemma4Error, ModelNotFoundError, WeightsError
from mlx_gemma4.loading import load_model, shards

_CHUNK = 8 << 20


def verify(folder: Path, *, quick: bool = False) -> Iterator[tuple[str, str]]:
    """(check, what was found) for each check as it passes. Raises Gemma4Error for the first that does not.

    files: lengths and, unless `quick`, SHA-256 as recorded at the conversion; a folder without a record passes, and the
    result says so. tensors: names and shapes against config.json. values: no NaN, none absurd. token: the model loads
    and computes finite logits.
    """
    if not folder.is_dir():
        raise ModelNotFoundError(f"there is no folder {folder}")
    config = Gemma4Config.from_folder(folder)
    yield "files", _files(folder, quick)
    headers = {path.name: header for path, header in shards(folder).items()}
    plan = build(headers, config, lambda path: None, None)
    packed = sum(item.stored is not None for item in plan.items)
    total = sum(t.end - t.begin for header in headers.values() for t in header.values())
    yield "tensors", f"{len(plan.items):,} matrices and vectors, {packed:,} of them packed, {size(total)}"
    if quick:
        return
    model = load_model(folder, check=True, config=config)
    yield "values", "every value is a number"
    import mlx.core as mx

    if not mx.all(mx.isfinite(model(mx.array([[2]])))).item():
        raise WeightsError(f"{folder} computes NaN or infinite logits; convert it again")
    yield "token", "the model loads and computes"


def record_of(folder: Path) -> dict[str, Any] | None:
    """conversion.json of a folder that this package converted, else None. Raises Gemma4Error when it is damaged."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(record["files"], dict)
        return record
    except (ValueError, KeyError, TypeError, AssertionError):
        raise Gemma4Error(f"{path} is damaged; convert again, or delete it to do without its hashes") from None


def _files(folder: Path, quick: bool) -> str:
    record = record_of(folder)
    if record is None:
        return f"no {RECORD}, so there are no hashes to compare"
    for name, known in record["files"].items():
        path = folder / name
        if not path.is_file():
            raise WeightsError(f"{path} is missing; convert or download it again")
        if path.stat().st_size != known["bytes"]:
            raise WeightsError(
                f"{path} has {path.stat().st_size:,} bytes, not the {known['bytes']:,} it was written with; "
                "convert or download it again"
            )
        if not quick and _sha256(path) != known["sha256"]:
            raise WeightsError(f"{path} changed since it was written; convert or download it again")
    return f"{len(record['files'])} files as they were written" + (" (lengths only)" if quick else "")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_CHUNK):
            digest.update(part)
    return digest.hexdigest()
