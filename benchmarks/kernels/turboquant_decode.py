"""Time to decode a tile of rows from a larger buffer: Metal kernel, reference, and `mx.dequantize` as a yardstick.

python -m benchmarks.kernels.turboquant_decode [--rows 4096] [--dtype float16]
"""

import argparse

import mlx.core as mx

from benchmarks.kernels.turboquant_encode import milliseconds
from mlx_gemma4.kernels import backend, turboquant
from mlx_gemma4.kernels.turboquant_decode import turboquant_decode


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=4096, help="rows in the tile (default 4096)")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    arguments = parser.parse_args()
    rows, dtype = arguments.rows, getattr(mx, arguments.dtype)
    ways = ["metal", "reference"] if mx.metal.is_available() else ["reference"]
    print(f"{rows} rows of a buffer of twice as many, to {arguments.dtype}; ms, executed: {', '.join(ways)}")
    print("| mode | bits | width | " + " | ".join(ways) + " | ns/coordinate | mx.dequantize | bytes in | bytes out |")
    print("|---|" + "---:|" * (len(ways) + 6))
    for mode in ("trellis", "pairs"):
        for width in (128, 512):
            quantized = mx.quantize(mx.random.normal((rows, width)).astype(dtype), group_size=64, bits=4)
            plain = milliseconds(lambda q=quantized: mx.dequantize(*q, group_size=64, bits=4))
            for bits in turboquant.BITS:
                codec = turboquant.codec(width, bits, mode)
                codes = mx.random.randint(0, 1 << 31, (1, 1, 2 * rows, codec.words)).astype(mx.uint32)
                scales = mx.ones((1, 1, 2 * rows), dtype=mx.float16)
                mx.eval(codes, scales)
                times = []
                for way in ways:
                    with backend.forced(way):
                        times.append(
                            milliseconds(
                                lambda c=codec, k=codes, s=scales: turboquant_decode(
                                    c, k, s, rows // 2, 3 * rows // 2, dtype
                                )
                            )
                        )
                read, written = rows * (4 * codec.words + 2), rows * width * dtype.size
                cells = [mode, f"{bits:g}", str(width), *(f"{t:.2f}" for t in times)]
                cells += [f"{times[0] * 1e6 / (rows * width):.2f}", f"{plain:.2f}", str(read), str(written)]
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
