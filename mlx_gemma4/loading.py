"""A model by name, folder or repository: found, checked, read and ready to run.

Owns: what a source string means, which files hold the weights, whether they fit the graph that config.json
describes, the types they are computed in. Leaves downloading to `conversions/hub.py`, renaming to
`conversions/names.py`, file headers to `safetensors_header.py` and MLX's packed weights to `packed.py`.
"""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import mlx.core as mx
from mlx.utils import tree_flatten

from . import catalog
from .config import Gemma4Config
from .conversions import names
from .errors import ConfigError, ModelNotFoundError, UsageError, WeightsError
from .kv_bits import PLAIN, number
from .safetensors_header import Tensor, read_header

if TYPE_CHECKING:
    from .conversions.hub_progress import Progress
    from .models.gemma4 import Model
    from .tokenizer import Tokenizer

DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}

INDEX = "model.safetensors.index.json"
# Where the per-layer embedding table of E2B and E4B is kept.
PLE = ("memory", "disk")


def load(
    source: str | os.PathLike[str] = catalog.DEMO,
    *,
    revision: str | None = None,
    dtype: str | mx.Dtype | None = None,
    kv_bits: float | None = None,
    ple: str = "memory",
    towers: bool | Literal["lazy"] = False,
    lazy: bool = False,
    check: bool = False,
    progress: "Progress | bool | None" = None,
    token: str | None = None,
) -> "tuple[Model, Tokenizer]":
    """The model and its tokenizer.

    source: see `resolve`, which also takes `revision`, `progress` and `token`.
    dtype: "bfloat16", "float16" or "float32", in which the model computes; None is bfloat16 where Metal is
    available, else float32 (CPUs are several times slower in 16 bits). Packed weights stay packed.
    kv_bits: bits per number in the caches that `model.make_cache` makes: 16 (as computed), 4, 3.5, 3, 2.5 or 2. None
    is 16. Chat and generate take it from there.
    ple: "disk" leaves the per-layer embedding table of E2B and E4B in its file and reads rows as tokens come; the file
    must stay. The results are the same. "memory" holds it like all weights. See `ple_disk.py`.
    towers: also what the checkpoint sees and hears with, see `models/vision.py`; without it, text only. "lazy" leaves
    their weights in the files until the first picture or sound, which must then come on the thread that loaded.
    lazy: leaves the weights in their files until they are used. Without it every array is in memory when this
    returns, so that the model may run on another thread than the one that loaded it.
    check: looks at every value; weights that are not numbers or of absurd size are an error.

    Raises ModelNotFoundError, ConfigError, TokenizerError, WeightsError, UsageError, DoesNotFitError.
    """
    bits = PLAIN if kv_bits is None else number(kv_bits)
    _compute_dtype(dtype)  # before a download, not after
    _check_ple(ple)
    folder = resolve(source, revision=revision, progress=progress, token=token)
    config = Gemma4Config.from_folder(folder)
    from .tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(folder)
    model = load_model(folder, dtype=dtype, ple=ple, towers=towers, lazy=lazy, check=check, config=config)
    model.make_cache(bits)  # an error now if no layer can have it
    model.kv_bits = bits
    return model, tokenizer


def resolve(
    source: str | os.PathLike[str] = catalog.DEMO,
    *,
    revision: str | None = None,
    progress: "Progress | bool | None" = None,
    token: str | None = None,
) -> Path:
    """The folder of a checkpoint, downloaded if need be.

    source: "demo" (the model in this package); a folder: anything that exists or starts with `/`, `.` or
    `~`; a family name (`catalog.names()`); a Hub repository `owner/name`. The last two may end in
    `@revision` (branch, tag or commit), or `revision` says it. `progress` and `token` are for the download,
    see `hub.download`.

    Raises ModelNotFoundError, UsageError, and what `hub.download` raises.
    """
    found = locate(source, revision)
    if isinstance(found, Path):
        return found
    from .conversions import hub

    return hub.download(*found, token=token, progress=progress)


