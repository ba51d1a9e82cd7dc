"""GPTQ over a whole decoder, layer by layer: matrices come out packed, each making up for the errors before it.

Owns the order of things and the files of packed matrices, and a `Source` that puts these files in the place of the
plain matrices (`Overlay`): to the converter they are matrices that the source already packs, whose bytes it passes on.
Leaves the algorithm to `gptq.py`, reading to `layers.py`, a layer's run to `bounded.py`.

Every linear map of a layer is packed on what reaches it in the model packed so far. Experts, tables and the head are
left to the converter's rounding: an expert sees too few tokens of a calibration, and a table is no product.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gemma4.conversions import gptq
from mlx_gemma4.conversions.bounded import Layer
from mlx_gemma4.conversions.layers import KINDS, LayerStream, rounded, row_blocks
from mlx_gemma4.conversions.recipe import Packing
from mlx_gemma4.conversions.scratch import Scratch
from mlx_gemma4.conversions.sources import Source
from mlx_gemma4.conversions.states import States
from mlx_gemma4.errors import WeightsError
from mlx_gemma4.safetensors_header import Tensor, read_header

Progress = Callable[[int, int, str], Any]
_PARTS = ("weight", "scales", "biases")


def compensate(
    stream: LayerStream,
    tokens: np.ndarray,
    packings: Mapping[str, Packing | None],
    scratch: Scratch,
    progress: Progress = lambda done, total, what: None,
) -> list[Path]:
    """Packs the linear maps of every layer into files of `scratch`, one per matrix; returns them in order.

    tokens: int [N, T]. packings: by module path; other modes than affine, and None, are left out. progress(done, total,
    path) follows each matrix; counts are bytes read. What an earlier run packed is taken as it is. Raises WeightsError,
    DoesNotFitError.
    """
    return _Compensation(stream, tokens, packings, scratch, progress).run()


class _Compensation:
    def __init__(
        self,
        stream: LayerStream,
        tokens: np.ndarray,
        packings: Mapping[str, Packing | None],
        scratch: Scratch,
        progress: Progress,
    ) -> None:
        self.stream, self.tokens, self.packings, self.progress = stream, tokens, packings, progress
        self.scratch, self.states = scratch, States(scratch, stream)
        layers = stream.config.num_hidden_layers
        self.wanted = [[m for m in stream.matrices(i) if self._gptq(stream.path(i, m))] for i in range(layers)]
        self.paths = [stream.path(i, m) for i, found in enumerate(self.wanted) for m in found]
        self.total = sum(stream.item(path).source_bytes for path in self.paths)
        self.done = 0

    def _gptq(self, path: str) -> bool:
        """Whether it is a linear map to be packed in affine mode."""
        packing = self.packings[path]
        return packing is not None and packing.mode == "affine" and "switch_glu" not in path

    def run(self) -> list[Path]:
        last = len(self.wanted) - 1
        if not all(self.scratch.has(self._name(path)) for path in self.paths):
            begun = next((i for i in range(last + 1) if self.states.has("packed", i)), None)
            if begun is None:
                state = self.stream.start(self.tokens, self._rounded)
                self.states.save_inputs("packed", state)
                self.states.save("packed", 0, state)
            for index in range(begun or 0):
                for matrix in self.wanted[index]:
                    self._count(self.stream.path(index, matrix))
            for index in range(begun or 0, last + 1):
                self._layer(index, last)
        self.states.drop("packed", last)
        self.states.drop_inputs("packed")
        return [self.scratch.path(self._name(path)) for path in self.paths]

    def _layer(self, index: int, last: int) -> None:
        # Each matrix is read twice or thrice: not worth keeping.
        layer, state = Layer(self.stream, index, kept=0), self.states.load("packed", index)

        def visit(matrix: str, x: mx.array) -> None:
            path = self.stream.path(index, matrix)
            if matrix in self.wanted[index]:
                if not self.scratch.has(self._name(path)):
                    self._pack(path, x)
                self._count(path)

        layer.run(state, visit=visit)
        if index == last:
            return
        held: dict[str, dict[str, mx.array]] = {}

        def rows(matrix: str, begin: int, end: int) -> mx.array:
            path = self.stream.path(index, matrix)
            if matrix not in self.wanted[index]:
                return self._rounded(path, layer.rows(matrix, begin, end))
            if matrix not in held:
                held.clear()  # one packed matrix at a time
                held[matrix] = self.scratch.load(self._name(path))
            packing = self.packings[path]
            assert packing is not None
            words, *floats = (held[matrix][f"{path}.{leaf}"][begin:end] for leaf in _PARTS)
            scales, biases = (f.astype(mx.float32) for f in floats)
            return mx.dequantize(words, scales, biases, packing.group_size, packing.bits)

        self.states.save("packed", index + 1, layer.run(state, rows))
        self.states.drop("packed", index)
        mx.clear_cache()

    def _rounded(self, path: str, weight: mx.array) -> mx.array:
        packing = self.packings[path]
        return weight if packing is None else rounded(weight, packing, self.stream.item(path).dtype)

    def _pack(self, path: str, inputs: mx.array) -> None:
        item, packing = self.stream.item(path), self.packings[path]
        assert packing is not None
        parts: list[list[mx.array]] = []
        try:
            factors = gptq.factors(inputs)
            for begin, end in row_blocks(item.rows, item.columns):
                weight = np.array(self.stream.rows(item.name, begin, end))
                parts.append(gptq.quantize(weight, factors, packing, KINDS[item.dtype]))
        except ValueError as e:
            raise WeightsError(f"{path} cannot be calibrated: {e}; is the checkpoint whole?") from None
        whole = (mx.concatenate(list(blocks)) for blocks in zip(*parts, strict=True))
        self.scratch.save(self._name(path), {f"{path}.{leaf}": p for leaf, p in zip(_PARTS, whole, strict=True)})

    def _name(self, path: str) -> str:
        return f"calibrated-{self.paths.index(path):04d}"

    def _count(self, path: str) -> None:
        self.done += self.stream.item(path).source_bytes
        self.progress(self.done, self.total, path)


class Overlay:
    """A source some of whose matrices come packed from files of our own instead."""

    def __init__(self, base: Source, stream: LayerStream, files: list[Path]) -> None:
        self.folder, self.name, self.repo, self.commit = base.folder, base.name, base.repo, base.commit
        self.base = base
        self._files = {file.name: file for file in files}
        own: dict[str, dict[str, Tensor]] = {file.name: read_header(file) for file in files}
        replaced = {
            at
            for header in own.values()
            for name in header
            if name in stream.items
            for at in stream.items[name].sources
        }
        kept = {
            file: {name: t for name, t in header.items() if (file, name) not in replaced}
            for file, header in base.headers.items()
        }
        self.headers = {file: header for file, header in kept.items() if header} | own

    def identity(self) -> Any:
        hashes = []
        for file in self._files.values():
            with file.open("rb") as opened:
                hashes.append(hashlib.file_digest(opened, "sha256").hexdigest())
        return [self.base.identity(), hashes]

    def missing_bytes(self) -> int:
        return self.base.missing_bytes()

    def start(self, files: Iterable[str]) -> None:
        self.base.start([file for file in files if file not in self._files])

    def path(self, file: str) -> Path:
        return self._files[file] if file in self._files else self.base.path(file)

    def release(self, file: str) -> None:
        if file not in self._files:
            self.base.release(file)

    def close(self) -> None:
        self.base.close()
