"""The per-layer embedding table of E2B and E4B left in its file: rows are read when their tokens come.

Owns the table that stands in for `embed_tokens_per_layer` (`DiskTable`), finding it in a checkpoint's headers, and when
rows are read. Leaves `load(..., ple="disk")` to `loading.py` and what the rows are used for to `models/text.py`.

The table is the largest matrix of these models (E2B: 262,144 rows of 35 * 256 values, 4.7 GB in bfloat16), and a token
needs one row of it. Rows come by `preadv` into a buffer of their own, not through a mapping: a mapping's pages would
count as resident memory until the system takes them back. What the system's page cache keeps is its own affair.

Reading needs the token's value, which the lazy graph does not: `__call__` waits until the tokens are computed. In
pipelined decoding that would leave the device idle while the next step's graph is built, so `generation.py` builds it
within `late()`: rows are then arrays of NaN that are filled in when the block ends. MLX documents that writing through
a buffer's view changes the array (usage/numpy: "changes to the view are reflected in the array").
"""

import os
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .config import TextConfig
from .conversions.names import to_mlx_name
from .errors import UsageError, WeightsError
from .packed import packing_of
from .safetensors_header import Tensor

PATH = "language_model.model.embed_tokens_per_layer"
LEAVES = ("weight", "scales", "biases")

_FLOATS = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
# numpy has no bfloat16, so rows are held as the bits they are.
_BITS: dict[str, Any] = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32, "U32": np.uint32, "U8": np.uint8}


