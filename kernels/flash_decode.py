"""Attention of few queries over a long context, split over the context so that every core has work.

Owns block sizes and the number of splits; the kernel is `metal/flash_decode.metal`, the arithmetic in plain MLX ops
`reference/flash_decode.py`. What calls it is chosen in `flash_attention.py`.

Each key and value is read once per 16 query rows of a KV head: once for all G query heads of one token.
"""

import mlx.core as mx

from . import backend
from .flash_inputs import INPUTS, kernel_inputs, refusal
from .key_form import KeyForm
from .merge_partials import merge_partials
from .reference.flash_decode import flash_decode as reference

# Query rows per KV head up to which this kernel serves; more make a prefill.
MAX_ROWS = 64
KEYS = 32
# Keys per threadgroup at least: its partial result, written and read again, is then at most an eighth of what it reads
# for 8 heads of one-vector keys in bfloat16.
MIN_CHUNK = 256
MAX_SPLITS = 64


def flash_decode(
    q: mx.array,
    keys: mx.array,
    values: mx.array | None,
    form: KeyForm | None = None,
    *,
    scale: float = 1.0,
    q_start: int,
    k_start: int = 0,
    first_visible: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Causal attention of q [B, H, L, D] over keys, values [B, H_kv, T, D]: a partial, whole if it saw all keys.

    (out float32 [B, H, L, D], lse float32 [B, H, L]); a query that sees nothing has out 0 and lse MASKED. Query i
    stands at position q_start + i, key j at k_start + j; row b sees positions from first_visible[b] on (int [B]).
    One-vector caches pass their vectors as keys, no values, and the `form` of their keys; k_start is 0 then.

    On Metal q, keys and values begin at multiples of 16 bytes, as slices along B, H and T do.
    """
    run = launch if backend.use_metal("flash_decode", refusal(q, keys, values, form)) else reference
    return run(q, keys, values, form, scale=scale, q_start=q_start, k_start=k_start, first_visible=first_visible)


def chunk_of(keys: int) -> int:
    """Keys per split of a context of so many: whole tiles, at most MAX_SPLITS splits, none shorter than MIN_CHUNK."""
    return max(MIN_CHUNK, -(-keys // (MAX_SPLITS * KEYS)) * KEYS)


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
) -> tuple[mx.array, mx.array]:
    """`flash_decode` on the Metal kernel."""
    B, H, L, D = q.shape
    kv_heads, T = keys.shape[1:3]
    G = H // kv_heads
    chunk = chunk_of(T)
    splits = -(-T // chunk)
    rows = 8 if G * L <= 8 else 16
    inputs = kernel_inputs(q, keys, values, form, first_visible, scale, [kv_heads, L, T, chunk, q_start], k_start)
    kernel = backend.metal_kernel(
        "flash_decode", INPUTS, ["out", "lse"], includes=["attention"], ensure_row_contiguous=False
    )
    threads = D // 2
    outs, lses = kernel(
        inputs=inputs,
        template=[
            ("T", q.dtype),
            ("W", inputs[INPUTS.index("weight")].dtype),
            ("D", D),
            ("G", G),
            ("ROWS", rows),
            ("KEYS", KEYS),
            ("ONE_VECTOR", form is not None),
        ],
        grid=(threads * splits, kv_heads * -(-G * L // rows), B),
        threadgroup=(threads, 1, 1),
        output_shapes=[(splits, B, H, L, D), (splits, B, H, L)],
        output_dtypes=[mx.float32, mx.float32],
    )
    return (outs[0], lses[0]) if splits == 1 else merge_partials(outs, lses)
