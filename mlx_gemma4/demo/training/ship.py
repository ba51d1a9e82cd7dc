"""Turns a trained checkpoint into the folder that ships: converted and quantized by our own code.

    python ship.py CHECKPOINT ../model [--bits 8]

Owns: the steps after training. The checkpoint, that of `train.py` or `export.py`, is converted like any other Hugging
Face folder, which packs the text decoder and leaves towers in bfloat16. The template and the model card stay as they
are.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from mlx_gemma4.conversions.convert import convert
from mlx_gemma4.conversions.recipe import uniform

KEPT = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
WITH_TOWERS = "processor_config.json"
LIMIT = 8_500_000  # the installed package stays under 10 MB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=64)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made"
        convert(args.checkpoint, made, recipe=uniform(args.bits, args.group_size), dtype="bfloat16")
        args.target.mkdir(parents=True, exist_ok=True)
        for name in (*KEPT, WITH_TOWERS) if (made / WITH_TOWERS).exists() else KEPT:
            shutil.copy(made / name, args.target / name)
    size = sum(p.stat().st_size for p in args.target.iterdir())
    print(f"{size:,} bytes in {args.target}")
    if size > LIMIT:
        raise SystemExit(f"more than {LIMIT:,} bytes")


if __name__ == "__main__":
    main()
