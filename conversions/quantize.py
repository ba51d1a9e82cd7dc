"""Which tensors of a loaded model are quantized, and how.

Owns the choice per module and the record of it that goes into config.json. Small models that fit in memory only: the
streaming converter for published sizes is a later addition, and recipes come with it.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_gemma4.errors import UsageError
from mlx_gemma4.models.gemma4 import Model

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
# The router decides which experts run; below 8 bits its choices change.
ROUTER_BITS = 8


def quantize_model(model: Model, bits: int, group_size: int = 64) -> dict[str, Any]:
    """Quantizes every linear map and embedding of `model` in place (affine mode), the router at 8 bits.

    Modules whose input width is no multiple of `group_size` stay as they are. Returns the `quantization` entry for
    config.json: group_size, bits, mode, and one override per module that differs. Raises UsageError.
    """
    if bits not in BITS:
        raise UsageError(f"--bits {bits}: allowed are {', '.join(map(str, BITS))}")
    if group_size not in GROUP_SIZES:
        raise UsageError(f"--group-size {group_size}: allowed are {', '.join(map(str, GROUP_SIZES))}")
    record: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": "affine"}

    def choose(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized"):
            return False
        if module["weight"].shape[-1] % group_size:
            record[path] = False
            return False
        if path.endswith("router.proj") and bits < ROUTER_BITS:
            record[path] = {"group_size": group_size, "bits": ROUTER_BITS, "mode": "affine"}
            return record[path]
        return {"group_size": group_size, "bits": bits, "mode": "affine"}

    nn.quantize(model, group_size=group_size, bits=bits, class_predicate=choose)
    mx.eval(model.parameters())
    return record
