"""What each rate of the KV codec loses, beside the paper's figures and mlx-vlm's codec at equal real bits.

Relative squared error of coding and decoding normal rows, one fixed sample per width for all columns. Real bits count
the float16 scale per row that both sides store here. Leaves attention error to the model-level comparisons.

    python -m benchmarks.turboquant_distortion             markdown
    python -m benchmarks.turboquant_distortion --check     also fails where ours exceeds 0.65x of mlx-vlm's

mlx-vlm's fractional rates are two codecs, keys at the integer below and values at the one above; its error is the mean.
"""

import argparse
import importlib.util
import math
import sys

import mlx.core as mx

from mlx_gemma4.kernels import turboquant

WIDTHS = (256, 512)
# TurboQuant (arXiv 2504.19874), theorem 1.
PAPER = {1: 0.36, 2: 0.117, 3: 0.03, 4: 0.009}
LIMIT = 0.65


def relative(decoded: mx.array, x: mx.array) -> float:
    return (mx.square(decoded - x).sum() / mx.square(x).sum()).item()


def ours(x: mx.array, bits: float, mode: str) -> float:
    codec = turboquant.codec(x.shape[-1], bits, mode)
    codes, scales = turboquant.encode(codec, x)
    return relative(turboquant.unrotate(codec, turboquant.decode(codec, codes, scales)), x)


def mlx_vlm(x: mx.array, bits: float) -> float:
    """Error of mlx-vlm's `--kv-bits`, as its cache builds the codecs of keys and of values."""
    from mlx_vlm import turboquant as theirs

    errors = []
    for seed, part in enumerate((math.floor(bits), math.ceil(bits))):
        codec = theirs._build_codec(x[None, None], part, mode="mse", seed=theirs.DEFAULT_TURBOQUANT_SEED + seed)
        errors.append(relative(codec.dequantize(codec.quantize(x[None, None])).astype(mx.float32)[0, 0], x))
    return sum(errors) / 2


def table(rows: int) -> tuple[str, list[float]]:
    """Markdown, and ours over mlx-vlm's at each rate and width (empty without mlx-vlm)."""
    with_peer = importlib.util.find_spec("mlx_vlm") is not None
    columns = ["bits", "width", "real bits", "trellis", "pairs", "paper mode", "paper", "mlx-vlm", "trellis / mlx-vlm"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---:|" * len(columns)]
    ratios = []
    for bits in turboquant.PAPER_BITS:
        for width in WIDTHS:
            x = mx.random.normal((rows, width), key=mx.random.key(width))
            errors = [
                f"{ours(x, bits, mode):.4f}" if mode == "paper" or bits in turboquant.BITS else "-"
                for mode in turboquant.MODES
            ]
            peer = ["-", "-"]
            if with_peer and bits in turboquant.BITS:
                theirs = mlx_vlm(x, bits)
                ratios.append(ours(x, bits, turboquant.MODES[0]) / theirs)
                peer = [f"{theirs:.4f}", f"{ratios[-1]:.2f}"]
            cells = [f"{bits:g}", str(width), f"{bits + 16 / width:.4g}", *errors, f"{PAPER.get(bits, '-')}", *peer]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines), ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=256, help="rows per width (default 256)")
    parser.add_argument("--check", action="store_true", help=f"fail where ours exceeds {LIMIT} of mlx-vlm's error")
    arguments = parser.parse_args()
    text, ratios = table(arguments.rows)
    print(text)
    if not ratios:
        print("mlx-vlm is not installed: pip install -e '.[vlm]'", file=sys.stderr)
    if arguments.check and (not ratios or max(ratios) > LIMIT):
        sys.exit(1)


if __name__ == "__main__":
    main()