def locate(source: str | os.PathLike[str], revision: str | None = None) -> Path | tuple[str, str | None]:
    """What `source` names: a folder that exists, or a Hub repository and its revision; nothing is downloaded.

    Raises ModelNotFoundError, UsageError.
    """
    text = os.fspath(source)
    if text == catalog.DEMO:
        from . import demo

        if revision is not None:
            raise UsageError(f"{catalog.DEMO} has no revisions; they apply to Hub repositories")
        return demo.path()
    if not text:
        raise UsageError(f"the model's name is empty; known names are {', '.join(catalog.names())}")
    path = Path(text).expanduser()
    is_path = isinstance(source, os.PathLike) or text[0] in "/.~" or text.endswith(("/", os.sep)) or path.exists()
    if is_path:
        if path.is_dir() and revision is None:
            return path
        if path.is_dir():
            raise UsageError(f"{text} is a folder; a revision applies to Hub repositories")
        if path.exists():
            raise ModelNotFoundError(f"{text} is a file; give the folder that holds config.json and the weights")
        raise ModelNotFoundError(f"there is no folder {text}")

    name, at, tag = text.partition("@")
    if at and (revision is not None or not tag):
        raise UsageError(f"{text!r} does not name one revision; write owner/name@revision")
    entry = catalog.find(name)
    if entry is None and name.count("/") == 0:
        raise catalog.unknown(name)
    if entry is None and name.count("/") > 1:
        raise ModelNotFoundError(f"there is no folder {text}, and a Hub repository has the form owner/name")
    return (entry.repo if entry else name), tag or revision


def load_model(
    folder: str | os.PathLike[str],
    *,
    dtype: str | mx.Dtype | None = None,
    ple: str = "memory",
    towers: bool | Literal["lazy"] = False,
    lazy: bool = False,
    check: bool = False,
    config: Gemma4Config | None = None,
) -> "Model":
    """The model of a checkpoint folder, without its tokenizer; arguments as in `load`.

    Sets `model.compute_dtype` (mx.Dtype). Raises ConfigError, WeightsError and, for `ple`, UsageError.
    """
    from . import packed, ple_disk
    from .models.gemma4 import Model

    folder = Path(folder)
    compute = _compute_dtype(dtype)
    _check_ple(ple)
    config = config or Gemma4Config.from_folder(folder)
    headers = shards(folder)
    if towers:
        _check_processor(folder)
    model = Model(config, bool(towers))
    weights = _read(headers, model)
    if ple == "disk":
        model.language_model.model.embed_tokens_per_layer = ple_disk.open_table(headers, config.text, compute)
        for leaf in ple_disk.LEAVES:
            weights.values.pop(f"{ple_disk.PATH}.{leaf}", None)
    packed.pack(model, weights.values, weights.files, config)
    _fit(model, weights, folder)
    _cast(weights, compute)
    model.load_weights(list(weights.values.items()), strict=True)
    model.eval()
    model.compute_dtype = compute
    if not lazy or check:
        later = () if check or towers != "lazy" else tuple(names.TOWERS)
        _evaluate(weights, later)
        mx.eval([a for name, a in tree_flatten(model.parameters()) if not name.startswith(later)])
        mx.eval(model.private_arrays())
    if check:
        from .weight_check import check_values

        check_values(model, weights.values, weights.files)
    return model


def shards(folder: Path) -> dict[Path, dict[str, Tensor]]:
    """The weight files of a folder with their headers, checked; MLX has not opened them yet.

    With an index these are the files it names, else all model*.safetensors. Raises WeightsError naming what
    is missing or damaged.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(where.values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise WeightsError(f"{index} is damaged; download it again") from None
        headers = {folder / n: read_header(folder / n) for n in names}
        for tensor, file in where.items():
            if tensor not in headers[folder / file]:
                raise WeightsError(f"{folder / file} lacks tensor {tensor}, which {INDEX} places there")
        return headers
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise WeightsError(f"{folder} has no model*.safetensors; download or convert the weights into it")
    for file in files:
        if numbered := re.fullmatch(r"model-\d+-of-(\d+)\.safetensors", file.name):
            count = int(numbered[1])
            for i in range(1, count + 1):
                other = folder / f"model-{i:05d}-of-{numbered[1]}.safetensors"
                if not other.is_file():
                    raise WeightsError(f"{other} is missing ({count} shards in all); download it again")
    return {f: read_header(f) for f in files}


@dataclass
class _Weights:
    """The tensors a graph uses, by the graph's names, and the file each came from."""

    values: dict[str, mx.array] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)