@dataclass(frozen=True)
class _Stored:
    """One tensor of the table: [rows, width] at byte `begin` of an open file."""

    file: Path
    handle: int
    begin: int
    dtype: str
    width: int

    @property
    def row_bytes(self) -> int:
        return self.width * np.dtype(_BITS[self.dtype]).itemsize

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Rows by number, any order, into `out` uint8 [len(rows), row_bytes]. Raises WeightsError."""
        size, view = self.row_bytes, out.reshape(-1).data
        for i, row in enumerate(rows.tolist()):
            self._fill(view[i * size : (i + 1) * size], self.begin + row * size)

    def read_block(self, first: int, out: np.ndarray) -> None:
        """Rows from `first` on into `out` uint8 [count, row_bytes]. Raises WeightsError."""
        self._fill(out.reshape(-1).data, self.begin + first * self.row_bytes)

    def _fill(self, part: memoryview, at: int) -> None:
        done = 0
        while done < len(part):
            try:
                count = os.preadv(self.handle, [part[done:]], at + done)
            except OSError as e:
                raise WeightsError(
                    f"{self.file} cannot be read any more ({e.strerror}); load the model again"
                ) from None
            if not count:
                raise WeightsError(f"{self.file} became shorter while it was in use; download it again")
            done += count


class DiskTable:
    """Called like `nn.Embedding`: tokens int [B, L] -> rows [B, L, width], in the type the model computes in.

    The values are those of the table in memory, bit for bit, packed or not. No module: nothing of it is in
    `model.parameters()`. Calls from several threads do not meet.
    """

    def __init__(self, parts: dict[str, _Stored], rows: int, packing: dict[str, Any] | None, dtype: mx.Dtype):
        self._parts = parts
        self._packing = packing
        self._dtype = dtype
        self.rows = rows
        handles = {part.handle for part in parts.values()}
        weakref.finalize(self, lambda: [os.close(handle) for handle in handles])

    @property
    def file(self) -> Path:
        return self._parts["weight"].file

    @property
    def nbytes(self) -> int:
        """Bytes of the table where it lies: what memory does not hold."""
        return self.rows * sum(part.row_bytes for part in self._parts.values())

    @property
    def stored_dtype(self) -> mx.Dtype:
        """Of the plain table's values, or of a packed one's words."""
        return _FLOATS.get(self._parts["weight"].dtype, mx.uint32)

    @property
    def is_packed(self) -> bool:
        return self._packing is not None

    def __call__(self, tokens: mx.array) -> mx.array:
        """Waits for `tokens`, unless within `late()`. Raises UsageError for ids beyond the table, WeightsError."""
        waiting = getattr(_now, "waiting", None)
        if waiting is not None:
            parts = {leaf: mx.array(self._empty(leaf, tokens.size)) for leaf in self._parts}
            waiting.append((self, tokens, parts))
            return self._unpacked(parts).reshape(*tokens.shape, -1)
        # A prompt repeats its tokens: each row is read once.
        unique, places = np.unique(self._checked(tokens), return_inverse=True)
        buffers = {leaf: self._empty(leaf, unique.size) for leaf in self._parts}
        for leaf, part in self._parts.items():
            part.read(unique, buffers[leaf].view(np.uint8))
        rows = self._unpacked({leaf: mx.array(buffer) for leaf, buffer in buffers.items()})
        return rows[mx.array(places.reshape(tokens.shape))]

    def blocks(self, rows: int) -> Iterator[mx.array]:
        """The whole table, so many rows at a time: [rows, width]. Raises WeightsError."""
        for first in range(0, self.rows, rows):
            count = min(rows, self.rows - first)
            buffers = {leaf: self._empty(leaf, count) for leaf in self._parts}
            for leaf, part in self._parts.items():
                part.read_block(first, buffers[leaf].view(np.uint8))
            yield self._unpacked({leaf: mx.array(buffer) for leaf, buffer in buffers.items()})

    def _fill(self, tokens: mx.array, parts: dict[str, mx.array]) -> None:
        wanted = self._checked(tokens)
        for leaf, part in self._parts.items():
            part.read(wanted, np.array(parts[leaf], copy=False).view(np.uint8))

    def _empty(self, leaf: str, rows: int) -> np.ndarray:
        # All bits set is NaN in every type of plain values and scales: rows used before they are read are seen.
        part = self._parts[leaf]
        kind = np.dtype(_BITS[part.dtype])
        return np.full((rows, part.width), np.iinfo(kind).max, kind)

    def _checked(self, tokens: mx.array) -> np.ndarray:
        found = np.asarray(tokens).reshape(-1)
        if found.size and (found.min() < 0 or found.max() >= self.rows):
            worst = found.max() if found.max() >= self.rows else found.min()
            raise UsageError(f"token {worst} is not among the {self.rows:,} of this model; is it the right tokenizer?")
        return found

    def _unpacked(self, parts: dict[str, mx.array]) -> mx.array:
        """[N, width] from the bits of N rows, computed as `nn.Embedding` and `nn.QuantizedEmbedding` do."""
        typed = {
            leaf: value.view(_FLOATS[kind]).astype(self._dtype)
            if (kind := self._parts[leaf].dtype) in _FLOATS
            else value
            for leaf, value in parts.items()
        }
        if self._packing is None:
            return typed["weight"]
        return mx.dequantize(typed["weight"], typed["scales"], typed.get("biases"), **self._packing)


_now = threading.local()


@contextmanager
def late() -> Iterator[None]:
    """Rows asked for within are read at the end, when their tokens are computed; the device works on meanwhile.

    For code that only builds a graph: whatever is evaluated within sees NaN. Not to be nested. After an error nothing
    is read.
    """
    _now.waiting = []
    try:
        yield
        waiting = _now.waiting
    finally:
        _now.waiting = None
    for table, tokens, parts in waiting:
        table._fill(tokens, parts)


def open_table(headers: Mapping[Path, Mapping[str, Tensor]], config: TextConfig, dtype: mx.Dtype) -> DiskTable:
    """The table of a checkpoint in either layout, plain or packed.

    headers: of its files, as `loading.shards` gives them. dtype: of the rows handed out. Raises UsageError for a model
    without per-layer embeddings, WeightsError when the table is missing or has another shape.
    """
    if not config.hidden_size_per_layer_input:
        raise UsageError(
            "this model has no per-layer embeddings to leave on disk (E2B and E4B do); leave it at ple='memory'"
        )
    found = _find(headers)
    rows, width = config.vocab_size_per_layer_input, config.num_hidden_layers * config.hidden_size_per_layer_input
    packing, wanted = None, {"weight": (rows, width)}
    if "scales" in found:
        weight, scales = found["weight"][1], found["scales"][1]
        packing = packing_of(width, weight.shape[-1], scales.shape[-1], scales.dtype == "U8")
        if packing is not None:
            wanted = {"weight": (rows, width * packing["bits"] // 32), "scales": (rows, width // packing["group_size"])}
            if packing["mode"] == "affine":
                wanted["biases"] = wanted["scales"]
    shapes = {leaf: tensor.shape for leaf, (_, tensor) in found.items()}
    kinds = [tensor.dtype for leaf, (_, tensor) in found.items() if leaf != "weight" or packing is None]
    byte_scales = packing is not None and packing["mode"] != "affine"
    if shapes != wanted or any(kind not in (("U8",) if byte_scales else _FLOATS) for kind in kinds):
        file, tensor = found["weight"]
        raise WeightsError(
            f"{file}: tensor {PATH}.weight has shape {list(tensor.shape)} in {tensor.dtype}, config.json asks for "
            f"{[rows, width]}, plain or packed; is it the right one?"
        )
    handles: dict[Path, int] = {}
    parts = {}
    for leaf, (file, tensor) in found.items():
        if file not in handles:
            handles[file] = _open(file)
        start = 8 + int.from_bytes(os.pread(handles[file], 8, 0), "little")
        parts[leaf] = _Stored(file, handles[file], start + tensor.begin, tensor.dtype, tensor.shape[-1])
    return DiskTable(parts, rows, packing, dtype)


def describe(headers: Mapping[Path, Mapping[str, Tensor]]) -> tuple[Path, int]:
    """The file of the table and its bytes, from headers alone. Raises WeightsError when there is none."""
    found = _find(headers)
    return found["weight"][0], sum(tensor.end - tensor.begin for _, tensor in found.values())


def _find(headers: Mapping[Path, Mapping[str, Tensor]]) -> dict[str, tuple[Path, Tensor]]:
    found: dict[str, tuple[Path, Tensor]] = {}
    for file, tensors in headers.items():
        for name, tensor in tensors.items():
            path, _, leaf = to_mlx_name(name).rpartition(".")
            if path == PATH and leaf in LEAVES:
                found[leaf] = file, tensor
    if "weight" not in found:
        raise WeightsError(f"no file holds tensor {PATH}.weight, which config.json asks for; download it again")
    return found


def _open(file: Path) -> int:
    try:
        handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        raise WeightsError(f"{file} cannot be read ({e.strerror})") from None
    if hasattr(os, "posix_fadvise"):
        # Rows lie far apart: what the system reads ahead of one is not the next.
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
    return handle
