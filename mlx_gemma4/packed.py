"""Weights packed by MLX (affine, mxfp4, nvfp4, mxfp8): which modules they replace, and how each is packed.

Owns: reading group size, bits and mode of every packed matrix off its tensors. They determine all three,
whatever the paths of config.json's overrides are spelled like, so those are not consulted: mlx-lm and
mlx-vlm write the same override under different prefixes, and one without a mode means affine there, not the
default beside it. Leaves names, types and shapes of tensors to `loading.py`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .config import Gemma4Config
from .errors import ConfigError, WeightsError

if TYPE_CHECKING:
    from .models.gemma4 import Model

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)
# The modes whose scales are bytes exist in one size each: (group size, bits) -> mode.
BYTE_SCALES = {(32, 4): "mxfp4", (16, 4): "nvfp4", (32, 8): "mxfp8"}


def pack(model: "Model", weights: dict[str, mx.array], files: dict[str, Path], config: Gemma4Config) -> None:
    """Replaces each module whose scales are in `weights` by its packed form, contents to be loaded.

    weights: tensors by path; files: where each came from. Raises ConfigError when config.json declares no
    packing or packs activations, WeightsError when a matrix is packed in a way MLX does not have.
    """
    packed = [n.removesuffix(".scales") for n in weights if n.endswith(".scales")]
    if not packed:
        return
    if config.quantization is None:
        raise ConfigError(
            f"{len(packed)} matrices are packed ({packed[0]}, ...), but config.json has no 'quantization'; "
            "copy config.json from the converted checkpoint"
        )
    if config.quantization.get("quantize_input"):
        raise ConfigError("config.json asks for packed activations; this version packs weights only")
    plain = dict(tree_flatten(model.parameters()))
    # What is no module of ours, or lacks its weight, is reported with all missing and unexpected tensors.
    known = {p for p in packed if f"{p}.weight" in plain and f"{p}.weight" in weights}
    settings = {p: _settings(p, plain[f"{p}.weight"].shape[-1], weights, files) for p in known}

    def choose(path: str, module: nn.Module) -> bool | dict[str, Any]:
        return settings.get(path, False) if hasattr(module, "to_quantized") else False

    nn.quantize(model, class_predicate=choose)


def _settings(path: str, inputs: int, weights: dict[str, mx.array], files: dict[str, Path]) -> dict[str, Any]:
    """group_size, bits and mode of one matrix with `inputs` columns before packing.

    A packed row is `inputs * bits / 32` words of 32 bits and `inputs / group_size` scales.
    """
    words, scales = weights[f"{path}.weight"], weights[f"{path}.scales"]
    found = packing_of(inputs, words.shape[-1], scales.shape[-1], scales.dtype == mx.uint8)
    if found is None:
        raise WeightsError(
            f"{files[f'{path}.weight']}: tensor {path}.weight has shape {list(words.shape)} with scales "
            f"{list(scales.shape)}; for {inputs} inputs no packing of MLX is like that"
        )
    return found


def packing_of(inputs: int, words: int, groups: int, byte_scales: bool) -> dict[str, Any] | None:
    """group_size, bits and mode of a row of `inputs` values in `words` words with `groups` scales; None: no packing."""
    bits, odd_bits = divmod(words * 32, inputs)
    group, odd_group = divmod(inputs, groups)
    if odd_bits or odd_group:
        return None
    mode = BYTE_SCALES.get((group, bits)) if byte_scales else "affine"
    if mode is None or (mode == "affine" and (bits not in AFFINE_BITS or group not in AFFINE_GROUPS)):
        return None
    return {"group_size": group, "bits": bits, "mode": mode}
