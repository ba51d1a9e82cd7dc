"""Attention of a chunk of queries over everything before and in it, without keeping its scores.

Owns block sizes; the kernel is `metal/flash_prefill.metal`, the arithmetic in plain MLX ops
`reference/flash_prefill.py`. What calls it is chosen in `flash_attention.py`.

No scratch in device memory: scores live in 23 KB of threadgroup memory (D = 512), 16 keys at a time.
"""

import mlx.core as mx

from . import backend
from .flash_inputs import INPUTS, kernel_inputs, refusal
from .key_form import KeyForm
from .reference.flash_prefill import flash_prefill as reference

KEYS = 16


def flash_prefill(
    q: mx.array,
    keys: mx.array,
    values: mx.array | None,
    form: KeyForm | None = None,
    *,
    scale: float = 1.0,
    q_start: int,
    k_start: int = 0,
    first_visible: mx.array | None = None,
    dtype: mx.Dtype = mx.float32,
) -> tuple[mx.array, mx.array]:
    """As `flash_decode`, for any number of queries; `dtype` is the type of out."""
    run = launch if backend.use_metal("flash_prefill", refusal(q, keys, values, form)) else reference
    where = {"q_start": q_start, "k_start": k_start, "first_visible": first_visible}
    return run(q, keys, values, form, scale=scale, dtype=dtype, **where)


def launch(
    q: mx.array,
    keys: mx.array,
    values: mx.array | None,
    form: KeyForm | None = None,
    *,
    scale: float = 1.0,
    q_start: int,
    k_start: int = 0,
    first_visible: mx.array | None = None,
    dtype: mx.Dtype = mx.float32,
) -> tuple[mx.array, mx.array]:
    """`flash_prefill` on the Metal kernel."""
    B, H, L, D = q.shape
    kv_heads, T = keys.shape[1:3]
    G = H // kv_heads
    # A thread keeps 2 * rows numbers of output and as many of queries in registers; 4-byte queries leave room for 16.
    rows = 16 if q.dtype == mx.float32 else 32
    inputs = kernel_inputs(q, keys, values, form, first_visible, scale, [kv_heads, L, T, q_start], k_start)
    kernel = backend.metal_kernel(
        "flash_prefill", INPUTS, ["out", "lse"], includes=["attention"], ensure_row_contiguous=False
    )
    threads = D // 2
    out, lse = kernel(
        inputs=inputs,
        template=[
            ("T", q.dtype),
            ("O", dtype),
            ("W", inputs[INPUTS.index("weight")].dtype),
            ("D", D),
            ("G", G),
            ("ROWS", rows),
            ("KEYS", KEYS),
            ("ONE_VECTOR", form is not None),
        ],
        grid=(threads * -(-G * L // rows), kv_heads, B),
        threadgroup=(threads, 1, 1),
        output_shapes=[(B, H, L, D), (B, H, L)],
        output_dtypes=[dtype, mx.float32],
    )
    return out, lse
