"""The compressed cache of global layers with separate keys and values (E2B, E4B), layers that others read included.

Keys are coded after RoPE, each with its scale; values come out of a norm without weights and need none. Which
positions are codes is `blocks.py`'s business. A step attends to two segments, each with its own softmax, and merges
them by their log-sum-exp:

    exact    [sinks | tail, chunk in flight], causal
    codes    everything between, in rotated coordinates: the query is rotated once, the output rotated back once

As long as there are no codes the step is the plain cache's, number for number.

Bytes: 2 * H_kv * (SINKS + TAIL) * D * itemsize exact, and H_kv * (4 * (key words + value words) + 2) per coded
position: 1,350 in E2B and 3,600 in E4B at 3.5 bits over all layers, where 16 bits take 6,144 and 16,384.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from ..kernels.flash_attention import attend_partial
from ..kernels.merge_partials import merge_partials
from ..kernels.reference.flash_attention import wait_for
from ..kernels.turboquant import Codec, rotate, unrotate
from ..kernels.turboquant_attention import CodedKeys, turboquant_attention
from .base import View
from .blocks import SINKS, BlockCache, Rows, code_capacity
from .coded import CodedRows
from .sliding import ChunkView

# Numbers of the queries that are attended to at a time, 8.4 MB as float32. At width 512 these are the rows of one tile
# of `kernels/reference/flash_attention.py`, so no code is decoded once more for it.
QUERY_ELEMENTS = 1 << 21

Partial = tuple[mx.array, mx.array]  # out float32 [B, H, L, D], log-sum-exp float32 [B, H, L]


@dataclass(frozen=True)
class Segments:
    """Which positions lie where in one step, per row of the batch."""

    q_start: int
    coded: int  # positions before this one are codes
    left_padding: tuple[int, ...] | None

    @property
    def k_start(self) -> int:
        """Position given to the first sink, so that the tail behind the sinks gets its own."""
        return self.coded - SINKS

    def exact_visible(self, length: int) -> mx.array | None:
        """Which of `length` rows [sinks | tail, chunk] hold something to see beside the causal rule: boolean [B,
        length]. A sink that is not coded yet is seen in the tail, a padded position nowhere."""
        if self.left_padding is None:
            return None
        padding = mx.array(self.left_padding)[:, None]
        sinks = padding + mx.arange(SINKS) < self.coded
        tail = self.coded + mx.arange(length - SINKS) >= padding
        return mx.concatenate([sinks, tail], axis=1)

    @property
    def first_code(self) -> mx.array | None:
        """The first position each row sees as codes, int32 [B]; None when it is SINKS in all."""
        return None if self.left_padding is None else mx.array([p + SINKS for p in self.left_padding], mx.int32)


def merged(parts: Sequence[Partial], dtype: mx.Dtype) -> mx.array:
    """Attention over all segments, [B, H, L, D] of `dtype`."""
    out, _ = merge_partials(mx.stack([out for out, _ in parts]), mx.stack([lse for _, lse in parts]))
    return out.astype(dtype)


def turned(codec: Codec, q: mx.array) -> mx.array:
    """q [B, H, L, D] in the coordinates of the codes. Where 16 bits are asked for, half: a rotated query is small, and
    bfloat16 would round it a second time."""
    return rotate(codec, q).astype(mx.float32 if q.dtype == mx.float32 else mx.float16)


def by_tiles(q: mx.array, attend: Callable[[mx.array, int], mx.array]) -> mx.array:
    """`attend(rows, first)` for a tile of query rows after the other, [B, H, L, D]: partial results are float32, and
    those of a whole chunk would be larger than everything else."""
    B, H, L, D = q.shape
    rows = max(1, QUERY_ELEMENTS // (B * H * D))
    out: list[mx.array] = []
    for i in range(0, L, rows):
        out.append(attend(wait_for(q[:, :, i : i + rows], out[-1] if out else None), i))
    return out[0] if len(out) == 1 else mx.concatenate(out, axis=2)


@dataclass(frozen=True)
class CompressedView:
    keys: mx.array  # exact, [B, H_kv, T, D]: sinks, tail and this step's
    values: mx.array
    coded_keys: CodedKeys
    coded_values: CodedKeys
    at: Segments

    def attend(self, q: mx.array, scale: float = 1.0) -> mx.array:
        return by_tiles(q, lambda rows, first: self._attend(rows, first, scale))

    def _attend(self, q: mx.array, first: int, scale: float) -> mx.array:
        exact = attend_partial(
            q,
            self.keys,
            self.values,
            scale=scale,
            q_start=self.at.q_start + first,
            k_start=self.at.k_start,
            visible=self.at.exact_visible(self.keys.shape[2]),
        )
        out, lse = turboquant_attention(
            turned(self.coded_keys.codec, q),
            self.coded_keys,
            self.coded_values,
            None,
            None,
            scale=scale,
            start=SINKS,
            length=self.at.coded,
            first=self.at.first_code,
        )
        return merged([exact, (unrotate(self.coded_values.codec, out), lse)], q.dtype)


class CompressedCache(BlockCache):
    kind: ClassVar[str] = "global keys and values"

    def __init__(self, key_codec: Codec, value_codec: Codec, left_padding: Sequence[int] | None = None):
        super().__init__(left_padding)
        self.keys = CodedRows("keys", key_codec, unit=False)
        self.values = CodedRows("values", value_codec, unit=True)
        self.rows = (self.keys, self.values)

    def append(self, keys: mx.array, values: mx.array) -> View:
        """Remembers keys after RoPE and values of mean square 1, [B, H_kv, L, D]."""
        start, coded = self.offset, self.coded
        rows, lead = self._take_in((keys, values))
        view: View
        if coded:
            at = Segments(start, coded, self.left_padding)
            view = CompressedView(rows[0], rows[1], self.keys.held(), self.values.held(), at)
        else:
            view = ChunkView(rows[0], rows[1], start, 0, None, self.first_visible)

        def code(block: Rows, first: int) -> None:
            capacity = code_capacity(self.keys.capacity, first + block[0].shape[2], keys.shape[2])
            for coded_rows, x in zip(self.rows, block, strict=True):
                coded_rows.write(x, first, capacity)

        self._code_blocks(rows, lead, code)
        return view
