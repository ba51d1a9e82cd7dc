"""Rows of a buffer of codes back to numbers, a tile at a time: what prefill and other multi-row reads go through.

Owns the choice of path and the launch; the format is `turboquant.py`'s, the reference `reference/turboquant_decode.py`.
"""

import mlx.core as mx

from mlx_gemma4.errors import UsageError

from . import backend
from .reference import turboquant_decode as reference
from .turboquant import Codec

# Rows per threadgroup: loading the table (4 KB) is then at most a quarter of what is written, at any width.
ROWS = {32: 256, 64: 128, 128: 64, 256: 32, 512: 16}
THREADS = 256


def turboquant_decode(
    codec: Codec,
    codes: mx.array,
    scales: mx.array | None,
    start: int,
    stop: int,
    dtype: mx.Dtype,
    gain: float = 1.0,
) -> mx.array:
    """Rows [start, stop) of every head -> [B, H, stop - start, width] in `dtype`, in rotated coordinates, times `gain`.

    codes uint32 [B, H, capacity, words] and scales float16 [B, H, capacity] or None are whole buffers: the kernel
    reads the rows where they lie, since a slice would be copied. Raises UsageError for rows outside the buffer.
    """
    B, H, capacity, words = codes.shape
    if words != codec.words:
        raise UsageError(f"codes of {words} words a row, but this codec has {codec.words}")
    if not 0 <= start <= stop <= capacity:
        raise UsageError(f"rows {start} to {stop} of a buffer of {capacity}")
    # MLX gives a kernel an array of fewer than 8 elements in another address space; no cache has so few codes.
    if start == stop or codes.size < 8 or not backend.use_metal("turboquant_decode"):
        return reference.turboquant_decode(codec, codes, scales, start, stop, dtype, gain)
    n, rows = stop - start, ROWS[codec.width]
    kernel = backend.metal_kernel(
        "turboquant_decode", ("codes", "scales", "codebook", "span", "gain"), ("out",), includes=("turboquant",)
    )
    return kernel(
        inputs=[
            codes,
            mx.zeros((1,), dtype=mx.float16) if scales is None else scales,
            codec.codebook,
            mx.array([start, n], dtype=mx.int32),
            mx.array([gain], dtype=mx.float32),
        ],
        template=[
            ("T", dtype),
            ("D", codec.width),
            ("KV", codec.pair_bits),
            ("L", codec.window_bits),
            ("WORDS", words),
            ("ROWS", rows),
            ("SCALED", scales is not None),
        ],
        grid=(THREADS, -(-n // rows), B * H),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(B, H, n, codec.width)],
        output_dtypes=[dtype],
    )[0]
