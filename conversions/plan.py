"""The plan of a conversion: every tensor of the result, where it comes from and how it is packed.

Owns: from the source's headers and config.json to an ordered list of items, before any byte of weights is read; the
check that the source holds exactly what the graph needs; the layout of the shards, byte for byte. Leaves the bits to a
chooser (`recipe.py`), reading and packing to `blocks.py` and writing to `partial.py`.

The order and the layout depend on names, shapes and types alone, not on how the source is cut into files: converting a
conversion again with the same choices gives the same files.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from mlx_gemma4.config import Gemma4Config
from mlx_gemma4.conversions.names import is_tower, is_unused, to_mlx_name
from mlx_gemma4.conversions.recipe import Packing
from mlx_gemma4.errors import UsageError, WeightsError
from mlx_gemma4.packed import packing_of
from mlx_gemma4.safetensors_header import SIZES, Tensor

# Module path -> packing, or None to leave the matrix as it is. `Recipe.choose` is one.
Chooser = Callable[[str], Packing | None]

FLOATS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# Tensor bytes per shard; with the header it stays below 5 GB. A larger tensor has a shard of its own.
SHARD_BYTES = 4_990_000_000
# Convolutions are stored channels first by torch, channels last by MLX: number of axes -> permutation.
_CHANNELS_LAST = {3: (0, 2, 1), 4: (0, 2, 3, 1)}
_CONVOLUTION = re.compile(r"(subsample_conv_projection\.layer\d+\.conv|depthwise_conv1d)\.weight$")


@dataclass(frozen=True)
class Stored:
    """One tensor as it will lie in a shard."""

    name: str
    dtype: str  # a key of safetensors_header.SIZES
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * SIZES[self.dtype]


@dataclass(frozen=True)
class Item:
    """One matrix, vector or scalar of the result: what `blocks.py` makes in one go.

    Packed, it is two or three stored tensors: weight, scales and (affine) biases.
    """

    name: str  # of the plain tensor: "language_model.model.layers.0.mlp.up_proj.weight"
    shape: tuple[int, ...]  # unpacked
    dtype: str  # of the plain tensor, or of affine scales and biases
    sources: tuple[tuple[str, str], ...]  # (file, tensor): the tensor, or weight, scales and biases
    source_dtype: str  # of the plain tensor or of the scales
    part: str | None = None  # "gate" or "up": the first or second half of a packed expert matrix, along axis -2
    axes: tuple[int, ...] | None = None  # a permutation of the source's axes
    stored: Packing | None = None  # how the source packs it
    packing: Packing | None = None  # how the result does
    q4_0: bool = False  # mapped exactly from the Q4_0 lattice

    @property
    def path(self) -> str:
        """The module, as config.json names it."""
        return self.name.removesuffix(".weight")

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @cached_property
    def outputs(self) -> tuple[Stored, ...]:
        return stored_as(self.name, self.shape, self.dtype, self.packing)

    @property
    def source_bytes(self) -> int:
        """What is read for it."""
        kinds = stored_as(self.name, self.shape, self.source_dtype, self.stored)
        return sum(kind.nbytes for kind in kinds)


def stored_as(name: str, shape: tuple[int, ...], dtype: str, packing: Packing | None) -> tuple[Stored, ...]:
    """The tensors a matrix becomes: itself, or weight (32-bit words), scales and, in affine mode, biases."""
    if packing is None:
        return (Stored(name, dtype, shape),)
    path, columns = name.removesuffix("weight"), shape[-1]
    words = Stored(name, "U32", (*shape[:-1], columns * packing.bits // 32))
    groups = (*shape[:-1], columns // packing.group_size)
    if packing.mode != "affine":
        return (words, Stored(path + "scales", "U8", groups))
    return (words, Stored(path + "scales", dtype, groups), Stored(path + "biases", dtype, groups))


@dataclass(frozen=True)
class Place:
    """Where a stored tensor lies: shard number and bytes from the start of the file."""

    shard: int
    begin: int


@dataclass(frozen=True)
class Plan:
    """Items in the order of the result, and the order in which they are made (files of the source in turn)."""

    items: tuple[Item, ...]
    order: tuple[int, ...]
    default: Packing | None  # config.json's own entry; what differs is an override
    # Text matrices that could be packed and are not, by module path.
    plain: tuple[str, ...] = ()
    shard_bytes: int = SHARD_BYTES

    @cached_property
    def _layout(self) -> tuple[list[bytes], list[str], list[int], dict[str, Place]]:
        """Headers, file names, file sizes and the place of every stored tensor."""
        shards: list[list[Stored]] = [[]]
        filled = 0
        for item in self.items:
            size = sum(o.nbytes for o in item.outputs)
            if shards[-1] and filled + size > self.shard_bytes:
                shards.append([])
                filled = 0
            shards[-1] += item.outputs
            filled += size
        count = len(shards)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        if count == 1:
            names = ["model.safetensors"]
        headers, sizes, places = [], [], {}
        for number, tensors in enumerate(shards):
            # Wide types first: with a header of whole words every tensor is aligned, so that it can be mapped.
            tensors.sort(key=lambda t: -SIZES[t.dtype])
            entries: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
            at = 0
            for t in tensors:
                entries[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
                at += t.nbytes
            text = json.dumps(entries, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            header = len(text).to_bytes(8, "little") + text
            headers.append(header)
            sizes.append(len(header) + at)
            for t in tensors:
                places[t.name] = Place(number, len(header) + entries[t.name]["data_offsets"][0])
        return headers, names, sizes, places

    @property
    def headers(self) -> list[bytes]:
        return self._layout[0]

    @property
    def files(self) -> list[str]:
        return self._layout[1]

    @property
    def sizes(self) -> list[int]:
        """Bytes of each file."""
        return self._layout[2]

    @property
    def places(self) -> dict[str, Place]:
        return self._layout[3]

    @property
    def tensor_bytes(self) -> int:
        return sum(o.nbytes for item in self.items for o in item.outputs)

    @property
    def source_bytes(self) -> int:
        return sum(item.source_bytes for item in self.items)

    def quantization(self) -> dict[str, Any] | None:
        """config.json's `quantization`: the default, and one entry per module that differs (False: not packed)."""
        if self.default is None:
            return None
        record: dict[str, Any] = self.default.as_dict()
        for item in self.items:
            if item.packing is not None and item.packing != self.default:
                record[item.path] = item.packing.as_dict()
        return record | dict.fromkeys(self.plain, False)

    def digest(self, identity: Any) -> str:
        """What a run must agree in to go on where another stopped; `identity`: anything else it depends on."""
        record = [[asdict(item) for item in self.items], self.shard_bytes, identity]
        return hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()


