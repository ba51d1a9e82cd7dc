"""The header of a safetensors file, read and checked before any tensor is.

Owns: telling a truncated, empty or damaged file from a good one by its first kilobytes and its length, so
that the error names the file and the first tensor that does not fit. Leaves the values to MLX and names and
shapes to `loading.py`. Format: 8 bytes with the header's length (little endian), the header as JSON, then
the tensors.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import WeightsError

# Bytes per element of the types MLX reads; F64 and packed 8-bit floats are not among them.
SIZES = {"F32": 4, "BF16": 2, "F16": 2, "U32": 4, "I32": 4, "U8": 1, "I8": 1, "BOOL": 1}
SIZES |= {"U16": 2, "I16": 2, "U64": 8, "I64": 8, "C64": 8}

# The format's own limit.
MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class Tensor:
    """One entry of the header."""

    dtype: str  # a key of SIZES
    shape: tuple[int, ...]
    begin: int  # bytes, counted from the end of the header
    end: int


def read_header(path: Path) -> dict[str, Tensor]:
    """Name -> tensor of one file, in file order.

    Raises WeightsError when the file is missing, empty, cut short, longer than its header says, or damaged.
    """
    try:
        length = path.stat().st_size
        with path.open("rb") as f:
            first = f.read(8)
            declared = int.from_bytes(first, "little")
            if length < 8:
                raise WeightsError(f"{path} is {'empty' if not length else 'cut short'}; download it again")
            if first == b"version ":
                raise WeightsError(f"{path} is a git-lfs pointer, not the weights; run `git lfs pull` there")
            if declared > MAX_HEADER:
                raise WeightsError(f"{path} is not a safetensors file, or damaged; download it again")
            if declared > length - 8:
                raise WeightsError(f"{path} ends within its header; download it again")
            header = json.loads(f.read(declared))
    except FileNotFoundError:
        raise WeightsError(f"{path} is missing; download it again") from None
    except OSError as e:
        raise WeightsError(f"{path} cannot be read ({e.strerror})") from None
    except ValueError:
        raise WeightsError(f"the header of {path} is damaged; download it again") from None
    if not isinstance(header, dict):
        raise WeightsError(f"the header of {path} is damaged; download it again")

    return check_header(str(path), header, 8 + declared, length)


def check_header(where: str, header: dict[str, Any], start: int = 0, length: int | None = None) -> dict[str, Tensor]:
    """Name -> tensor, in file order, of a header that was read: of the file called `where` in messages.

    start: bytes before the first tensor. length: of the file, None where it is not known. Raises WeightsError.
    """
    entries = {k: _entry(where, k, v) for k, v in header.items() if k != "__metadata__"}
    tensors = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    held, at = None if length is None else length - start, 0
    for name, tensor in tensors.items():
        if held is not None and tensor.end > held:
            raise WeightsError(
                f"{where} is cut short: tensor {name} ends at byte {start + tensor.end}, "
                f"the file at {length}; download it again"
            )
        if tensor.begin != at:
            raise WeightsError(f"{where} is damaged: tensor {name} does not follow the one before; download it again")
        at = tensor.end
    if held is not None and at != held:
        raise WeightsError(f"{where} is damaged: {held - at} bytes follow the last tensor; download it again")
    return tensors


def _entry(path: str, name: str, raw: Any) -> Tensor:
    try:
        begin, end = raw["data_offsets"]
        tensor = Tensor(str(raw["dtype"]), tuple(raw["shape"]), begin, end)
        whole = all(isinstance(n, int) and n >= 0 for n in (*tensor.shape, begin, end))
    except (KeyError, TypeError, ValueError):
        tensor, whole = None, False
    if tensor is None or not whole:
        raise WeightsError(f"{path} is damaged: the entry of tensor {name} is incomplete; download it again")
    if tensor.dtype not in SIZES:
        raise WeightsError(f"{path}: tensor {name} is stored as {tensor.dtype}, which is not read; convert it to BF16")
    needed, found = math.prod(tensor.shape) * SIZES[tensor.dtype], tensor.end - tensor.begin
    if needed != found:
        raise WeightsError(
            f"{path} is damaged: tensor {name} of shape {list(tensor.shape)} in {tensor.dtype} takes "
            f"{needed} bytes, not {found}; download it again"
        )
    return tensor
