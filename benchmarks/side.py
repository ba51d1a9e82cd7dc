"""One runtime of a paired benchmark, in a process of its own: ours, mlx-lm or mlx-vlm behind one small interface.

    python -m benchmarks.side ours FOLDER

Reads one JSON command a line on stdin and answers with one JSON line:

    {"do": "prefill" or "decode", "context": n, "tokens": n}
    {"seconds": s, "cpu_seconds": s, "peak_bytes": b, "cache_bytes": b} or {"error": "..."}

The cache is filled with random keys and values up to the context first, outside the timing.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx


class Side:
    """A loaded model and how its caches are filled and sized."""

    def __init__(self, name: str, folder: str):
        self.name = name
        self.config = json.loads((Path(folder) / "config.json").read_text())
        if name == "ours":
            from mlx_gemma4.loading import load_model

            self.model = load_model(Path(folder), dtype=self.config["dtype"])
        elif name == "mlx-lm":
            from mlx_lm.utils import load_model

            self.model, _ = load_model(Path(folder))
        elif name == "mlx-vlm":
            from mlx_vlm.utils import load_model

            self.model = load_model(Path(folder)).language_model
        else:
            raise SystemExit(f"unknown side {name}; choose ours, mlx-lm or mlx-vlm")
        self.dtype = getattr(mx, self.config["dtype"])
        self.config = self.config.get("text_config", self.config)
        self.caches: dict[int, Any] = {}

    def logits(self, tokens: mx.array, cache: Any) -> mx.array:
        out = self.model(tokens, cache=cache)
        return getattr(out, "logits", out)[:, -1]

    def filled(self, context: int) -> Any:
        """A cache that holds `context` random positions."""
        cache = self.model.make_cache()
        kinds = self.config["layer_types"]
        own = self.config["num_hidden_layers"] - self.config["num_kv_shared_layers"]
        mx.random.seed(1)
        for c, kind in zip(cache, kinds[:own], strict=False):
            sliding = kind == "sliding_attention"
            width = self.config["head_dim" if sliding else "global_head_dim"]
            heads = self.config["num_key_value_heads"]
            if not sliding and self.config["num_global_key_value_heads"]:
                heads = self.config["num_global_key_value_heads"]
            keys = mx.random.normal((1, heads, context, width)).astype(self.dtype)
            if self.name != "ours":
                c.update_and_fetch(keys, keys)
            elif c.kind.startswith("global, one vector"):
                c.append(keys, None)
            else:
                c.append(keys, keys)
            mx.eval(c.state)
        return cache

    def run(self, do: str, context: int, tokens: int) -> dict[str, float]:
        cache = self.filled(context)
        vocabulary = self.config["vocab_size"]
        prompt = mx.random.randint(0, vocabulary, (1, tokens))
        # One step outside the timing: compiled kernels, the first in-place write.
        mx.eval(self.logits(prompt[:, :1], cache))
        mx.reset_peak_memory()
        start, cpu = time.perf_counter(), time.process_time()
        if do == "prefill":
            # As every runtime's generation loop does: all but the last token for the caches only, then one step.
            self.logits(prompt[:, :-1], cache)
            mx.eval([c.state for c in cache])
            mx.eval(self.logits(prompt[:, -1:], cache))
        else:
            y = mx.argmax(self.logits(prompt[:, :1], cache), axis=-1)
            mx.async_eval(y)
            for _ in range(tokens - 1):
                following = mx.argmax(self.logits(y[None], cache), axis=-1)
                mx.async_eval(following)
                y.item()
                y = following
            mx.eval(y)
        return {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu,
            "peak_bytes": mx.get_peak_memory(),
            "cache_bytes": sum(c.nbytes for c in cache),
        }


def main() -> None:
    side = Side(sys.argv[1], sys.argv[2])
    print(json.dumps({"ready": side.name}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer: dict[str, Any] = side.run(command["do"], command["context"], command["tokens"])
        except Exception as error:  # a peer that cannot do this case is a result, too
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
