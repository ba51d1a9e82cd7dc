"""Time and memory of encoding pictures and sound: ours against mlx-vlm, paired, one process per side.

    python -m benchmarks.media --csv media.csv
    python -m benchmarks.media --blas /usr/lib/x86_64-linux-gnu/libopenblas.so.0 --csv media-openblas.csv

Towers of the published widths with the same random weights on both sides (clip bounds that clip, float32 on a CPU),
from the file (pictures) or the samples (sound) to embeddings of the text stream. Rounds A B B A, ratios within a round.

A tower has 16 or 27 equal layers, more than a CPU gets through in an afternoon of rounds. So each encoding is measured
with no layer and with `--layers` of them, and `encode_seconds` is rest + depth * (time of a layer). `--layers 0` runs
the whole depth. `products` beside the two sides is the time of the matrix products that both need, alone, as MLX's
linears and attention call them: what no arrangement of the graph can save where it does not change the products' form.

`--blas` puts another BLAS library in the place of the one in MLX's wheel, on both sides: the reference BLAS multiplies
at a fiftieth of the processor's speed, beside which nothing else can be seen.

Owns both sides' adapters, pictures and sounds by formula, and the table. Never a test: machines are noisy.
"""

import argparse
import contextlib
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np

SIDES = ("ours", "mlx-vlm")
BOTH = {"model_type": "gemma4_vision", "rms_norm_eps": 1e-6, "position_embedding_size": 10240}
# tower: what config.json says of it, and the width of the text stream
TOWERS: dict[str, tuple[dict[str, Any], int]] = {
    "768": (BOTH | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 16, "num_attention_heads": 12,
                    "num_key_value_heads": 12, "head_dim": 64, "use_clipped_linears": True}, 2560),
    "1152": (BOTH | {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
                     "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 72, "standardize": True}, 5376),
    "audio": ({}, 2560),
}  # fmt: skip
PICTURES = {"4:3": (1600, 1200), "tall": (720, 1600), "wide": (3000, 1000)}
SOUNDS = {"10 s": (10.0,), "30 s": (30.0,), "27 s + 5 s": (27.0, 5.0)}
COLUMNS = ("tower", "budget", "case", "tokens", "blas", "side", "layers", "prepare_seconds", "encode_seconds",
           "joint_seconds", "prepare_ratio", "encode_ratio", "lowest", "highest", "encode_by_cpu", "joint_by_cpu",
           "peak_mb", "rss_mb", "products_share", "difference")  # fmt: skip
HWM = "VmHWM"


# ------------------------------------------------------------------ one side, in a process of its own


class Side:
    """One runtime's tower and projector: `prepare` reads a case, `encode` returns its embeddings, one row a token."""

    module: Any  # the tower

    def __init__(self, tower: str):
        self.tower = tower
        raw, self.text = TOWERS[tower]
        self.raw = dict(raw)
        self.build()
        self.layers = self.stack().layers

    def build(self) -> None:
        raise NotImplementedError

    def stack(self) -> Any:
        """The module whose `layers` are the tower's."""
        return self.module if self.tower == "audio" else self.module.encoder

    def fill(self, *parts: Any) -> None:
        """The same numbers on every side: from the name of the weight."""
        import mlx.core as mx
        from mlx.utils import tree_flatten

        for i, part in enumerate(parts):
            weights, flat = [], cast(list[tuple[str, mx.array]], tree_flatten(part.parameters()))
            for name, value in flat:
                key = mx.random.key(zlib.crc32(f"{i} {name}".encode()))
                if name.endswith(("_min", "_max")):
                    found = mx.array(-6.0 if name.endswith("_min") else 6.0)
                elif value.ndim < 2:
                    found = 1 + 0.1 * mx.random.normal(value.shape, key=key)
                else:
                    found = mx.random.normal(value.shape, key=key) * (value.size / value.shape[0]) ** -0.5
                weights.append((name, found))
            part.load_weights(weights)
            mx.eval(part.parameters())

    def prepare(self, files: list[str], budget: int) -> Any:
        raise NotImplementedError

    def encode(self, prepared: Any) -> Any:
        raise NotImplementedError

    def encoded(self, prepared: Any) -> Any:
        import mlx.core as mx

        out = self.encode(prepared)
        mx.eval(out)
        return out


class Ours(Side):
    def build(self) -> None:
        from mlx_gemma4.config_audio import AudioConfig
        from mlx_gemma4.config_vision import VisionConfig
        from mlx_gemma4.models.audio import AudioTower
        from mlx_gemma4.models.tower_parts import Projector
        from mlx_gemma4.models.vision import VisionTower

        if self.tower == "audio":
            config = AudioConfig()
            self.module = self.audio_tower = AudioTower(config)
            self.embed_audio = projector = Projector(config.output_proj_dims, self.text, config.rms_norm_eps)
        else:
            config = VisionConfig.from_dict(self.raw)
            self.module = self.vision_tower = VisionTower(config)
            self.embed_vision = projector = Projector(config.hidden_size, self.text, config.rms_norm_eps)
        self.fill(self.module, projector)

    def prepare(self, files: list[str], budget: int) -> Any:
        from mlx_gemma4.media.audio import Sound, clips_of
        from mlx_gemma4.media.images import load_image

        if self.tower == "audio":
            return [clip for file in files for clip in clips_of(Sound(np.load(file)))]
        return [load_image(file, budget) for file in files]

    def encode(self, prepared: Any) -> Any:
        import mlx.core as mx

        from mlx_gemma4.models.audio import encode_clips
        from mlx_gemma4.models.vision import encode_images

        run: Callable[..., Any] = encode_clips if self.tower == "audio" else encode_images
        return mx.concatenate(run(self, prepared))


class Theirs(Side):
    def build(self) -> None:
        from mlx_vlm.models.gemma4.audio import AudioEncoder
        from mlx_vlm.models.gemma4.config import AudioConfig, VisionConfig
        from mlx_vlm.models.gemma4.gemma4 import MultimodalEmbedder
        from mlx_vlm.models.gemma4.vision import VisionModel

        if self.tower == "audio":
            config = AudioConfig()
            self.module = AudioEncoder(config)
            self.embed = MultimodalEmbedder(config.output_proj_dims or 0, self.text, config.rms_norm_eps)
        else:
            config = VisionConfig.from_dict(self.raw)
            self.module = VisionModel(config)
            self.embed = MultimodalEmbedder(config.hidden_size, self.text, config.rms_norm_eps)
        self.fill(self.module, self.embed)

    def prepare(self, files: list[str], budget: int) -> Any:
        from mlx_vlm.models.base import to_mlx
        from mlx_vlm.models.gemma4.audio_feature_extractor import Gemma4AudioFeatureExtractor
        from mlx_vlm.models.gemma4.processing_gemma4 import Gemma4ImageProcessor
        from mlx_vlm.utils import load_image

        if self.tower == "audio":
            return to_mlx(Gemma4AudioFeatureExtractor()([np.load(file) for file in files]))
        data, _ = Gemma4ImageProcessor(max_soft_tokens=budget)([load_image(file) for file in files])
        return to_mlx(data)["pixel_values"]

    def encode(self, prepared: Any) -> Any:
        import mlx.core as mx

        if self.tower != "audio":
            return self.embed(self.module(prepared))[0]
        features, padding = self.module(
            prepared["input_features"], ~mx.array(prepared["input_features_mask"]).astype(mx.bool_)
        )
        rows = np.flatnonzero(~np.array(padding).reshape(-1)).astype(np.int32)
        return self.embed(features).flatten(0, 1)[mx.array(rows)]


def measured(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What `work` returns, and its seconds, processor seconds, and peak bytes above what stood before."""
    import mlx.core as mx

    mx.clear_cache()
    mx.reset_peak_memory()
    with contextlib.suppress(OSError):  # not Linux: no resident bytes
        Path("/proc/self/clear_refs").write_text("5")
    active, resident = mx.get_active_memory(), status("VmRSS")
    start, cpu = time.perf_counter(), time.process_time()
    out = work()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return out, {
        "seconds": seconds,
        "cpu": cpu,
        "peak": mx.get_peak_memory() - active,
        "rss": status(HWM) - resident,
    }


def status(name: str) -> int:
    """Bytes that Linux counts under this name, or 0."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def products(tower: str, lengths: list[int], rows: int = 315) -> float:
    """Processor seconds per layer of the products alone: linears, and scores and sums of pictures of these lengths.

    Timed on `rows` of the rows and scaled.
    """
    import mlx.core as mx

    raw = TOWERS[tower][0]
    E, inner, H, D = (raw[n] for n in ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim"))
    total = 0.0
    for inputs, outputs, count in ((E, E, 4), (E, inner, 2), (inner, E, 1)):
        x, w = mx.random.normal((rows, inputs)), mx.random.normal((outputs, inputs))
        total += count * timed(lambda x=x, w=w: x @ w.T, x, w) * sum(lengths) / rows
    for n in lengths:
        q, k, v = (mx.random.normal((1, H, m, D)) for m in (rows, n, n))
        s = mx.random.normal((1, H, rows, n))
        total += timed(lambda q=q, k=k: q @ k.swapaxes(-1, -2), q, k) * n / rows
        total += timed(lambda s=s, v=v: s @ v, s, v) * n / rows
    return total


def timed(work: Callable[[], Any], *inputs: Any) -> float:
    import mlx.core as mx

    mx.eval(inputs)
    start = time.process_time()
    mx.eval(work())
    return time.process_time() - start


def serve(name: str, tower: str) -> None:
    """Reads one JSON command a line and answers with one line."""

    side = Ours(tower) if name == "ours" else Theirs(tower)
    print(json.dumps({"ready": name, "depth": len(side.layers)}), flush=True)
    prepared = None
    for line in sys.stdin:
        command = json.loads(line)
        answer: dict[str, Any]
        if command["do"] == "prepare":
            prepared, answer = measured(lambda c=command: side.prepare(c["files"], c["budget"]))
        elif command["do"] == "products":
            answer = {"cpu": products(tower, command["lengths"])}
        else:
            side.stack().layers = side.layers[: command["layers"]]

            out, answer = measured(lambda p=prepared: side.encoded(p))
            answer["tokens"] = out.shape[0]
            if "save" in command:
                np.save(command["save"], np.array(out))
            del out
        print(json.dumps(answer), flush=True)


# ------------------------------------------------------------------ the comparison


class Process:
    """A side's process, asked one thing at a time."""

    def __init__(self, name: str, tower: str, blas: str | None):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        if blas:
            environment["LD_PRELOAD"] = blas
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.media", "--serve", name, tower],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self.depth = self.read()["depth"]

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a side's process ended; what it said stands above")
        return json.loads(line)

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def one_round(side: Process, files: list[str], budget: int, layers: int, save: Path) -> dict[str, float]:
    """A side's figures of a round; times of the whole depth."""
    prepare = side.ask(do="prepare", files=files, budget=budget)
    full = side.ask(do="encode", layers=layers, save=str(save))
    out = {"prepare": prepare["seconds"], "prepare cpu": prepare["cpu"], "tokens": full["tokens"]}
    out |= {"peak": max(prepare["peak"], full["peak"]), "rss": max(prepare["rss"], full["rss"])}
    rest = side.ask(do="encode", layers=0) if layers < side.depth else {"seconds": 0.0, "cpu": 0.0}
    for name, label in (("seconds", "encode"), ("cpu", "encode cpu")):
        times = side.depth / layers
        out[label] = rest[name] + (full[name] - rest[name]) * times
    out["joint"], out["joint cpu"] = (out["prepare" + s] + out["encode" + s] for s in ("", " cpu"))
    return out


def compare(tower: str, budget: int, cases: dict[str, list[str]], args: argparse.Namespace) -> list[dict[str, Any]]:
    table = []
    sides = {name: Process(name, tower, args.blas) for name in SIDES}
    depth = sides["ours"].depth
    layers = args.layers or depth
    with tempfile.TemporaryDirectory() as tmp:
        saved = {name: Path(tmp) / f"{name}.npy" for name in SIDES}
        for case, files in cases.items():
            if tower == "audio" or case == next(iter(cases)):
                for side in sides.values():  # compiled kernels, imports
                    side.ask(do="prepare", files=files[:1], budget=70)
                    side.ask(do="encode", layers=1)
            rounds: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
            for i in range(args.rounds if budget < 1120 else max(1, args.rounds // 2)):
                for name in SIDES if i % 2 == 0 else SIDES[::-1]:
                    rounds[name].append(one_round(sides[name], files, budget, layers, saved[name]))
            ours, theirs = (np.load(saved[name]) for name in SIDES)
            difference = float(np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2)))
            share: float | str = ""
            if tower != "audio" and case == next(iter(cases)):
                bound = sides["ours"].ask(do="products", lengths=[9 * len(ours)])["cpu"] * depth
                share = round(bound / statistics.median(r["encode cpu"] for r in rounds["mlx-vlm"]), 2)
            for name in SIDES:
                row = figures(rounds["ours"], rounds[name])
                row |= {"tower": tower, "budget": budget or "", "case": case, "tokens": len(ours), "side": name}
                row |= {"layers": f"{layers} of {depth}", "blas": "other" if args.blas else "wheel"}
                row |= {"products_share": share if name == "mlx-vlm" else "", "difference": f"{difference:.1e}"}
                table.append({c: row[c] for c in COLUMNS})
                print(" ".join(f"{row[c]!s:>10}" for c in COLUMNS), f"load {os.getloadavg()[0]:.1f}", flush=True)
    for side in sides.values():
        side.close()
    return table


def figures(ours: list[dict[str, float]], its: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over rounds of a side, and its times over ours within a round."""

    def median(key: str, scale: float = 1.0) -> float:
        return round(statistics.median(r[key] for r in its) / scale, 3)

    def ratios(key: str) -> list[float]:
        return [b[key] / a[key] for a, b in zip(ours, its, strict=True)]

    out: dict[str, Any] = {f"{key}_seconds": median(key) for key in ("prepare", "encode", "joint")}
    for key, label in (("prepare cpu", "prepare_ratio"), ("encode", "encode_ratio"), ("encode cpu", "encode_by_cpu"),
                       ("joint cpu", "joint_by_cpu")):  # fmt: skip
        out[label] = round(statistics.median(ratios(key)), 2)
    out |= {"lowest": round(min(ratios("encode")), 2), "highest": round(max(ratios("encode")), 2)}
    return out | {"peak_mb": round(median("peak", 1e6)), "rss_mb": round(median("rss", 1e6))}


def write_pictures(folder: Path) -> dict[str, list[str]]:
    """JPEGs of ramps and stripes; the batch has one of each proportion."""
    from PIL import Image

    out = {}
    for name, (width, height) in PICTURES.items():
        y, x = np.mgrid[0:height, 0:width]
        pixels = np.stack([x * 255 // width, y * 255 // height, (x // 7 + y // 3) % 64 * 4], axis=-1)
        path = folder / f"{width}x{height}.jpg"
        Image.fromarray(pixels.astype(np.uint8)).save(path, quality=90)
        out[name] = [str(path)]
    return out | {"three sizes": [path for paths in out.values() for path in paths]}


def write_sounds(folder: Path) -> dict[str, list[str]]:
    """Chirps in noise, float32 at 16 kHz, as .npy: the two runtimes decode files through different libraries."""
    out = {}
    for name, lengths in SOUNDS.items():
        out[name] = []
        for seconds in lengths:
            t = np.arange(int(seconds * 16_000), dtype=np.float32) / 16_000
            noise = np.random.default_rng(1).normal(size=t.size) * 0.05
            path = folder / f"{seconds}.npy"
            np.save(path, (0.3 * np.sin(2 * np.pi * (200 + 40 * t) * t) + noise).astype(np.float32))
            out[name].append(str(path))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--towers", nargs="+", choices=tuple(TOWERS), default=list(TOWERS))
    parser.add_argument("--budgets", nargs="+", type=int, default=[280, 1120])
    parser.add_argument("--cases", nargs="+", choices=(*PICTURES, "three sizes", *SOUNDS))
    parser.add_argument("--layers", type=int, default=1, help="layers that are run; 0 is all (default: 1)")
    parser.add_argument("--rounds", type=int, default=2, help="half as many at 1,120 tokens (default: 2)")
    parser.add_argument("--blas", help="a BLAS library to put in the place of the wheel's, on both sides (Linux)")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--serve", nargs=2, metavar=("SIDE", "TOWER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(*args.serve)
    table = []
    print(" ".join(f"{c[:10]:>10}" for c in COLUMNS))
    with tempfile.TemporaryDirectory() as tmp:
        pictures, sounds = write_pictures(Path(tmp)), write_sounds(Path(tmp))
        for tower in args.towers:
            cases = sounds if tower == "audio" else pictures
            cases = {case: files for case, files in cases.items() if args.cases is None or case in args.cases}
            for budget in [0] if tower == "audio" else args.budgets:
                # At the largest budget one picture says what there is to say, and takes minutes.
                few = dict(list(cases.items())[:1]) if budget == 1120 and args.cases is None else cases
                table += compare(tower, budget, few, args) if few else []
    if args.csv:
        with args.csv.open("w", newline="") as f:
            writer = csv.DictWriter(f, fieldnames=COLUMNS)
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    main()
