"""Time to join partial results of split attention: Metal kernel, reference, and a copy as a yardstick.

python -m benchmarks.kernels.merge_partials
"""

import mlx.core as mx

from benchmarks.kernels.turboquant_encode import milliseconds
from mlx_gemma4.kernels import backend
from mlx_gemma4.kernels.merge_partials import merge_partials

# name, splits, heads, queries, width
SHAPES = (("31B decode, splits", 20, 32, 1, 512), ("31B decode, segments", 2, 32, 1, 512), ("chunk", 2, 8, 256, 512))


def main() -> None:
    ways = ["metal", "reference"] if mx.metal.is_available() else ["reference"]
    print(f"float32; ms, executed: {', '.join(ways)}")
    print("| shape | partials | " + " | ".join(ways) + " | a copy | bytes in | bytes out |")
    print("|---|" + "---:|" * (len(ways) + 4))
    for name, splits, heads, queries, width in SHAPES:
        outs = mx.random.normal((splits, 1, heads, queries, width))
        lses = mx.random.normal((splits, 1, heads, queries))
        mx.eval(outs, lses)
        times = []
        for way in ways:
            with backend.forced(way):
                times.append(milliseconds(lambda o=outs, s=lses: merge_partials(o, s)))
        copy = milliseconds(lambda o=outs: o + 0)
        cells = [name, str(splits), *(f"{t:.3f}" for t in times), f"{copy:.3f}"]
        cells += [str(outs.nbytes + lses.nbytes), str((outs.nbytes + lses.nbytes) // splits)]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