@dataclass
class _Found:
    """The source's tensors by MLX name."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    where: dict[str, tuple[str, str]] = field(default_factory=dict)  # (file, name in it)


def build(
    headers: dict[str, dict[str, Tensor]],
    config: Gemma4Config,
    choose: Chooser,
    default: Packing | None,
    *,
    dtype: str | None = None,
    text_only: bool = False,
    keep_packed: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Plan:
    """headers: the source's files by name, in the order in which they will be at hand.

    dtype: "bfloat16", "float16" or "float32" for what is not packed and for affine scales; None: as in the source.
    keep_packed: matrices of towers stay packed where the source packs them (those of the text always follow `choose`).
    Raises WeightsError when tensors are missing, unknown or misshapen, UsageError when a packing does not fit.
    """
    found = _collect(headers, config, text_only)
    shapes, packable = _graph(config)
    items: list[Item] = []
    for name in sorted(_text_names(found, shapes), key=_natural):
        items.append(_text_item(name, found, shapes[name], config))
    items = [_packed(item, packable, choose, dtype) for item in items]
    plain = tuple(i.path for i in items if i.path in packable and i.packing is None)
    for name in sorted((n for n in found.tensors if is_tower(n)), key=_natural):
        if not _is_scale(name, found):
            items.append(_tower_item(name, found, config, dtype, keep_packed))
    files = {file: i for i, file in enumerate(headers)}

    def place(i: int) -> tuple[int, int, int]:
        file, name = items[i].sources[0]
        return max(files[f] for f, _ in items[i].sources), headers[file][name].begin, i

    return Plan(tuple(items), tuple(sorted(range(len(items)), key=place)), default, plain, shard_bytes)


def _collect(headers: dict[str, dict[str, Tensor]], config: Gemma4Config, text_only: bool) -> _Found:
    found = _Found()
    for file, tensors in headers.items():
        for name, tensor in tensors.items():
            ours = to_mlx_name(name)
            if is_unused(ours, config) or (text_only and is_tower(ours)):
                continue
            if ours in found.tensors:
                raise WeightsError(f"tensor {name} is both in {found.where[ours][0]} and in {file}; delete one copy")
            found.tensors[ours], found.where[ours] = tensor, (file, name)
    return found


def _graph(config: Gemma4Config) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Shapes of the text graph's tensors, and its modules that can be packed; nothing is allocated."""
    from mlx.utils import tree_flatten

    from mlx_gemma4.models.gemma4 import Model

    model = Model(config)
    flat: list[Any] = tree_flatten(model.parameters())  # pyright: ignore[reportAssignmentType]
    shapes = {name: tuple(value.shape) for name, value in flat}
    return shapes, {path for path, module in model.named_modules() if hasattr(module, "to_quantized")}


