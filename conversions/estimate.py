"""What a conversion will cost, from its plan alone: bits per kind of matrix, file size, memory at work.

Owns the grouping and the sums that `gemma4 convert --dry-run` and the model card print. Leaves cache sizes to
`mlx_gemma4.memory`.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_gemma4.config import Gemma4Config
from mlx_gemma4.conversions.plan import Item, Plan
from mlx_gemma4.errors import UsageError

if TYPE_CHECKING:
    from mlx_gemma4.conversions.calibrate import Budget

CONTEXTS = (8192, 32768, 131072)
KV_BITS = (16, 3.5)

_GROUPS = [
    ("per-layer embedding table", r"embed_tokens_per_layer\."),
    ("token embedding", r"(embed_tokens|lm_head)\."),
    ("per-layer path", r"\.per_layer_(model_projection|input_gate|projection)\."),
    ("attention q, k", r"\.self_attn\.[qk]_proj\."),
    ("attention v, o", r"\.self_attn\.[vo]_proj\."),
    ("experts gate, up", r"\.switch_glu\.(gate|up)_proj\."),
    ("experts down", r"\.switch_glu\.down_proj\."),
    ("mlp gate, up", r"\.mlp\.(gate|up)_proj\."),
    ("mlp down", r"\.mlp\.down_proj\."),
    ("router", r"\.router\.proj\."),
]


@dataclass
class Group:
    """One line of the table. Bytes are of tensors, without headers."""

    name: str
    parameters: int = 0
    nbytes: int = 0
    packings: tuple[str, ...] = ()

    @property
    def bits(self) -> float:
        """Per parameter, scales and biases included."""
        return self.nbytes * 8 / self.parameters


def group_of(item: Item) -> str:
    for tower in ("vision", "audio"):
        if item.name.startswith((f"{tower}_tower.", f"embed_{tower}.")):
            return f"{tower} tower"
    return next((name for name, pattern in _GROUPS if re.search(pattern, item.name)), "norms and scalars")


def groups(plan: Plan) -> list[Group]:
    """The kinds of matrix that occur, in the order of the table."""
    found: dict[str, Group] = {}
    for item in plan.items:
        group = found.setdefault(group_of(item), Group(group_of(item)))
        group.parameters += item.rows * item.columns
        group.nbytes += sum(o.nbytes for o in item.outputs)
        how = "Q4_0 as trained" if item.q4_0 else str(item.packing) if item.packing else item.dtype
        if how not in group.packings:
            group.packings += (how,)
    order = [name for name, _ in _GROUPS] + ["norms and scalars", "vision tower", "audio tower"]
    return sorted(found.values(), key=lambda g: order.index(g.name))


def resident(tensor_bytes: int, config: Gemma4Config) -> dict[int, dict[float, int | None]]:
    """{context: {kv bits: bytes}} of weights, caches and rotary table; contexts the model does not have are left out.

    None where the caches of this model cannot have so few bits.
    """
    from mlx_gemma4.kv_bits import request
    from mlx_gemma4.memory import cache_bytes, rotary_table_bytes

    out: dict[int, dict[float, int | None]] = {}
    for context in CONTEXTS:
        if context > config.text.max_position_embeddings:
            continue
        fixed = tensor_bytes + rotary_table_bytes(config.text, context)
        out[context] = {}
        for bits in KV_BITS:
            try:
                out[context][bits] = fixed + cache_bytes(config.text, context, bits=request(bits))["total"]
            except UsageError:
                out[context][bits] = None
    return out


def as_record(plan: Plan, config: Gemma4Config) -> dict[str, Any]:
    """The whole estimate as JSON."""
    return {
        "groups": [
            {"name": g.name, "parameters": g.parameters, "bytes": g.nbytes, "bits": round(g.bits, 3), "as": g.packings}
            for g in groups(plan)
        ],
        "source_bytes": plan.source_bytes,
        "file_bytes": sum(plan.sizes),
        "files": len(plan.files),
        "resident_bytes": _resident_record(plan.tensor_bytes, config),
    }


def ranges(allowed: "Budget") -> list[tuple[Group, Group]]:
    """Per kind of matrix, as little and as much as a calibration may give it."""
    most = {g.name: g for g in groups(allowed.most)}
    return [(g, most[g.name]) for g in groups(allowed.least)]


def budget_record(allowed: "Budget", config: Gemma4Config) -> dict[str, Any]:
    """What is known of a calibrated conversion before it reads weights, as JSON."""
    parameters = sum(item.rows * item.columns for item in allowed.least.items)
    return {
        "chosen_by": "calibration",
        "groups": [
            {
                "name": low.name,
                "parameters": low.parameters,
                "least_bits": round(low.bits, 3),
                "most_bits": round(high.bits, 3),
                "least_bytes": low.nbytes,
                "most_bytes": high.nbytes,
            }
            for low, high in ranges(allowed)
        ],
        "source_bytes": allowed.least.source_bytes,
        "tensor_bytes_at_most": allowed.tensor_bytes,
        "file_bytes_at_most": allowed.file_bytes,
        "bits_per_parameter_at_most": round(allowed.tensor_bytes * 8 / parameters, 3),
        "scratch_bytes": allowed.scratch_bytes,
        "resident_bytes_at_most": _resident_record(allowed.tensor_bytes, config),
    }


def _resident_record(tensor_bytes: int, config: Gemma4Config) -> dict[str, dict[str, int | None]]:
    found = resident(tensor_bytes, config)
    return {str(context): {f"{bits:g}": value for bits, value in row.items()} for context, row in found.items()}
