"""Residual streams between layers, on disk: one file per state, as its difference to the unpacked model's.

Owns the files' contents. A difference is kept in bfloat16, which is exact enough for what differs little and costs half
of the bytes; the unpacked model's own stream is kept in float32. Leaves the folder to `scratch.py`.
"""

from typing import Any

import mlx.core as mx

from mlx_gemma4.cache import View
from mlx_gemma4.cache.sliding import ChunkView
from mlx_gemma4.conversions.layers import LayerStream, State
from mlx_gemma4.conversions.scratch import Scratch


class States:
    """States of one stream in a scratch folder."""

    def __init__(self, scratch: Scratch, stream: LayerStream) -> None:
        self._scratch, self._config = scratch, stream.config

    def has(self, name: str, layer: int) -> bool:
        return self._scratch.has(_file(name, layer))

    def save(self, name: str, layer: int, state: State, plain: State | None = None) -> None:
        """Keeps a state in front of a layer, with `plain` as the difference to it.

        What a state shares with `plain`, being the same object, is left out; so is `per_layer`, see `save_inputs`.
        """
        arrays = {"hidden": state.hidden if plain is None else _less(state.hidden, plain.hidden)}
        for index, view in state.views.items():
            other = plain.views.get(index) if plain is not None else None
            if view is other:
                continue
            for kind in ("keys", "values"):
                value = getattr(view, kind)
                arrays[f"{kind}.{index}"] = value if other is None else _less(value, getattr(other, kind))
        self._scratch.save(_file(name, layer), arrays)

    def save_inputs(self, name: str, state: State, plain: State | None = None) -> None:
        """Keeps what per-layer embeddings bring to every layer."""
        if state.per_layer is None:
            return
        other = plain.per_layer if plain is not None else None
        arrays = {str(i): v if other is None else _less(v, other[i]) for i, v in state.per_layer.items()}
        self._scratch.save(f"{name}-inputs", arrays)

    def load(self, name: str, layer: int, plain: State | None = None) -> State:
        """The state in front of a layer; per_layer of this layer only."""
        arrays = self._scratch.load(_file(name, layer))
        hidden = arrays["hidden"] if plain is None else plain.hidden + arrays["hidden"]
        views: dict[int, View] = dict(plain.views) if plain is not None else {}
        for index in sorted({int(key.rpartition(".")[2]) for key in arrays if "." in key}):
            keys, values = (arrays[f"{kind}.{index}"] for kind in ("keys", "values"))
            if plain is not None:
                other: Any = plain.views[index]
                keys, values = other.keys + keys, other.values + values
            window = self._config.sliding_window if self._config.is_sliding(index) else None
            views[index] = ChunkView(keys, values, 0, 0, window, None)
        mx.eval(hidden, [[getattr(v, kind) for kind in ("keys", "values")] for v in views.values()])
        return State(hidden, self._inputs(name, layer, plain), views)

    def _inputs(self, name: str, layer: int, plain: State | None) -> dict[int, mx.array] | None:
        if not self._config.hidden_size_per_layer_input or layer == self._config.num_hidden_layers:
            return None
        if not self._scratch.has(f"{name}-inputs") and plain is not None:
            return plain.per_layer
        value = self._scratch.load(f"{name}-inputs")[str(layer)]
        if plain is not None:
            assert plain.per_layer is not None
            value = plain.per_layer[layer] + value
        mx.eval(value)
        return {layer: value}

    def drop(self, name: str, layer: int) -> None:
        self._scratch.drop(_file(name, layer))

    def drop_inputs(self, name: str) -> None:
        self._scratch.drop(f"{name}-inputs")


def _less(value: mx.array, other: mx.array) -> mx.array:
    return (value - other).astype(mx.bfloat16)


def _file(name: str, layer: int) -> str:
    return f"{name}-{layer:03d}"
