"""Time to code one block of 64 positions: Metal kernel, reference, and `mx.quantize` as a yardstick.

python -m benchmarks.kernels.turboquant_encode [--heads 4]
"""

import argparse
import time
from collections.abc import Callable

import mlx.core as mx

from mlx_gemma4.kernels import backend, turboquant

BLOCK = 64


def milliseconds(run: Callable[[], object], repeats: int = 3) -> float:
    """The best of a few, after one to warm up."""
    mx.eval(run())
    best = float("inf")
    for _ in range(repeats):
        begun = time.perf_counter()
        mx.eval(run())
        best = min(best, time.perf_counter() - begun)
    return best * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--heads", type=int, default=1, help="heads in the block (default 1)")
    heads = parser.parse_args().heads
    ways = ["metal", "reference"] if mx.metal.is_available() else ["reference"]
    print(f"{BLOCK} positions x {heads} heads, float32; ms, executed: {', '.join(ways)}")
    print("| mode | bits | width | " + " | ".join(ways) + " | rows/s | mx.quantize | bytes in | bytes out |")
    print("|---|" + "---:|" * (len(ways) + 6))
    for mode in ("trellis", "pairs"):
        for width in (128, 512):
            x = mx.random.normal((1, heads, BLOCK, width))
            mx.eval(x)
            plain = milliseconds(lambda x=x: mx.quantize(x, group_size=64, bits=4))
            for bits in turboquant.BITS:
                codec = turboquant.codec(width, bits, mode)
                times = []
                for way in ways:
                    with backend.forced(way):
                        times.append(milliseconds(lambda codec=codec, x=x: turboquant.encode(codec, x)))
                out = BLOCK * heads * (4 * codec.words + 2)
                cells = [mode, f"{bits:g}", str(width), *(f"{t:.2f}" for t in times)]
                cells += [f"{BLOCK * heads / times[0] * 1e3:.0f}", f"{plain:.2f}", str(x.nbytes), str(out)]
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