def _is_scale(name: str, found: _Found) -> bool:
    """Whether a tensor is the scales or biases of a packed matrix beside it (a linear map's own bias is `.bias`)."""
    path, _, leaf = name.rpartition(".")
    return leaf in ("scales", "biases") and f"{path}.scales" in found.tensors and f"{path}.weight" in found.tensors


def _experts(name: str) -> tuple[str, str] | None:
    """The name of the packed gate_up tensor that a switch_glu matrix may come from, and its half."""
    for half in ("gate", "up"):
        if name.endswith(f".switch_glu.{half}_proj.weight"):
            return name.removesuffix(f"switch_glu.{half}_proj.weight") + "gate_up_proj", half
    return None


def _text_names(found: _Found, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Every tensor of the graph. Raises WeightsError unless the source has these and no others."""
    have = {n for n in found.tensors if not is_tower(n) and not _is_scale(n, found)}
    used = set()
    for name in shapes:
        joint = _experts(name)
        used.add(joint[0] if joint and name not in have else name)
    for names, what in ((used - have, "lacks"), (have - used, "holds")):
        if names:
            some = sorted(names, key=_natural)
            listed = ", ".join(some[:3]) + (", ..." if len(some) > 3 else "")
            asked = "that config.json asks for" if what == "lacks" else "that config.json does not ask for"
            raise WeightsError(
                f"the source {what} {len(some)} tensor{'s' if len(some) > 1 else ''} ({listed}) {asked}; "
                "is it the right one, and complete?"
            )
    return list(shapes)


def _text_item(name: str, found: _Found, shape: tuple[int, ...], config: Gemma4Config) -> Item:
    """How the source has one tensor of the graph. Raises WeightsError when its shape or type is another."""
    joint = _experts(name)
    if joint and name not in found.tensors:
        source, part = joint
        wanted: tuple[int, ...] = (*shape[:-2], 2 * shape[-2], shape[-1])
    else:
        source, part, wanted = name, None, shape
    tensor, where = found.tensors[source], found.where[source]
    path = source.removesuffix(".weight")
    if f"{path}.scales" in found.tensors and source.endswith(".weight"):
        scales = found.tensors[f"{path}.scales"]
        settings = packing_of(shape[-1], tensor.shape[-1], scales.shape[-1], scales.dtype == "U8")
        stored = Packing(**settings) if settings else None
        return _packed_source(name, shape, stored, found, config)
    if tensor.shape != wanted:
        raise WeightsError(
            f"{where[0]}: tensor {where[1]} has shape {list(tensor.shape)}, config.json asks for {list(wanted)}; "
            "is it the right one?"
        )
    if tensor.dtype not in FLOATS.values():
        raise WeightsError(f"{where[0]}: tensor {where[1]} is {tensor.dtype}, not floating point; download it again")
    return Item(name, shape, tensor.dtype, (where,), tensor.dtype, part)


def _packed_source(
    name: str, shape: tuple[int, ...], stored: Packing | None, found: _Found, config: Gemma4Config
) -> Item:
    """An item read from weight, scales and biases. `stored` None: no packing of MLX has these shapes."""
    path = name.removesuffix("weight")
    scales = found.tensors[path + "scales"]
    # Scales that are bytes do not tell what the matrix was; config.json does.
    dtype = FLOATS.get(config.dtype or "", "BF16") if scales.dtype == "U8" else scales.dtype
    parts = stored_as(name, shape, dtype, stored) if stored else ()
    for part in parts:
        have = found.tensors.get(part.name)
        if have is None or (have.dtype, have.shape) != (part.dtype, part.shape):
            parts = ()
            break
    if not parts or dtype not in FLOATS.values():
        where, words = found.where[name], found.tensors[name]
        raise WeightsError(
            f"{where[0]}: tensor {name} has shape {list(words.shape)} with scales {list(scales.shape)}; "
            "no packing of MLX is like that"
        )
    return Item(name, shape, dtype, tuple(found.where[p.name] for p in parts), dtype, stored=stored)


def _packed(item: Item, packable: set[str], choose: Chooser, dtype: str | None) -> Item:
    packing = choose(item.path) if item.path in packable else None
    if packing is not None:
        packing = packing.fitted(item.columns)
    if packing is not None and item.path.endswith("router.proj") and item.columns % packing.group_size:
        # The router's rule is ours, not the user's, and small models have narrow streams.
        packing = Packing(32, packing.bits) if item.columns % 32 == 0 else None
    if packing is not None and item.columns % packing.group_size:
        fitting = [g for g in (128, 64, 32) if item.columns % g == 0]
        advice = f"{fitting[0]} does" if fitting else "keep it at 16 bits in a recipe"
        raise UsageError(
            f"groups of {packing.group_size} do not divide the {item.columns} columns of {item.path}; {advice}"
        )
    return _with(item, packing, dtype)


def _with(item: Item, packing: Packing | None, dtype: str | None) -> Item:
    kind = FLOATS[dtype] if dtype is not None and item.dtype in FLOATS.values() else item.dtype
    return replace(item, packing=packing, dtype=kind)


def _tower_item(name: str, found: _Found, config: Gemma4Config, dtype: str | None, keep_packed: bool) -> Item:
    tensor, where = found.tensors[name], found.where[name]
    path = name.removesuffix(".weight")
    if f"{path}.scales" in found.tensors and name.endswith(".weight"):
        item = _packed_source(name, *_declared(path, tensor.shape, config), found, config)
        return _with(item, item.stored if keep_packed else None, dtype)
    axes, shape = None, tensor.shape
    if _CONVOLUTION.search(name) and len(shape) in _CHANNELS_LAST and not _is_channels_last(name, shape, config):
        axes = _CHANNELS_LAST[len(shape)]
        shape = tuple(shape[a] for a in axes)
    return _with(Item(name, shape, tensor.dtype, (where,), tensor.dtype, axes=axes), None, dtype)


def _is_channels_last(name: str, shape: tuple[int, ...], config: Gemma4Config) -> bool:
    """Told by the number of input channels, as mlx-vlm does: 1 in the first layer and in depthwise ones."""
    channels = 1
    if ".layer1." in name:
        channels = ((config.audio or {}).get("subsampling_conv_channels") or [0])[0]
    return shape[-1] == channels


def _declared(path: str, words: tuple[int, ...], config: Gemma4Config) -> tuple[tuple[int, ...], Packing | None]:
    """Unpacked shape and packing of a tower's matrix, from config.json: no graph of ours knows its width."""
    record = config.quantization or {}
    own = record.get(path)
    settings = own if isinstance(own, dict) else record
    try:
        packing = Packing(settings["group_size"], settings["bits"], settings.get("mode", "affine"))
    except (KeyError, UsageError):
        return words, None
    return (*words[:-1], words[-1] * 32 // packing.bits), packing


def _natural(name: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
