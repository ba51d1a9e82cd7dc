"""Attention of one token over a long context, 512-wide heads: our kernel, its reference and plain MLX operations.

    python -m benchmarks.kernels.flash_decode [--context 2048 8192] [--dtype bfloat16]

Heads of E4B (8 over 2, keys and values) and 31B (32 over 4, one vector, keys rebuilt on the way). `plain` is MLX's own
attention over stored keys and values. `read MB` is what the cache holds and a token must read.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from mlx_gemma4.config import RopeConfig
from mlx_gemma4.kernels import backend
from mlx_gemma4.kernels.flash_attention import attend, attend_one_vector
from mlx_gemma4.kernels.key_form import KeyForm
from mlx_gemma4.models.rope import Rope

WIDTH = 512
COLUMNS = f"{'layer':8}{'queries':>8}{'context':>9}  {'path':10}{'ms':>10}{'scratch MB':>12}{'read MB':>9}"


@dataclass(frozen=True)
class Layer:
    """A global layer's heads and what attention is asked of it."""

    name: str
    heads: int
    kv_heads: int
    one_vector: bool

    def paths(self, rows: int, context: int, dtype: mx.Dtype) -> tuple[dict[str, Callable[[], mx.array]], int]:
        """Name -> one attention call of `rows` queries at the end of `context`; bytes the cache holds."""
        q = (mx.random.normal((1, self.heads, rows, WIDTH)) / WIDTH**0.5).astype(dtype)
        values = mx.random.normal((1, self.kv_heads, context, WIDTH)).astype(dtype)
        form = KeyForm(mx.ones((WIDTH,), dtype), Rope(RopeConfig(1e6, "proportional", 0.25), WIDTH))
        keys = form.keys(values, *form.rope.table(context))
        mask = mx.arange(context) <= mx.arange(context - rows, context)[:, None]
        mx.eval(q, keys, values, mask)

        def ours() -> mx.array:
            if self.one_vector:
                return attend_one_vector(q, values, form, q_start=context - rows, first_visible=None)
            return attend(q, keys, values, q_start=context - rows)

        def plain() -> mx.array:
            return mx.fast.scaled_dot_product_attention(q, keys, values, scale=1.0, mask=mask)

        def forced(mode: str) -> mx.array:
            with backend.forced(mode):
                return ours()

        paths = {"reference": lambda: forced("reference"), "plain": plain}
        if mx.metal.is_available():
            paths = {"metal": lambda: forced("metal")} | paths
        return paths, values.nbytes if self.one_vector else keys.nbytes + values.nbytes


LAYERS = (Layer("E4B", 8, 2, False), Layer("31B", 32, 4, True))


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


def table(description: str | None, rows: int, contexts: tuple[int, ...], repeats: int) -> None:
    """Reads the options and prints a row per layer, context and path."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--queries", type=int, default=rows)
    parser.add_argument("--context", type=int, nargs="+", default=list(contexts), help="positions, queries included")
    parser.add_argument("--dtype", default="bfloat16" if mx.metal.is_available() else "float32")
    parser.add_argument("--repeats", type=int, default=repeats)
    chosen = parser.parse_args()
    where = "Metal" if mx.metal.is_available() else "CPU, so no Metal kernel ran"
    print(f"mlx {mx.__version__}, {where}; {chosen.dtype}, median of {chosen.repeats}")
    print(COLUMNS)
    for layer in LAYERS:
        for context in chosen.context:
            paths, stored = layer.paths(chosen.queries, context, getattr(mx, chosen.dtype))
            for name, run in paths.items():
                ms, scratch = measure(run, chosen.repeats)
                shape = f"{layer.name:8}{chosen.queries:8}{context:9}"
                print(f"{shape}  {name:10}{ms:10.2f}{scratch:12.1f}{stored / 1e6:9.1f}", flush=True)
    print("ran:", ", ".join(f"{operation} {path}" for operation, path in backend.status().items()) or "the reference")


if __name__ == "__main__":
    table(__doc__, rows=1, contexts=(2048, 8192), repeats=5)
