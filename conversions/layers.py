"""A checkpoint's text decoder one layer at a time, in float32: what calibration runs without holding the model.

Owns reading matrices, rows and whole layers from a `Source` in either layout, and the start and the end of the decoder
around them. Leaves bytes to `blocks.py`, names and shapes to `plan.py`, the graph to `mlx_gemma4.models.text`.

In memory at a time: one decoder layer (26B-A4B, the largest: 3.4 GB), a row block of a table, what the caller keeps.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_gemma4.cache import View
from mlx_gemma4.config import Gemma4Config
from mlx_gemma4.conversions import blocks
from mlx_gemma4.conversions.plan import Item, build
from mlx_gemma4.conversions.recipe import Packing
from mlx_gemma4.conversions.sources import Reader, Source
from mlx_gemma4.models.text import DecoderLayer, Step, TextModel

MODEL = "language_model.model."
EMBED, TABLE, HEAD = MODEL + "embed_tokens", MODEL + "embed_tokens_per_layer", "language_model.lm_head"
PROJECTION = MODEL + "per_layer_model_projection"

KINDS = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
# Module path, plain weight -> the weight to compute with.
Change = Callable[[str, mx.array], mx.array]


def unchanged(path: str, weight: mx.array) -> mx.array:
    return weight


def rounded(weight: mx.array, packing: Packing, dtype: str) -> mx.array:
    """What a weight is after packing and unpacking, in float32, as the converter packs it: scales are `dtype`."""
    words, scales, *biases = mx.quantize(weight.astype(KINDS[dtype]), **packing.as_dict())
    if not biases:
        return mx.dequantize(words, scales, **packing.as_dict(), dtype=mx.float32)
    return mx.dequantize(words, scales.astype(mx.float32), biases[0].astype(mx.float32), **packing.as_dict())


@dataclass
class State:
    """A sequence's way through the decoder: the residual stream [N, T, E] in front of a layer.

    per_layer: [N, T, layers, P] or None. views: keys and values of layers that others read.
    """

    hidden: mx.array
    per_layer: mx.array | None
    views: dict[int, View]

    @property
    def nbytes(self) -> int:
        return self.hidden.nbytes


class LayerStream:
    """The decoder behind a source. Close it. Raises WeightsError when the source is not what config.json says.

    dtype: of the scales that the converter will write; None: as the source stores weights.
    """

    def __init__(self, source: Source, config: Gemma4Config, dtype: str | None = None) -> None:
        plan = build(source.headers, config, lambda path: None, None, dtype=dtype, text_only=True)
        self.config = config.text
        self.items = {item.name: item for item in plan.items}
        self._reader = Reader(source)
        source.start(source.headers)
        # Only its small parts are ever filled; the rest stays unevaluated and takes no memory.
        self._frame = TextModel(config.text)
        self._producers = [config.text.producer_of(i) for i in range(config.text.num_hidden_layers)]
        self._read_later = {p for i, p in enumerate(self._producers) if p != i}
        self._frame.norm.weight = self.tensor(MODEL + "norm.weight")
        if config.text.hidden_size_per_layer_input:
            self._frame.per_layer_projection_norm.weight = self.tensor(MODEL + "per_layer_projection_norm.weight")

    def close(self) -> None:
        self._reader.close()

    def item(self, path: str) -> Item:
        return self.items[path + ".weight"]

    @property
    def head(self) -> str:
        """The path of the matrix that makes logits."""
        return EMBED if self.config.tie_word_embeddings else HEAD

    def tensor(self, name: str) -> mx.array:
        """A whole tensor, float32."""
        item = self.items[name]
        parts = [self.rows(name, begin, end) for begin, end in blocks.ranges(item)]
        return mx.concatenate(parts).reshape(item.shape)

    def rows(self, name: str, begin: int, end: int) -> mx.array:
        """Rows [begin, end) of a matrix, float32 [end - begin, columns]. Raises WeightsError for NaN or infinity."""
        item = self.items[name]
        spans = blocks.spans(item, begin, end)
        parts = tuple(self._reader.read(*at, part) for at, part in zip(item.sources, spans, strict=True))
        raw = blocks.Raw(item, begin, end, parts)
        blocks.check_finite(raw)
        value = blocks.plain(raw).reshape(end - begin, -1).astype(mx.float32)
        mx.eval(value)
        return value

    def lookup(self, path: str, tokens: np.ndarray, change: Change = unchanged) -> mx.array:
        """The tokens' rows of a table: int [N, T] -> float32 [N, T, columns]."""
        unique, places = np.unique(tokens, return_inverse=True)
        found = [self.rows(path + ".weight", int(row), int(row) + 1) for row in unique]
        table = change(path, mx.concatenate(found))
        return table[mx.array(places.reshape(tokens.shape))]

    def start(self, tokens: np.ndarray, change: Change = unchanged) -> State:
        """In front of the first layer: tokens int [N, T]."""
        frame, config = self._frame, self.config
        x = self.lookup(EMBED, tokens, change) * config.hidden_size**0.5
        per_layer = None
        if config.hidden_size_per_layer_input:
            rows = self.lookup(TABLE, tokens, change)
            frame.embed_tokens_per_layer = _Known(rows)  # pyright: ignore[reportAttributeAccessIssue]
            frame.per_layer_model_projection.weight = change(PROJECTION, self.tensor(PROJECTION + ".weight"))
            per_layer = frame._per_layer_inputs(mx.array(tokens), x)
            mx.eval(per_layer)
            frame.per_layer_model_projection.weight = mx.zeros((1,))
        mx.eval(x)
        return State(x, per_layer, {})

    def layer(self, index: int) -> DecoderLayer:
        """The decoder layer with its weights, float32."""
        kind = self.config.layer_types[index]
        layer = DecoderLayer(self.config, index, self._frame._ropes[kind])
        prefix = f"{MODEL}layers.{index}."
        names = [n for n in self.items if n.startswith(prefix)]
        layer.load_weights([(n.removeprefix(prefix), self.tensor(n)) for n in names])
        return layer

    def matrices(self, index: int) -> list[str]:
        """Module paths of a layer's matrices within it: "self_attn.q_proj", ..."""
        found = (re.fullmatch(rf"{re.escape(MODEL)}layers\.{index}\.(.+)\.weight", n) for n in self.items)
        return [m[1] for m in found if m and len(self.items[f"{MODEL}layers.{index}.{m[1]}.weight"].shape) > 1]

    def path(self, index: int, matrix: str) -> str:
        return f"{MODEL}layers.{index}.{matrix}"

    def advance(self, layer: DecoderLayer, index: int, state: State) -> State:
        """Through one layer. The state given stays as it is."""
        step: Step = self._frame._step(state.hidden.shape[1], None, None)
        producer = self._producers[index]
        view = None if producer == index else state.views[producer]
        per_layer = None if state.per_layer is None else state.per_layer[:, :, index]
        hidden, view = layer(state.hidden, step, None, view, per_layer)
        mx.eval(hidden)
        views = state.views | {index: view} if index in self._read_later else state.views
        return State(hidden, state.per_layer, views)

    def final(self, state: State) -> mx.array:
        """What the head multiplies: [N * T, E]."""
        return self._frame.norm(state.hidden).flatten(0, 1)

    def head_blocks(self, block_rows: int = 8192) -> Iterator[mx.array]:
        """The output head, float32 [rows, E] at a time."""
        item = self.item(self.head)
        for begin in range(0, item.rows, block_rows):
            yield self.rows(item.name, begin, min(begin + block_rows, item.rows))


