"""One decoder layer on many rows in bounded memory: the model's own layer, its large modules in pieces.

Owns the pieces. `DecoderLayer` itself is the model's, with norms, residuals and router as they are; in the place of its
attention, MLP, experts and linear maps stand modules of the same interface that compute the same block by block:
matrices in row blocks read when they are needed, attention one text at a time, experts a few at a time. So memory is
some activations and the matrices of a layer that are small enough to be kept (`KEPT`), whatever the model.

Leaves reading to `layers.py`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_gemma4.cache import View
from mlx_gemma4.conversions.layers import MODEL, Known, LayerStream, State, row_blocks
from mlx_gemma4.models.fused import geglu
from mlx_gemma4.models.text import Attention, DecoderLayer, Step

# Float32 bytes of a layer's matrices that are read once for all runs through it.
KEPT = 320 << 20

# (matrix within the layer, begin, end) -> float32 rows of its weight [end - begin, columns]
Rows = Callable[[str, int, int], mx.array]
# Called with a matrix within the layer and what it multiplies, float32 [rows, columns], before it does.
Visit = Callable[[str, mx.array], Any]


class Layer:
    """A layer of a stream, for any number of runs."""

    def __init__(self, stream: LayerStream, index: int, kept: int = KEPT) -> None:
        """kept: bytes of matrices to keep; the others are read from the source in every run."""
        self._stream, self.index, self._matrices = stream, index, stream.matrices(index)
        self._items = {m: stream.item(stream.path(index, m)) for m in self._matrices}
        config = stream.config
        self._layer = DecoderLayer(config, index, stream.ropes[config.layer_types[index]])
        prefix = f"{MODEL}layers.{index}."
        small = [n for n in stream.items if n.startswith(prefix) and len(stream.items[n].shape) < 2]
        self._layer.load_weights([(n.removeprefix(prefix), stream.tensor(n)) for n in small], strict=False)
        self._kept: dict[str, mx.array] = {}
        for matrix, item in self._items.items():
            size = 4 * item.rows * item.columns
            if size <= kept:
                self._kept[matrix] = stream.tensor(item.name).reshape(item.rows, -1)
                kept -= size
        producers = [config.producer_of(i) for i in range(config.num_hidden_layers)]
        self._producer = producers[index]
        self._read_later = index in producers[index + 1 :]

    def rows(self, matrix: str, begin: int, end: int) -> mx.array:
        """The plain `Rows`."""
        if matrix in self._kept:
            return self._kept[matrix][begin:end]
        return self._stream.rows(self._items[matrix].name, begin, end)

    def run(self, state: State, rows: Rows | None = None, visit: Visit | None = None) -> State:
        """Through the layer. The state given stays as it is. rows: weights other than its own."""
        parts = _Parts(self, rows or self.rows, visit or (lambda matrix, x: None))
        parts.put_into(self._layer, self._stream)
        config = self._stream.config
        positions = mx.arange(state.hidden.shape[1])
        step = Step(0, None, {kind: rope.angles(positions) for kind, rope in self._stream.ropes.items()})
        view = None if self._producer == self.index else state.views[self._producer]
        per_layer = state.per_layer[self.index] if state.per_layer is not None else None
        assert (per_layer is None) == (not config.hidden_size_per_layer_input)
        hidden, view = self._layer(state.hidden, step, None, view, per_layer)
        mx.eval(hidden)
        views = state.views | {self.index: view} if self._read_later else state.views
        return State(hidden, state.per_layer, views)

    def shape(self, matrix: str) -> tuple[int, ...]:
        return self._items[matrix].shape


class _Parts:
    """The modules of one run."""

    def __init__(self, layer: Layer, rows: Rows, visit: Visit) -> None:
        self.layer, self.rows, self.visit = layer, rows, visit

    def put_into(self, module: DecoderLayer, stream: LayerStream) -> None:
        found: Any = module
        attention = found.self_attn.attention if isinstance(found.self_attn, _Texts) else found.self_attn
        found.self_attn = _Texts(self, attention)
        found.mlp = _Mlp(self)
        if found.has_experts:
            found.router.proj = _Map(self, "router.proj")
            found.experts = _Experts(self, stream.config.num_experts)
        for name in ("per_layer_input_gate", "per_layer_projection"):
            if hasattr(found, name):
                setattr(found, name, _Map(self, name))

    def product(self, matrix: str, x: mx.array) -> mx.array:
        """x [rows, columns] times the matrix, block by block: [rows, its rows]."""
        *_, height, columns = self.layer.shape(matrix)
        parts = []
        for begin, end in row_blocks(height, columns):
            parts.append(x @ self.rows(matrix, begin, end).T)
            mx.eval(parts[-1])
        return mx.concatenate(parts, axis=-1)


class _Map:
    """A linear map."""

    def __init__(self, parts: _Parts, matrix: str) -> None:
        self._parts, self._matrix = parts, matrix

    def __call__(self, x: mx.array) -> mx.array:
        flat = x.reshape(-1, x.shape[-1])
        self._parts.visit(self._matrix, flat)
        return self._parts.product(self._matrix, flat).reshape(*x.shape[:-1], -1)


class _Texts:
    """Attention, one text at a time between the products with its matrices."""

    def __init__(self, parts: _Parts, attention: Attention) -> None:
        self._parts, self.attention = parts, attention

    def __call__(self, x: mx.array, step: Step, cache: None, view: View | None) -> tuple[mx.array, View]:
        attention: Any = self.attention
        names = ["q_proj"]
        if view is None:
            names += ["k_proj"] if attention.k_is_v else ["k_proj", "v_proj"]
        done = {name: _Map(self._parts, f"self_attn.{name}")(x) for name in names}
        attention.o_proj = nn.Identity()
        out, views = [], []
        for row in range(x.shape[0]):
            for name, value in done.items():
                setattr(attention, name, Known(value[row : row + 1]))
            attended, seen = attention(x[row : row + 1], step, None, None if view is None else _texts(view, row))
            mx.eval(attended, seen.keys, seen.values)
            out.append(attended)
            views.append(seen)
        if view is None:
            first: Any = views[0]
            keys, values = (mx.concatenate([getattr(v, kind) for v in views]) for kind in ("keys", "values"))
            view = replace(first, keys=keys, values=values)
            mx.eval(keys, values)
        del done
        assert view is not None
        return _Map(self._parts, "self_attn.o_proj")(mx.concatenate(out)), view


def _texts(view: Any, row: int) -> View:
    return replace(view, keys=view.keys[row : row + 1], values=view.values[row : row + 1])


class _Mlp:
    """GeGLU; the wide activation is made block by block and held once."""

    def __init__(self, parts: _Parts) -> None:
        self._parts = parts

    def __call__(self, x: mx.array) -> mx.array:
        flat, rows = x.reshape(-1, x.shape[-1]), self._parts.rows
        for name in ("mlp.gate_proj", "mlp.up_proj"):
            self._parts.visit(name, flat)
        inner = []
        for begin, end in row_blocks(*self._parts.layer.shape("mlp.gate_proj")):
            gate, up = (flat @ rows(name, begin, end).T for name in ("mlp.gate_proj", "mlp.up_proj"))
            inner.append(geglu(gate, up))
            mx.eval(inner[-1])
        wide = mx.concatenate(inner, axis=-1)
        del inner
        return _Map(self._parts, "mlp.down_proj")(wide).reshape(x.shape)


class _Experts:
    """The weighted sum of the chosen experts, a few experts at a time."""

    def __init__(self, parts: _Parts, experts: int) -> None:
        self._parts, self._experts = parts, experts

    def __call__(self, x: mx.array, chosen: mx.array, weights: mx.array) -> mx.array:
        """x [N, T, H], chosen and weights [N, T, K] -> [N, T, H]."""
        flat = x.reshape(-1, x.shape[-1])
        which, share = (np.array(a.reshape(flat.shape[0], -1)) for a in (chosen, weights))
        out = np.zeros(flat.shape, np.float32)
        _, inner, width = self._parts.layer.shape("experts.switch_glu.gate_proj")
        for first, last in row_blocks(self._experts, inner * width):
            gate, up = (self._rows(name, first, last, inner) for name in ("gate_proj", "up_proj"))
            down = self._rows("down_proj", first, last, width)
            for e in range(first, last):
                token, place = np.nonzero(which == e)
                if not token.size:
                    continue
                rows = flat[mx.array(token)]
                y = geglu(rows @ gate[e - first].T, rows @ up[e - first].T) @ down[e - first].T
                out[token] += np.array(y * mx.array(share[token, place])[:, None])
        return mx.array(out).reshape(x.shape)

    def _rows(self, name: str, first: int, last: int, height: int) -> mx.array:
        """The matrices of experts [first, last): [experts, height, columns]."""
        found = self._parts.rows(f"experts.switch_glu.{name}", first * height, last * height)
        return found.reshape(last - first, height, -1)
