"""A checkpoint's text decoder one layer at a time, in float32: what calibration runs without holding the model.

Owns reading matrices and rows from a `Source` in either layout, and the start and the end of the decoder around its
layers. Leaves a layer's own run to `bounded.py`, bytes to `blocks.py`, names and shapes to `plan.py`.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gemma4.cache import View
from mlx_gemma4.config import GLOBAL, SLIDING, Gemma4Config
from mlx_gemma4.conversions import blocks
from mlx_gemma4.conversions.plan import Item, build
from mlx_gemma4.conversions.recipe import Packing
from mlx_gemma4.conversions.sources import Reader, Source
from mlx_gemma4.models.rope import Rope
from mlx_gemma4.models.text import TextModel

MODEL = "language_model.model."
EMBED, TABLE, HEAD = MODEL + "embed_tokens", MODEL + "embed_tokens_per_layer", "language_model.lm_head"
PROJECTION = MODEL + "per_layer_model_projection"

KINDS = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
# Float32 bytes of a matrix in memory at a time, where it is not kept whole.
BLOCK = 32 << 20
# Module path, plain rows of its weight -> the rows to compute with.
Change = Callable[[str, mx.array], mx.array]


def unchanged(path: str, weight: mx.array) -> mx.array:
    return weight


def rounded(weight: mx.array, packing: Packing, dtype: str) -> mx.array:
    """What a weight is after packing and unpacking, in float32, as the converter packs it: scales are `dtype`."""
    words, scales, *biases = mx.quantize(weight.astype(KINDS[dtype]), **packing.as_dict())
    if not biases:
        return mx.dequantize(words, scales, **packing.as_dict(), dtype=mx.float32)
    return mx.dequantize(words, scales.astype(mx.float32), biases[0].astype(mx.float32), **packing.as_dict())


def row_blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """[begin, end) of the blocks in which a matrix is read."""
    step = max(1, BLOCK // (4 * columns))
    for begin in range(0, rows, step):
        yield begin, min(begin + step, rows)


@dataclass
class State:
    """A sequence's way through the decoder: the residual stream [N, T, E] in front of a layer.

    per_layer: what per-layer embeddings bring, [N, T, P] by layer, or None. views: keys and values of layers that
    others read.
    """

    hidden: mx.array
    per_layer: dict[int, mx.array] | None = None
    views: dict[int, View] = field(default_factory=dict)


class LayerStream:
    """The decoder behind a source, nothing of which is read before it is needed. Close it.

    dtype: of the scales that the converter will write; None: as the source stores weights. Raises WeightsError when the
    source is not what config.json says.
    """

    def __init__(self, source: Source, config: Gemma4Config, dtype: str | None = None) -> None:
        plan = build(source.headers, config, lambda path: None, None, dtype=dtype, text_only=True)
        self.config = text = config.text
        self.items = {item.name: item for item in plan.items}
        self._source, self._reader, self._started = source, Reader(source), False
        self.ropes = {
            SLIDING: Rope(text.rope_sliding, text.head_dim),
            GLOBAL: Rope(text.rope_global, text.global_head_dim),
        }
        # Only its small parts are ever filled; the rest stays unevaluated and takes no memory.
        self._frame = TextModel(text)

    def close(self) -> None:
        self._reader.close()

    def item(self, path: str) -> Item:
        return self.items[path + ".weight"]

    @property
    def head(self) -> str:
        """The path of the matrix that makes logits."""
        return EMBED if self.config.tie_word_embeddings else HEAD

    @property
    def tables(self) -> list[str]:
        """Paths of the matrices outside layers: the embedding, the per-layer path's two, a head of its own."""
        found = [EMBED] + ([TABLE, PROJECTION] if self.config.hidden_size_per_layer_input else [])
        return found + ([] if self.head == EMBED else [self.head])

    def matrices(self, index: int) -> list[str]:
        """Module paths of a layer's matrices within it: "self_attn.q_proj", ..."""
        found = (re.fullmatch(rf"{re.escape(MODEL)}layers\.{index}\.(.+)\.weight", n) for n in self.items)
        return [m[1] for m in found if m and len(self.items[f"{MODEL}layers.{index}.{m[1]}.weight"].shape) > 1]

    def path(self, index: int, matrix: str) -> str:
        return f"{MODEL}layers.{index}.{matrix}"

    def tensor(self, name: str) -> mx.array:
        """A whole tensor, float32."""
        item = self.items[name]
        parts = [self.rows(name, begin, end) for begin, end in row_blocks(item.rows, item.columns)]
        return mx.concatenate(parts).reshape(item.shape)

    def rows(self, name: str, begin: int, end: int) -> mx.array:
        """Rows [begin, end) of a matrix, float32 [end - begin, columns]. Raises WeightsError for NaN or infinity."""
        if not self._started:
            self._source.start(self._source.headers)
            self._started = True
        item = self.items[name]
        spans = blocks.spans(item, begin, end)
        parts = tuple(self._reader.read(*at, part) for at, part in zip(item.sources, spans, strict=True))
        raw = blocks.Raw(item, begin, end, parts)
        blocks.check_finite(raw)
        value = blocks.plain(raw).reshape(end - begin, -1).astype(mx.float32)
        mx.eval(value)
        return value

    def sample(self, name: str, count: int) -> mx.array:
        """About `count` rows of a matrix, spread over it; all of them where there are no more."""
        item = self.items[name]
        if item.rows < 2 * count:
            return self.tensor(name).reshape(item.rows, -1)
        step = item.rows // count * 64
        return mx.concatenate([self.rows(name, at, at + 64) for at in range(0, item.rows - 64, step)])

    def lookup(self, path: str, tokens: np.ndarray, change: Change = unchanged) -> mx.array:
        """The tokens' rows of a table: int [N, T] -> float32 [N, T, columns]."""
        unique, places = np.unique(tokens, return_inverse=True)
        found = [self.rows(path + ".weight", int(row), int(row) + 1) for row in unique]
        table = change(path, mx.concatenate(found))
        return table[mx.array(places.reshape(tokens.shape))]

    def start(self, tokens: np.ndarray, change: Change = unchanged) -> State:
        """In front of the first layer: tokens int [N, T]."""
        frame, config = self._frame, self.config
        if not config.hidden_size_per_layer_input:
            hidden = self.lookup(EMBED, tokens, change) * config.hidden_size**0.5
            mx.eval(hidden)
            return State(hidden)
        frame.per_layer_projection_norm.weight = self.tensor(MODEL + "per_layer_projection_norm.weight")
        frame.per_layer_model_projection.weight = change(PROJECTION, self.tensor(PROJECTION + ".weight"))
        streams, inputs = [], []
        for row in tokens:  # rows of all layers at once are large
            x = self.lookup(EMBED, row[None], change) * config.hidden_size**0.5
            looked_up: Any = Known(self.lookup(TABLE, row[None], change))
            frame.embed_tokens_per_layer = looked_up
            streams.append(x)
            inputs.append(frame._per_layer_inputs(mx.array(row[None]), x))
            mx.eval(streams[-1], inputs[-1])
        frame.per_layer_model_projection.weight = mx.zeros((1,))
        layers = {i: mx.concatenate([p[:, :, i] for p in inputs]) for i in range(config.num_hidden_layers)}
        state = State(mx.concatenate(streams), layers)
        mx.eval(state.hidden, layers)
        return state

    def final(self, hidden: mx.array) -> mx.array:
        """What the head multiplies: [N, T, E] -> [N * T, E]."""
        self._frame.norm.weight = self.tensor(MODEL + "norm.weight")
        return self._frame.norm(hidden).flatten(0, 1)

    def head_blocks(self, block_rows: int = 2048) -> Iterator[mx.array]:
        """The output head, float32 [rows, E] at a time."""
        item = self.item(self.head)
        for begin in range(0, item.rows, block_rows):
            yield self.rows(item.name, begin, min(begin + block_rows, item.rows))


class Known:
    """Stands in for a module whose result is at hand."""

    def __init__(self, value: mx.array) -> None:
        self._value = value

    def __call__(self, x: mx.array) -> mx.array:
        return self._value