class _Known:
    """Stands in for an embedding whose rows are at hand."""

    def __init__(self, rows: mx.array) -> None:
        self._rows = rows

    def __call__(self, tokens: mx.array) -> mx.array:
        return self._rows


class Tap:
    """Stands in for a linear map and keeps what goes into it: `inputs` [rows, columns], None until called."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.inputs: mx.array | None = None

    def __call__(self, x: mx.array, *rest: Any) -> mx.array:
        self.inputs = x.reshape(-1, x.shape[-1])
        return self.module(x, *rest)


def tap_linear(layer: DecoderLayer, matrices: list[str]) -> dict[str, Tap]:
    """Puts a `Tap` in front of each `nn.Linear` among the matrices; `untap` takes them out."""
    modules = dict(layer.named_modules())
    taps = {m: Tap(modules[m]) for m in matrices if type(modules[m]) is nn.Linear}
    for matrix, tap in taps.items():
        _replace(layer, matrix, tap)
    return taps


def untap(layer: DecoderLayer, taps: dict[str, Tap]) -> None:
    for matrix, tap in taps.items():
        _replace(layer, matrix, tap.module)


def _replace(layer: DecoderLayer, matrix: str, value: Any) -> None:
    *parents, leaf = matrix.split(".")
    module: Any = layer
    for name in parents:
        module = getattr(module, name)
    setattr(module, leaf, value)
