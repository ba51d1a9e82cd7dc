"""Rows kept as codes: the buffer of one kind of vector (keys, values, ...) of one compressed layer.

Owns capacity, writing and what the codes take. Leaves coding to `kernels/turboquant.py` and which rows are coded when
to `blocks.py`.
"""

import hashlib
from typing import Any

import mlx.core as mx
import numpy as np

from ..kernels.turboquant import Codec, decode, encode, unrotate
from ..kernels.turboquant_attention import CodedKeys
from .base import room_for, write_at


class CodedRows:
    """[B, H_kv, capacity, D] as codes uint32 [B, H_kv, capacity, words], with float16 scales [B, H_kv, capacity].

    unit: the rows have mean square 1 by construction, so no scales are stored.
    """

    def __init__(self, name: str, codec: Codec, unit: bool):
        self.name, self.codec, self.unit = name, codec, unit
        self.codes: mx.array | None = None
        self.scales: mx.array | None = None
        # Evaluated at once, so that any thread may use them.
        mx.eval(codec.signs, codec.codebook)

    @property
    def capacity(self) -> int:
        return 0 if self.codes is None else self.codes.shape[2]

    @property
    def row_bytes(self) -> int:
        """Bytes of one vector: codes and scale."""
        return 4 * self.codec.words + (0 if self.unit else 2)

    def write(self, rows: mx.array, start: int, capacity: int) -> None:
        """Codes `rows` [B, H_kv, n, D] into slots start .. start+n of a buffer of at least `capacity`."""
        codes, scales = encode(self.codec, rows, self.unit)
        self.codes = _put(self.codes, codes, start, capacity)
        if scales is not None:
            self.scales = _put(self.scales, scales, start, capacity)

    def held(self) -> CodedKeys:
        """The whole buffers, as attention takes them. Only when something was written."""
        assert self.codes is not None
        return CodedKeys(self.codec, self.codes, self.scales)

    def contents(self, stop: int | None = None) -> dict[str, mx.array]:
        """The arrays by name, cut to `stop` slots if that is given."""
        named = {f"{self.name}.codes": self.codes, f"{self.name}.scales": self.scales}
        return {name: a if stop is None else a[:, :, :stop] for name, a in named.items() if a is not None}

    def settle(self, contents: dict[str, mx.array]) -> None:
        self.codes, self.scales = (contents.get(f"{self.name}.{part}") for part in ("codes", "scales"))

    def settings(self) -> dict[str, Any]:
        table = hashlib.sha256(np.array(self.codec.codebook).tobytes()).hexdigest()
        return {"bits": self.codec.bits, "mode": self.codec.mode, "width": self.codec.width, "codebook": table}


def decoded(rows: CodedKeys, pieces: list[tuple[int, int]], gain: float, dtype: mx.Dtype) -> mx.array:
    """The vectors in slots start .. stop of each of `pieces`, one after the other, in their own coordinates: [B, H_kv,
    n, D] of `dtype`, times `gain`. For a bounded number of positions."""
    codes = mx.concatenate([rows.codes[:, :, a:b] for a, b in pieces], axis=2)
    scales = None if rows.scales is None else mx.concatenate([rows.scales[:, :, a:b] for a, b in pieces], axis=2)
    return (unrotate(rows.codec, decode(rows.codec, codes, scales)) * gain).astype(dtype)


def _put(buffer: mx.array | None, new: mx.array, start: int, capacity: int) -> mx.array:
    if buffer is None or buffer.shape[2] < capacity:
        buffer = room_for(buffer, new.shape, new.dtype, capacity)
    return write_at(buffer, new, start)
