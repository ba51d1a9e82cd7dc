"""Windowed attention of a prefill chunk: our kernel, its reference and plain MLX operations side by side.

    python -m benchmarks.kernels.sliding_prefill [--chunk 64] [--dtype bfloat16]

One sequence, one chunk after a full window, heads of E2B (8 over 1, window 512) and 31B (32 over 16, window 1,024).
`scratch` is what a run allocates besides its inputs and its output. With images: the middle half of the chunk is one.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import mlx.core as mx

from mlx_gemma4.kernels import backend
from mlx_gemma4.kernels.sliding_attention import block_reach
from mlx_gemma4.kernels.sliding_prefill import sliding_prefill

# name, query heads, KV heads, window; all 256 wide
SHAPES = (("E2B", 8, 1, 512), ("31B", 32, 16, 1024))
WIDTH = 256
COLUMNS = f"{'shape':24}{'path':12}{'ms':>10}{'of plain':>10}{'scratch MB':>12}{'K+V MB':>8}"


def measure(run: Callable[[], mx.array], repeats: int) -> tuple[float, float]:
    """(median milliseconds, megabytes allocated besides inputs and output)."""
    mx.eval(run())
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    out = run()
    mx.eval(out)
    scratch = mx.get_peak_memory() - before - out.nbytes
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(run())
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times), scratch / 1e6


def compare(shape: str, paths: dict[str, Callable[[], mx.array]], stored: int, repeats: int) -> None:
    """Prints a row per path; the last one is the plain one that the others are divided by. stored: bytes of K and V."""
    figures = {name: measure(run, repeats) for name, run in paths.items()}
    plain = figures["plain"][0]
    for name, (ms, scratch) in figures.items():
        print(f"{shape:24}{name:12}{ms:10.2f}{ms / plain:10.2f}{scratch:12.1f}{stored / 1e6:8.1f}", flush=True)


def forced(mode: str, run: Callable[[], mx.array]) -> Callable[[], mx.array]:
    def call() -> mx.array:
        with backend.forced(mode):
            return run()

    return call


def ours(run: Callable[[], mx.array]) -> dict[str, Callable[[], mx.array]]:
    """The paths of ours that this machine has."""
    paths = {"reference": forced("reference", run)}
    if mx.metal.is_available():
        paths = {"metal": forced("metal", run)} | paths
    return paths


def plain(q: mx.array, keys: mx.array, values: mx.array, mask: mx.array) -> mx.array:
    """All scores at once; mask [B, 1, L, T]."""
    B, H, L, D = q.shape
    grouped = q.reshape(B, keys.shape[1], -1, L, D)
    scores = grouped @ keys[:, :, None].swapaxes(-1, -2)
    weights = mx.softmax(mx.where(mask[:, None], scores, mx.finfo(scores.dtype).min), axis=-1, precise=True)
    return (weights @ values[:, :, None]).reshape(B, H, L, D)


def arguments(description: str | None, chunk: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--chunk", type=int, default=chunk, help="queries")
    parser.add_argument("--dtype", default="bfloat16" if mx.metal.is_available() else "float32")
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    where = "Metal" if mx.metal.is_available() else "CPU, so no Metal kernel ran"
    print(f"mlx {mx.__version__}, {where}; {chosen.dtype}, {chosen.chunk} queries, median of {chosen.repeats}")
    print(COLUMNS)
    return chosen


def main() -> None:
    chosen = arguments(__doc__, 512 if mx.metal.is_available() else 64)
    L, dtype = chosen.chunk, getattr(mx, chosen.dtype)
    for name, heads, kv_heads, window in SHAPES:
        T = window - 1 + L
        q = mx.random.normal((1, heads, L, WIDTH)).astype(dtype)
        keys, values = (mx.random.normal((1, kv_heads, T, WIDTH)).astype(dtype) for _ in range(2))
        blocks = mx.where((mx.arange(L) >= L // 4) & (mx.arange(L) < 3 * L // 4), 0, -1)[None]
        mx.eval(q, keys, values)
        p, t = mx.arange(window - 1, T)[:, None], mx.arange(T)[None]
        for reach, label in ((None, name), (block_reach(blocks, window - 1), f"{name}, an image")):
            end = p + 1 if reach is None else reach[0][:, None]
            mask = ((t > p - window) & (t < end))[None, None]

            def run(q=q, keys=keys, values=values, window=window, reach=reach) -> mx.array:
                return sliding_prefill(q, keys, values, q_start=window - 1, window=window, reach=reach)

            def whole(q=q, keys=keys, values=values, mask=mask) -> mx.array:
                return plain(q, keys, values, mask)

            compare(label, ours(run) | {"plain": whole}, keys.nbytes + values.nbytes, chosen.repeats)
    print("ran:", ", ".join(f"{operation} {path}" for operation, path in backend.status().items()))


if __name__ == "__main__":
    main()
