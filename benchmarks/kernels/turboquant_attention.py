"""Time of one decode step's attention on codes: Metal kernel, reference, MLX's attention on exact rows, and mlx-vlm.

    python -m benchmarks.kernels.turboquant_attention [--bits 3.5] [--contexts 2048 8192] [--queries 1]

One layer of one sequence, random rows, the rotations of query and output included on all sides. `exact` is
mx.fast.scaled_dot_product_attention on rows in the compute type. mlx-vlm's column is its own TurboQuant at the same
bits per value, which it gives keys rounded down and values rounded up; it decodes one query at a time.
"""

import argparse
import importlib.util

import mlx.core as mx

from benchmarks.kernels.turboquant_encode import milliseconds
from mlx_gemma4.kernels import backend
from mlx_gemma4.kernels.turboquant import codec, rotate, unrotate
from mlx_gemma4.kernels.turboquant_attention import CodedKeys, turboquant_attention

WIDTH, ROTARY_WIDTH = 512, 128
# name, query heads, KV heads, one vector for key and value
SHAPES = (("E4B", 8, 2, False), ("26B-A4B", 16, 2, True), ("31B", 32, 4, True))


def coded(width: int, bits: float, kv_heads: int, context: int, scaled: bool) -> CodedKeys:
    c = codec(width, bits)
    codes = mx.random.randint(0, 1 << 31, (1, kv_heads, context, c.words)).astype(mx.uint32)
    return CodedKeys(c, codes, mx.ones((1, kv_heads, context), mx.float16) if scaled else None)


def ours(q: mx.array, keys: CodedKeys, values: CodedKeys | None, rotary: CodedKeys | None, context: int) -> mx.array:
    turned = None if rotary is None else rotate(rotary.codec, q[..., :ROTARY_WIDTH]).astype(q.dtype)
    out, _ = turboquant_attention(
        rotate(keys.codec, q).astype(q.dtype),
        keys,
        values,
        rotary,
        turned,
        scale=1.0,
        start=0,
        length=context,
        first=None,
    )
    return unrotate(keys.codec, out)


def of_mlx_vlm(q: mx.array, exact: tuple[mx.array, mx.array], bits: float) -> float:
    from mlx_vlm.turboquant import TurboQuantKVCache

    cache = TurboQuantKVCache(bits=bits)
    for start in range(0, exact[0].shape[2], 2048):
        keys, values = cache.update_and_fetch(*(x[:, :, start : start + 2048] for x in exact))
    return milliseconds(
        lambda: cache.decode_attention(q, keys_state=keys, values_state=values, scale=1.0, mask=None), 2
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--bits", type=float, default=3.5)
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--queries", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16" if mx.metal.is_available() else "float32")
    chosen = parser.parse_args()
    ways = ["metal", "reference"] if mx.metal.is_available() else ["reference"]
    with_vlm = importlib.util.find_spec("mlx_vlm") is not None and chosen.queries == 1
    print(f"{chosen.queries} queries, {chosen.bits:g} bits, {chosen.dtype}; ms, executed: {', '.join(ways)}")
    columns = ["shape", "context", *ways, "exact", *(["mlx-vlm", "mlx-vlm / ours"] if with_vlm else [])]
    print("| " + " | ".join([*columns, "bytes of codes", "exact bytes"]) + " |")
    print("|---|" + "---:|" * (len(columns) + 1))
    for name, heads, kv_heads, one_vector in SHAPES:
        for context in chosen.contexts:
            q = (mx.random.normal((1, heads, chosen.queries, WIDTH)) / 8).astype(getattr(mx, chosen.dtype))
            exact = tuple(mx.random.normal((1, kv_heads, context, WIDTH)).astype(q.dtype) for _ in range(2))
            keys = coded(WIDTH, chosen.bits, kv_heads, context, scaled=not one_vector)
            values = None if one_vector else coded(WIDTH, chosen.bits, kv_heads, context, scaled=False)
            rotary = coded(ROTARY_WIDTH, chosen.bits, kv_heads, context, scaled=True) if one_vector else None
            held = [x for rows in (keys, values, rotary) if rows for x in (rows.codes, rows.scales) if x is not None]
            mx.eval(q, exact, held)
            times = []
            for way in ways:
                with backend.forced(way):
                    times.append(milliseconds(lambda a=(q, keys, values, rotary, context): ours(*a)))
            cells = [*times, milliseconds(lambda q=q, e=exact: mx.fast.scaled_dot_product_attention(q, *e, scale=1.0))]
            if with_vlm:
                theirs = of_mlx_vlm(q, exact, chosen.bits)
                cells += [theirs, theirs / times[0]]
            stored = [str(sum(x.nbytes for x in held)), str(sum(x.nbytes for x in exact))]
            print("| " + " | ".join([name, str(context), *(f"{x:.2f}" for x in cells), *stored]) + " |", flush=True)


if __name__ == "__main__":
    main()
