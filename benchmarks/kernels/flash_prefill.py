"""Attention of a prefill chunk, 512-wide heads: our kernel, its reference and plain MLX operations.

    python -m benchmarks.kernels.flash_prefill [--queries 32] [--context 1024] [--dtype bfloat16]

Layers and columns are those of `flash_decode`; `plain` keeps the scores of the whole chunk, which is its scratch.
"""

import mlx.core as mx

from .flash_decode import table

if __name__ == "__main__":
    if mx.metal.is_available():
        table(__doc__, rows=512, contexts=(2048, 8192), repeats=3)
    else:
        table(__doc__, rows=32, contexts=(1024,), repeats=1)