def _read(headers: Iterable[Path], model: "Model") -> _Weights:
    out = _Weights()
    for file in headers:
        try:
            found = mx.load(str(file))
        except (RuntimeError, ValueError) as e:
            raise WeightsError(f"{file} cannot be read ({_first_line(e)}); download it again") from None
        assert isinstance(found, dict)
        try:
            found = model.sanitize(found)
        except ValueError as e:
            # A tensor whose number of axes is not what its name promises.
            raise WeightsError(f"{file}: {_first_line(e)}") from None
        for name, value in found.items():
            if name in out.values:
                raise WeightsError(f"tensor {name} is both in {out.files[name].name} and in {file}; delete one copy")
            out.values[name], out.files[name] = value, file
    for name, value in out.values.items():
        _check_dtype(name, value, out)
    return out


def _check_dtype(name: str, value: mx.array, weights: _Weights) -> None:
    if mx.issubdtype(value.dtype, mx.floating):
        return
    packed = name.endswith(".weight") and name.removesuffix("weight") + "scales" in weights.values
    if (value.dtype == mx.uint32 and packed) or (value.dtype == mx.uint8 and name.endswith(".scales")):
        return
    stored = str(value.dtype).removeprefix("mlx.core.")
    raise WeightsError(f"{weights.files[name]}: tensor {name} is {stored}, not floating point; convert it again")


def _fit(model: "Model", weights: _Weights, folder: Path) -> None:
    """Raises WeightsError unless the tensors are exactly the model's, in name and shape."""
    wanted = dict(tree_flatten(model.parameters()))
    missing = [n for n in wanted if n not in weights.values]
    extra = [n for n in weights.values if n not in wanted]
    if missing:
        raise WeightsError(f"{folder} lacks {_some(missing)} that config.json asks for; download it again")
    if extra:
        raise WeightsError(f"{folder} holds {_some(extra)} that config.json does not ask for; is it the right one?")
    for name, value in weights.values.items():
        if value.shape != wanted[name].shape:
            raise WeightsError(
                f"{weights.files[name]}: tensor {name} has shape {list(value.shape)}, "
                f"config.json asks for {list(wanted[name].shape)}; is it the right one?"
            )


def _cast(weights: _Weights, dtype: mx.Dtype) -> None:
    # Also scales and biases of affine packing; those of other modes are bytes.
    for name, value in weights.values.items():
        if mx.issubdtype(value.dtype, mx.floating):
            weights.values[name] = value.astype(dtype)


def _evaluate(weights: _Weights, later: tuple[str, ...]) -> None:
    """Reads tensors one after the other, but those whose names begin as `later` says: the peak stays near the result,
    and an error can be placed."""
    for name, value in weights.values.items():
        if name.startswith(later):
            continue
        try:
            mx.eval(value)
        except RuntimeError as e:
            raise WeightsError(f"{weights.files[name]}: tensor {name} cannot be read ({_first_line(e)})") from None


def _compute_dtype(dtype: str | mx.Dtype | None) -> mx.Dtype:
    if dtype is None:
        return mx.bfloat16 if mx.metal.is_available() else mx.float32
    name = str(dtype).removeprefix("mlx.core.")
    if name not in DTYPES:
        raise UsageError(f"dtype {name!r} is not available; allowed: {', '.join(DTYPES)}")
    return DTYPES[name]


def _check_processor(folder: Path) -> None:
    """Raises ConfigError when processor_config.json asks for other sound features than this package computes."""
    from .media.mel import check_feature_extractor

    path = folder / "processor_config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        raise ConfigError(f"{path} is not valid JSON; download it again") from None
    check_feature_extractor(raw.get("feature_extractor") or {})


def _check_ple(ple: str) -> None:
    if ple not in PLE:
        raise UsageError(f"ple {ple!r} is not known; allowed: {', '.join(PLE)}")


def _some(names: list[str]) -> str:
    """ "2 tensors: a, b" or "57 tensors: a, b, c, ..." """
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({', '.join(names[:3])}{more})"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
