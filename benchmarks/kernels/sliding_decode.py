"""Windowed attention of one query, or of a draft's queries, over a ring: kernel, reference and plain MLX operations.

    python -m benchmarks.kernels.sliding_decode [--chunk 8] [--dtype bfloat16]

One sequence, a ring that has wrapped, heads of E2B (8 over 1, window 512) and 31B (32 over 16, window 1,024), for 1 and
for `--chunk` queries. `fused` is MLX's own attention with a mask, which on Metal is fused for one query.
"""

import mlx.core as mx

from mlx_gemma4.kernels import backend
from mlx_gemma4.kernels.sliding_decode import sliding_decode

from .sliding_prefill import SHAPES, WIDTH, arguments, compare, ours, plain


def main() -> None:
    chosen = arguments(__doc__, 8)
    dtype = getattr(mx, chosen.dtype)
    for name, heads, kv_heads, window in SHAPES:
        for L in (1, chosen.chunk):
            slots = window + L - 1
            newest = 3 * slots + 5
            q = mx.random.normal((1, heads, L, WIDTH)).astype(dtype)
            keys, values = (mx.random.normal((1, kv_heads, slots, WIDTH)).astype(dtype) for _ in range(2))
            mx.eval(q, keys, values)
            positions = newest - (newest % slots - mx.arange(slots)) % slots
            p = mx.arange(newest - L + 1, newest + 1)[:, None]
            mask = ((positions <= p) & (positions > p - window))[None, None]

            def run(q=q, keys=keys, values=values, newest=newest, slots=slots, window=window) -> mx.array:
                where = {"newest": newest, "newest_slot": newest % slots, "used": slots, "window": window}
                return sliding_decode(q, keys, values, **where)

            def fused(q=q, keys=keys, values=values, mask=mask) -> mx.array:
                return mx.fast.scaled_dot_product_attention(q, keys, values, scale=1.0, mask=mask)

            def whole(q=q, keys=keys, values=values, mask=mask) -> mx.array:
                return plain(q, keys, values, mask)

            paths = ours(run) | {"fused": fused, "plain": whole}
            compare(f"{name}, {L} queries", paths, keys.nbytes + values.nbytes, chosen.repeats)
    print("ran:", ", ".join(f"{operation} {path}" for operation, path in backend.status().items()))


if __name__ == "__main__":
    main()
