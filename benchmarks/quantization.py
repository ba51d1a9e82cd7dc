"""What bits cost in quality: KL to the unpacked model at equal size, against mlx-lm's and mlx-vlm's own choices.

    python -m benchmarks.quantization [--checkpoint demo] [--rows 2] [--length 256] [--csv results.csv]
    python -m benchmarks.quantization --checkpoint moe --length 64 --at default-4bit --csv results.csv
    python -m benchmarks.quantization --checkpoint dense --length 64 --fixed --csv results.csv

Owns the comparison. Each side is a choice of packing per matrix: the peers' from their own predicates, ours from a
recipe or from a calibration held to the bytes of the peer's result. Every choice is applied to the same float32 graph,
so that nothing but the weights differs. "demo" is the built-in model, calibrated on the built-in sample (or, with
--text own, on questions of the kind it was trained on) and compared on questions kept for its test; the others are
random and have no structure, so that little can be gained on them.
"""

import argparse
import csv
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.checkpoint import SHAPES, write_checkpoint
from mlx_gemma4 import demo
from mlx_gemma4.config import Gemma4Config
from mlx_gemma4.conversions import recipe
from mlx_gemma4.conversions.allocation import choose
from mlx_gemma4.conversions.calibration_text import token_rows
from mlx_gemma4.conversions.compensate import compensate
from mlx_gemma4.conversions.convert import convert
from mlx_gemma4.conversions.layers import LayerStream, rounded
from mlx_gemma4.conversions.plan import stored_as
from mlx_gemma4.conversions.scratch import Scratch
from mlx_gemma4.conversions.sensitivity import measure
from mlx_gemma4.conversions.sources import Folder
from mlx_gemma4.loading import load_model
from mlx_gemma4.models.gemma4 import Model
from mlx_gemma4.tokenizer import Tokenizer

Packings = Mapping[str, recipe.Packing | None]
# Text to compare on: token ids and, per position, whether its prediction counts.
Data = list[tuple[list[int], np.ndarray]]
PEERS = ("default-4bit", "mixed_3_4", "mixed_3_6", "mixed_4_6")
OURS = ("3bit", "4bit", "mixed-3-4", "mixed-3-5", "mixed-3-6", "mixed-4-5", "mixed-4-6")


def predicates(model: Any) -> dict[str, Callable[[str, Any], Any]]:
    """The peers' choices, by name: mlx-lm's and mlx-vlm's own functions."""
    from mlx_lm.convert import mixed_quant_predicate_builder as lm
    from mlx_vlm.convert import mixed_quant_predicate_builder as vlm

    router = {"group_size": 64, "bits": 8}
    out: dict[str, Callable[[str, Any], Any]] = {
        "mlx-lm, mlx-vlm default-4bit": lambda path, module: router if "router" in path else True
    }
    for name in PEERS[1:]:
        out[f"mlx-lm {name}"] = lm(name, model)
        out[f"mlx-vlm {name}"] = vlm(name, model)
    return out


def packings_of(model: Any, predicate: Callable[[str, Any], Any]) -> dict[str, recipe.Packing | None]:
    out: dict[str, recipe.Packing | None] = {}
    for path, module in model.named_modules():
        if not hasattr(module, "to_quantized"):
            continue
        chosen = predicate(path, module)
        if chosen is True:
            chosen = {"group_size": 64, "bits": 4}
        out[path] = recipe.Packing(chosen["group_size"], chosen["bits"]) if chosen else None
    return out


def packings_by(chosen: recipe.Recipe, stream: LayerStream, config: Gemma4Config, paths: Iterable[str]) -> Packings:
    """What a recipe makes of these matrices."""
    found = {path: chosen.choose(path, config.text) for path in paths}
    return {path: packing and packing.fitted(stream.item(path).columns) for path, packing in found.items()}


def nbytes(stream: LayerStream, packings: Packings) -> int:
    items = ((stream.item(path), packing) for path, packing in packings.items())
    return sum(o.nbytes for item, packing in items for o in stored_as(item.name, item.shape, item.dtype, packing))


def packed_model(folder: Path, stream: LayerStream, packings: Packings, files: list[Path]) -> Model:
    """The float32 model with what each matrix is after packing; from `files` where GPTQ packed it."""
    model = load_model(folder, dtype="float32")
    modules = dict(model.named_modules())
    done: dict[str, mx.array] = {}
    for file in files:
        done |= mx.load(str(file))  # pyright: ignore[reportCallIssue, reportArgumentType]
    for path, packing in packings.items():
        if packing is None:
            continue
        if f"{path}.weight" in done:
            parts = [done[f"{path}.{leaf}"] for leaf in ("weight", "scales", "biases")]
            floats = [p.astype(mx.float32) for p in parts[1:]]
            modules[path].weight = mx.dequantize(parts[0], *floats, packing.group_size, packing.bits)
        else:
            modules[path].weight = rounded(modules[path].weight, packing, stream.item(path).dtype)
    mx.eval(model.parameters())
    return model


