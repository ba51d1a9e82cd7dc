"""GPTQ over a whole decoder, layer by layer: matrices come out packed, each making up for the errors before it.

Owns the order of things and the files of packed matrices, and a `Source` that puts these files in the place of the
plain matrices (`Overlay`): to the converter they are matrices that the source already packs, whose bytes it passes on.
Leaves the algorithm to `gptq.py`, reading to `layers.py`.

Every linear map of a layer is packed on what reaches it in the model packed so far. Experts, tables and the head are
left to the converter's rounding: an expert sees too few tokens of a calibration, and a table is no product.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_gemma4.conversions import gptq
from mlx_gemma4.conversions.layers import KINDS, LayerStream, rounded, tap_linear, untap
from mlx_gemma4.conversions.recipe import Packing
from mlx_gemma4.conversions.sources import Source
from mlx_gemma4.errors import WeightsError
from mlx_gemma4.safetensors_header import Tensor, read_header

Progress = Callable[[int, int, str], Any]


def compensate(
    stream: LayerStream,
    tokens: np.ndarray,
    packings: Mapping[str, Packing | None],
    folder: Path,
    progress: Progress = lambda done, total, what: None,
) -> list[Path]:
    """Packs the linear maps of every layer into files of `folder`, one per layer; returns them in order.

    tokens: int [N, T]. packings: by module path; other modes than affine, and None, are left out. progress(done, total,
    path) follows each matrix; counts are bytes read. Raises WeightsError.
    """

    def change(path: str, weight: mx.array) -> mx.array:
        packing = packings[path]
        return weight if packing is None else rounded(weight, packing, stream.item(path).dtype)

    layers = stream.config.num_hidden_layers
    wanted = [[m for m in stream.matrices(i) if packings[stream.path(i, m)] is not None] for i in range(layers)]
    total = sum(stream.item(stream.path(i, m)).source_bytes for i, found in enumerate(wanted) for m in found)
    done, files = 0, []
    state = stream.start(tokens, change)
    for index in range(layers):
        layer = stream.layer(index)
        taps = tap_linear(layer, wanted[index])
        stream.advance(layer, index, state)
        untap(layer, taps)
        modules, packed = dict(layer.named_modules()), {}
        for matrix in wanted[index]:
            path, module = stream.path(index, matrix), modules[matrix]
            packing = packings[path]
            assert packing is not None
            # Experts take their weight in `gather_mm`; only plain linear maps have a tap.
            if matrix in taps and packing.mode == "affine" and type(module) is nn.Linear:
                inputs = taps[matrix].inputs
                parts = _pack(module.weight, inputs, packing, stream.item(path).dtype, path)
                packed |= {f"{path}.{leaf}": p for leaf, p in zip(("weight", "scales", "biases"), parts, strict=True)}
                words, scales, biases = parts
                floats = (scales.astype(mx.float32), biases.astype(mx.float32))
                module.weight = mx.dequantize(words, *floats, packing.group_size, packing.bits)
            else:
                module.weight = change(path, module.weight)
            done += stream.item(path).source_bytes
            progress(done, total, path)
        if packed:
            files.append(folder / f"calibrated-{index:03d}.safetensors")
            mx.save_safetensors(str(files[-1]), packed, metadata={"format": "mlx"})
        state = stream.advance(layer, index, state)
        del layer, modules, taps
        mx.clear_cache()
    return files


def _pack(weight: mx.array, inputs: mx.array | None, packing: Packing, dtype: str, path: str) -> list[mx.array]:
    if inputs is None:
        raise WeightsError(f"{path} was never used by the model; is config.json the right one?")
    hessian = inputs.T @ inputs
    try:
        return gptq.quantize(np.array(weight), np.array(hessian), packing, KINDS[dtype])
    except ValueError as e:
        raise WeightsError(f"{path} cannot be calibrated: {e}; is the checkpoint whole?") from None


class Overlay:
    """A source some of whose matrices come packed from files of our own instead."""

    def __init__(self, base: Source, stream: LayerStream, files: list[Path]) -> None:
        self.folder, self.name, self.repo, self.commit = base.folder, base.name, base.repo, base.commit
        self._base = base
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
        return [self._base.identity(), hashes]

    def missing_bytes(self) -> int:
        return 0  # calibration has read every shard of the text

    def start(self, files: Iterable[str]) -> None:
        """`LayerStream` started the base on all of its files."""

    def path(self, file: str) -> Path:
        return self._files[file] if file in self._files else self._base.path(file)

    def release(self, file: str) -> None:
        if file not in self._files:
            self._base.release(file)

    def close(self) -> None:
        self._base.close()
