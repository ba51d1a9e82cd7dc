"""A model's caches in one safetensors file, and back.

Owns the file's format and the refusal of files that do not fit. Leaves what a cache consists of to its class
(`settings`, `place`, `saved`, `settle`) and what to do with a conversation to the callers.

The tensors of layer i are `layers.{i}.{name}`. Metadata: `format` (FORMAT); `model`, what the caller calls the model
they belong to; `layers`, JSON, one object per layer: its `settings`, which must be those of the cache it is loaded
into (kind, bits, mode, codebook by hash, window), and its `place`; `notes`, JSON, whatever the caller wants to keep.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import Gemma4Error, UsageError
from .base import LayerCache

FORMAT = "mlx-gemma4 cache 1"


def save(
    path: str | os.PathLike[str],
    caches: Sequence[LayerCache],
    model: str,
    notes: Mapping[str, Any] | None = None,
    extra: Mapping[str, mx.array] | None = None,
) -> None:
    """Writes the caches of all layers to `path`, which must end in .safetensors; replaces it only when all is written.

    model: names what computed them, as `Model.cache_identity`. extra: more arrays, under names that do not begin with
    "layers.". Raises UsageError, and Gemma4Error when it cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UsageError(f"{path} must end in .safetensors")
    arrays = {f"layers.{i}.{name}": a for i, c in enumerate(caches) for name, a in c.saved().items()}
    arrays |= extra or {}
    layers = [{"settings": c.settings(), "place": c.place()} for c in caches]
    metadata = {"format": FORMAT, "model": model, "layers": json.dumps(layers), "notes": json.dumps(dict(notes or {}))}
    part = path.with_name(f".{path.stem}.{os.getpid()}.safetensors")
    try:
        mx.save_safetensors(str(part), arrays, metadata=metadata)
        os.replace(part, path)
    except (OSError, RuntimeError) as e:
        part.unlink(missing_ok=True)
        raise Gemma4Error(f"{path} cannot be written ({str(e).partition(chr(10))[0]})") from None


def load(path: str | os.PathLike[str], caches: Sequence[LayerCache], model: str) -> dict[str, Any]:
    """Fills `caches`, new from `model.make_cache`, with what `save` wrote; returns its notes. Raises as `fill`."""
    return fill(path, open_saved(path), caches, model)[0]


Saved = tuple[dict[str, mx.array], dict[str, str]]  # arrays, not yet read, and metadata


def open_saved(path: str | os.PathLike[str]) -> Saved:
    """A file that `save` wrote. Raises Gemma4Error when it is none."""
    path = Path(path)
    try:
        found = mx.load(str(path), return_metadata=True)
    except (OSError, RuntimeError, ValueError):
        raise Gemma4Error(f"{path} is not there or cannot be read as a saved cache") from None
    arrays, metadata = found if isinstance(found, tuple) else ({}, {})
    if metadata.get("format") != FORMAT:
        raise Gemma4Error(f"{path} has the format {metadata.get('format')!r}, this version reads {FORMAT!r}")
    return arrays, metadata


def fill(
    path: str | os.PathLike[str], saved: Saved, caches: Sequence[LayerCache], model: str
) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Fills `caches`, new from `model.make_cache`, from an open file; returns its notes and extra arrays.

    Raises Gemma4Error, before any cache is changed, when the file is not of this model or of these settings, and
    UsageError for caches that hold something.
    """
    path, (arrays, metadata) = Path(path), saved
    if any(not c.empty() for c in caches):
        raise UsageError("a saved cache is loaded into new caches; these hold something already")
    if metadata["model"] != model:
        raise Gemma4Error(f"{path} was saved by another model ({metadata['model']}; this one is {model})")
    layers = json.loads(metadata["layers"])
    if len(layers) != len(caches):
        raise Gemma4Error(f"{path} holds {len(layers)} layers, the model's cache has {len(caches)}")
    for i, (layer, c) in enumerate(zip(layers, caches, strict=True)):
        ours = json.loads(json.dumps(c.settings()))
        if layer["settings"] != ours:
            raise Gemma4Error(
                f"{path} was saved with {_words(layer['settings'], ours)} in layer {i}, "
                f"this cache has {_words(ours, layer['settings'])}; make the cache as it was then"
            )
    try:
        mx.eval(arrays)
    except RuntimeError:
        raise Gemma4Error(f"{path} is damaged") from None
    for i, (layer, c) in enumerate(zip(layers, caches, strict=True)):
        prefix = f"layers.{i}."
        mine = {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}
        c.settle(mine, layer["place"])
    return json.loads(metadata["notes"]), {n: a for n, a in arrays.items() if not n.startswith("layers.")}


def _words(settings: dict[str, Any], other: dict[str, Any], name: str = "") -> str:
    """Where `settings` differ from `other`, in words: "keys bits 3.5, keys codebook 1a2b3c4d"."""
    words = []
    for key in sorted(settings.keys() | other.keys()):
        a, b = settings.get(key), other.get(key)
        if a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            words.append(_words(a, b, f"{key} "))
        elif isinstance(a, dict) or a is None:
            words.append(f"{name}{key} {'compressed' if a else 'at 16 bits'}")
        else:
            words.append(f"{name}{key} {str(a)[:8] if key == 'codebook' else a}")
    return ", ".join(words)