def distributions(model: Model, data: Data) -> list[np.ndarray]:
    """Log-probabilities [T, V] per text."""
    out = []
    for ids, _ in data:
        logits = model(mx.array([ids]))[0]
        out.append(np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True)))
    return out


def compare(truth: list[np.ndarray], found: list[np.ndarray], data: Data) -> dict[str, float]:
    """Means over positions: KL in nats and the share with the same first choice, everywhere and where it counts."""
    kl = np.concatenate([(np.exp(p) * (p - q)).sum(-1) for p, q in zip(truth, found, strict=True)])
    same = np.concatenate([p.argmax(-1) == q.argmax(-1) for p, q in zip(truth, found, strict=True)])
    counts = np.concatenate([c for _, c in data])
    return {
        "kl": round(float(kl.mean()), 6),
        "kl_answers": round(float(kl[counts].mean()), 6),
        "same_first": round(float(same.mean()), 4),
    }


def demo_data(own: bool, rows: int, length: int, each: int) -> tuple[np.ndarray, Data]:
    """Calibration rows, and questions with answers that the model was not trained on."""
    sys.path.insert(0, str(Path(demo.__file__).parent / "training"))
    import world  # pyright: ignore[reportMissingImports]

    tokenizer = Tokenizer.from_folder(demo.path())

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    data: Data = []
    for kind in ("facts", "sums", "rules", "talk", "unknown", "recall-512"):
        for example in world.test_set(kind, 1 if kind == "recall-512" else each, encode, seed=11):
            ids, weights = world.encode_example(example, encode)
            # Position i predicts token i + 1.
            data.append((ids, np.array([*(w > 0 for w in weights[1:]), False])))
    if not own:
        return token_rows(tokenizer, None, rows, length), data
    draws, ids = random.Random(3), []
    while len(ids) < rows * length:
        ids += world.encode_example(world.draw(draws, encode, length), encode)[0]
    return np.array(ids[: rows * length]).reshape(rows, length), data


def random_data(vocabulary: int, rows: int, length: int) -> tuple[np.ndarray, Data]:
    numbers = np.random.default_rng(4)
    data = [(numbers.integers(3, vocabulary, length).tolist(), np.ones(length, bool)) for _ in range(2)]
    return numbers.integers(3, vocabulary, (rows, length)), data


def table(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    if args.checkpoint == "demo":
        convert(demo.path(), folder, 16)
        tokens, data = demo_data(args.text == "own", args.rows, args.length, args.questions)
    else:
        write_checkpoint(folder, args.checkpoint, "plain", "bfloat16")
        size = json.loads((folder / "config.json").read_text())["vocab_size"]
        tokens, data = random_data(size, args.rows, args.length)
    config = Gemma4Config.from_folder(folder)
    stream = LayerStream(Folder(folder), config)
    plain = load_model(folder, dtype="float32")
    truth = distributions(plain, data)
    paths = packings_of(plain, lambda *_: None)
    parameters = sum(stream.item(p).rows * stream.item(p).columns for p in paths)
    options: Mapping[str, Any] = {}
    if not args.fixed:
        with tempfile.TemporaryDirectory() as work:
            options = measure(stream, tokens, Scratch(Path(work)))
    out: list[dict[str, Any]] = []

    def add(name: str, packings: Packings, files: list[Path], like: str = "") -> int:
        size = nbytes(stream, packings)
        found = compare(truth, distributions(packed_model(folder, stream, packings, files), data), data)
        row = {"checkpoint": args.checkpoint, "choice": name, "at_the_size_of": like, "matrix_bytes": size}
        out.append(row | {"bits_per_weight": round(size * 8 / parameters, 3)} | found)
        print(out[-1], flush=True)
        return size

    for name in OURS:
        add(f"recipe {name}", packings_by(recipe.load(name), stream, config, paths), [])
    for name, predicate in predicates(plain).items():
        size = add(name, packings_of(plain, predicate), [])
        if args.fixed or (args.at and not any(at in name for at in args.at)):
            continue
        packings = {path: option.packing for path, option in choose(options, size).items()}
        add("calibrated bits", packings, [], name)
        with tempfile.TemporaryDirectory() as work:
            files = compensate(stream, tokens, packings, Scratch(Path(work)))
            add("calibrated bits and GPTQ", packings, files, name)
    stream.close()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", choices=("demo", *SHAPES), default="demo")
    parser.add_argument("--text", choices=("sample", "own"), default="sample", help="what the demo is calibrated on")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--questions", type=int, default=6, help="of each kind to compare the demo on")
    parser.add_argument("--at", nargs="*", help="calibrate at these peers' sizes only: part of a name")
    parser.add_argument("--fixed", action="store_true", help="no calibration: our recipes and the peers' only")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rows = table(args, Path(name) / "plain")
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
