"""Calibration: measured losses against whole models, the choice under a size, GPTQ, and the conversion it ends in."""

import itertools
import json
import random

import mlx.core as mx
import numpy as np
import pytest
import tiny
from checkpoints import one_line, save_packed

from mlx_gemma4.config import Gemma4Config
from mlx_gemma4.conversions import bounded, calibrate, gptq, layers, sensitivity
from mlx_gemma4.conversions.allocation import choose, parse_size
from mlx_gemma4.conversions.bounded import Layer
from mlx_gemma4.conversions.calibrate import allocate
from mlx_gemma4.conversions.calibration_text import token_rows
from mlx_gemma4.conversions.compensate import Overlay, compensate
from mlx_gemma4.conversions.convert import convert
from mlx_gemma4.conversions.layers import EMBED, LayerStream, rounded
from mlx_gemma4.conversions.recipe import Packing
from mlx_gemma4.conversions.scratch import Scratch
from mlx_gemma4.conversions.sensitivity import Option, candidates, measure
from mlx_gemma4.conversions.sources import Folder
from mlx_gemma4.errors import UsageError
from mlx_gemma4.loading import load, load_model
from mlx_gemma4.tokenizer import Tokenizer

TOKENS = np.random.default_rng(1).integers(3, 500, (2, 24))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_tiny(tmp_path_factory.mktemp("e2b"), "e2b", dtype="bfloat16")


def opened(folder):
    return LayerStream(Folder(folder), Gemma4Config.from_folder(folder))


def log_probabilities(model) -> mx.array:
    logits = model(mx.array(TOKENS))
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def kl(model, other) -> float:
    p, q = log_probabilities(model), log_probabilities(other)
    return mx.mean(mx.sum(mx.exp(p) * (p - q), axis=-1)).item()


def through(stream, **options):
    """The final hidden states [N * T, E]."""
    state = stream.start(TOKENS)
    for index in range(stream.config.num_hidden_layers):
        state = Layer(stream, index, **options).run(state)
    return stream.final(state.hidden)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few rows, as they are of large matrices, and nothing kept."""
    monkeypatch.setattr(layers, "BLOCK", 1 << 14)


@pytest.mark.parametrize("blocks", ["whole", "small"])
@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_layers_in_turn_are_the_model(tmp_path, family, blocks, monkeypatch):
    folder = tiny.make_tiny(tmp_path / "m", family, dtype="bfloat16", shards=2)
    if blocks == "small":
        monkeypatch.setattr(layers, "BLOCK", 1 << 14)
    stream = opened(folder)
    found = through(stream, kept=0 if blocks == "small" else bounded.KEPT)
    model = load_model(folder, dtype="float32")
    wanted = model.language_model.model(mx.array(TOKENS)).flatten(0, 1)
    assert mx.allclose(found, wanted, rtol=1e-5, atol=1e-5)
    head = mx.concatenate(list(stream.head_blocks(100)))
    assert mx.array_equal(head, model.language_model.model.embed_tokens.weight)


def test_layers_of_packed_shards(folder, tmp_path):
    _, packed = save_packed(folder, tmp_path / "packed", {"group_size": 64, "bits": 8})
    wanted = load_model(packed, dtype="float32").language_model.model(mx.array(TOKENS)).flatten(0, 1)
    assert mx.allclose(through(opened(packed)), wanted, rtol=1e-3, atol=1e-3)


@pytest.fixture
def scratch(tmp_path):
    made = Scratch(tmp_path / "scratch")
    yield made
    made.remove()


@pytest.mark.parametrize("family", ["e2b", "26b-a4b"])
def test_losses_are_those_of_whole_models(tmp_path, family, scratch, monkeypatch):
    """Each matrix packed alone in a whole model gives the KL that the pass through layers measured."""
    folder = tiny.make_tiny(tmp_path / "m", family, dtype="bfloat16")
    stream = opened(folder)
    options = measure(stream, TOKENS, scratch)
    plain, other = load_model(folder, dtype="float32"), load_model(folder, dtype="float32")
    modules = dict(other.named_modules())
    assert set(options) == {p for p, m in modules.items() if hasattr(m, "to_quantized")}
    last = stream.config.num_hidden_layers - 1
    some = [EMBED, *(p for p in options if ".layers." not in p), *(p for p in options if f".layers.{last}." in p)]
    some += [p for p in options if ".layers.0." in p or p.endswith("k_proj")]
    for path in dict.fromkeys(some):
        found = {o.packing: o.loss for o in options[path]}
        reference = sensitivity._reference([p for p in found if p is not None])
        weight = modules[path].weight
        modules[path].weight = rounded(weight, reference, "BF16")
        if len(found) > 1:
            assert found[reference] == pytest.approx(kl(plain, other), rel=2e-3, abs=1e-7), path
            assert found[None] == 0
        else:
            assert path.endswith("router.proj") and reference.bits == 8
        modules[path].weight = weight

    monkeypatch.setattr(sensitivity, "COMPARED", 1)  # one state at a time, blocks of a few rows
    monkeypatch.setattr(layers, "BLOCK", 1 << 14)
    second = Scratch(tmp_path / "second")
    pieces = measure(opened(folder), TOKENS, second)
    assert not list(second.folder.glob("*.safetensors"))
    for path, found in options.items():
        assert [o.loss for o in pieces[path]] == pytest.approx([o.loss for o in found], rel=1e-3, abs=1e-8)


def test_progress_counts_every_byte(folder, scratch):
    seen = []
    stream = opened(folder)
    options = measure(stream, TOKENS[:, :8], scratch, lambda *at: seen.append(at))
    assert {path for _, _, path in seen} == set(options)
    assert seen[-1][0] == seen[-1][1] == sum(stream.item(path).source_bytes for path in options)


def test_candidates():
    assert candidates("x.router.proj", 64) == [Packing(64, 8)]
    assert candidates("x.router.proj", 96) == [Packing(32, 8)]
    assert candidates("x.mlp.down_proj", 48) == []
    assert {p.group_size for p in candidates("x.mlp.down_proj", 96)} == {32}
    assert Packing(128, 3) in candidates("x.mlp.down_proj", 256)


def test_choice_is_the_best_one():
    """Against every combination: as good as the best one of a budget smaller by one step, and within the budget."""
    draws, step = random.Random(2), 29
    for _ in range(20):
        options = {}
        for name in "abcd":
            sizes = sorted(draws.sample(range(1, 1 + step), 4))
            losses = sorted((draws.random() for _ in sizes), reverse=True)
            options[name] = [Option(Packing(64, b), s, x) for b, s, x in zip((2, 3, 4, 8), sizes, losses, strict=True)]
        every = [(sum(o.nbytes for o in c), sum(o.loss for o in c)) for c in itertools.product(*options.values())]
        for budget in (40, 60, 80, 119):
            if min(size for size, _ in every) > budget:
                with pytest.raises(UsageError, match="ask for more"):
                    choose(options, budget)
                continue
            chosen = choose(options, budget).values()
            assert sum(o.nbytes for o in chosen) <= budget
            best = min((loss for size, loss in every if size <= budget - step), default=4)
            assert sum(o.loss for o in chosen) <= best + 1e-9


def test_gptq_codes_are_laid_out_as_mlx_does():
    weight = mx.random.normal((6, 128), key=mx.random.key(0))
    for bits in (2, 3, 4, 5, 6, 8):
        words, scales, biases = mx.quantize(weight, 64, bits)
        values = mx.dequantize(words, mx.ones_like(scales), mx.zeros_like(biases), 64, bits)
        assert np.array_equal(gptq.pack_codes(np.array(values).astype(np.uint32), bits), np.array(words))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_gptq_loses_less_than_rounding(bits, dtype):
    """On inputs it has not seen, of the same kind: correlated, as a network's are."""
    numbers = np.random.default_rng(0)
    mix = numbers.normal(size=(128, 128)) / 11 + 0.3 * np.eye(128)
    seen, unseen = ((numbers.normal(size=(400, 128)) @ mix).astype(np.float32) for _ in range(2))
    weight = numbers.normal(size=(48, 128)).astype(np.float32)
    packing = Packing(64, bits)

    def lost(parts) -> float:
        words, *floats = parts
        back = mx.dequantize(words, *(f.astype(mx.float32) for f in floats), 64, bits)
        return float((((np.array(back) - weight) @ unseen.T) ** 2).sum())

    parts = gptq.quantize(weight, gptq.factors(mx.array(seen)), packing, dtype)
    plain = mx.quantize(mx.array(weight).astype(dtype), 64, bits)
    assert [p.shape for p in parts] == [p.shape for p in plain] and [p.dtype for p in parts] == [p.dtype for p in plain]
    assert lost(parts) < 0.8 * lost(plain)


def test_gptq_without_inputs():
    weight = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    hessian = np.eye(64, dtype=np.float32)
    hessian[5, 5] = 0  # an input that never came
    words, scales, biases = gptq.quantize(weight, [gptq.factor_of(hessian)], Packing(64, 8), mx.float32)
    assert np.abs(np.array(mx.dequantize(words, scales, biases, 64, 8)) - weight).max() < 0.02
    for bad in (np.zeros((64, 64), np.float32), np.full((64, 64), np.nan, np.float32)):
        with pytest.raises(ValueError, match="no usable numbers"):
            gptq.factor_of(bad)


def test_gptq_of_wide_matrices(monkeypatch):
    """In parts of columns and blocks of rows: each part as if it stood alone, and better than rounding."""
    numbers = np.random.default_rng(0)
    inputs = mx.array((numbers.normal(size=(300, 640)) @ (numbers.normal(size=(640, 640)) / 20)).astype(np.float32))
    weight = numbers.normal(size=(20, 640)).astype(np.float32)
    monkeypatch.setattr(gptq, "COLUMNS", 256)
    factors = gptq.factors(inputs)
    assert [len(f) for f in factors] == [256, 256, 128]
    parts = gptq.quantize(weight, factors, Packing(64, 3), mx.float32)
    for begin, end in ((0, 256), (256, 512), (512, 640)):
        alone = gptq.quantize(weight[:, begin:end], gptq.factors(inputs[:, begin:end]), Packing(64, 3), mx.float32)
        assert mx.array_equal(parts[1][:, begin // 64 : end // 64], alone[1]).item()
        assert mx.array_equal(parts[0][:, begin * 3 // 32 : end * 3 // 32], alone[0]).item()
    some = gptq.quantize(weight[5:11], factors, Packing(64, 3), mx.float32)
    assert mx.array_equal(some[0], parts[0][5:11]).item()


@pytest.mark.parametrize("family", ["e2b", "26b-a4b"])
def test_gptq_lowers_the_kl_of_a_model(tmp_path, scratch, family):
    folder = tiny.make_tiny(tmp_path / "m", family, dtype="bfloat16")
    source, stream = Folder(folder), opened(folder)
    calibration = np.random.default_rng(7).integers(3, 500, (4, 64))
    plain, rounded_, packed = (load_model(folder, dtype="float32") for _ in range(3))
    # What GPTQ packs has 3 bits, the rest 8: of a random model's experts little else would be seen.
    packings: dict[str, Packing | None] = {}
    for path, module in plain.named_modules():
        if hasattr(module, "to_quantized"):
            fine = "embed" in path or "switch_glu" in path or "router" in path or ".layers." not in path
            packings[path] = Packing(64, 8 if fine else 3)
    files = compensate(stream, calibration, packings, scratch)
    overlay = Overlay(source, stream, files)
    made = {name for file in files for name in overlay.headers[file.name]}
    assert f"{EMBED}.weight" not in made and not any("switch_glu" in n for n in made)

    for model, overlaid in ((rounded_, False), (packed, True)):
        modules = dict(model.named_modules())
        done = {n: w for file in files for n, w in mx.load(str(file)).items()} if overlaid else {}
        for path, packing in packings.items():
            if f"{path}.weight" in done:
                floats = [done[f"{path}.{leaf}"].astype(mx.float32) for leaf in ("scales", "biases")]
                modules[path].weight = mx.dequantize(done[f"{path}.weight"], *floats, packing.group_size, packing.bits)
            else:
                modules[path].weight = rounded(modules[path].weight, packing, "BF16")
    assert kl(plain, packed) < kl(plain, rounded_)


@pytest.fixture(scope="module")
def text(folder, tmp_path_factory):
    """A file of just enough tokens."""
    tokenizer, words = Tokenizer.from_folder(folder), ""
    while len(tokenizer.encode(words)) < 270:
        words += "the user and the model say hello to the user. "
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(words)
    return path


@pytest.fixture
def short(monkeypatch):
    """Calibrations read TOKENS, whatever the text: a size is all that is asked of them."""
    monkeypatch.setattr(calibrate, "token_rows", lambda tokenizer, text: TOKENS)


def test_convert_to_a_size(folder, text, tmp_path, short):
    bits = convert(folder, tmp_path / "bits", target_bits=4.6, calibrate=text)
    assert 4.4 < bits.bits_per_parameter <= 4.6
    goal = 330_000
    sized = convert(folder, tmp_path / "size", target_size=f"{goal / 1000}kB", calibrate=text, dtype="float16")
    assert 0.9 * goal < sized.file_bytes <= goal
    for name in ("bits", "size"):
        model, _ = load(tmp_path / name, dtype="float32")
        assert mx.all(mx.isfinite(model(mx.array(TOKENS)))).item()
        record = json.loads((tmp_path / name / "conversion.json").read_text())
        assert (
            record["recipe"]["name"].startswith("target-") and "text of the user's" in record["recipe"]["description"]
        )
    # Nothing is left beside the results, and the same again is the same.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bits", "size"]
    convert(folder, tmp_path / "again", target_bits=4.6, calibrate=text)
    first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("bits", "again"))
    assert first == second


def test_choice_of_a_size_loses_less_than_equal_bits(folder, scratch):
    """On what was measured: the choice at 4-bit's own size against 4 bits everywhere."""
    options = measure(opened(folder), TOKENS, scratch)
    even = {path: next(o for o in found if o.packing == Packing(64, 4)) for path, found in options.items()}
    chosen = choose(options, sum(o.nbytes for o in even.values()))
    assert sum(o.loss for o in chosen.values()) < 0.8 * sum(o.loss for o in even.values())
    assert sum(o.nbytes for o in chosen.values()) <= sum(o.nbytes for o in even.values())


def test_matrices_of_the_result_are_gptqs(folder, text, tmp_path, short, monkeypatch):
    kept = {}

    def keep(*arguments, **named):
        files = compensate(*arguments, **named)
        for file in files:
            kept.update({n: np.array(w.astype(mx.float32)) for n, w in mx.load(str(file)).items()})
        return files

    monkeypatch.setattr(calibrate, "compensate", keep)
    convert(folder, tmp_path / "out", target_bits=5, calibrate=text)
    made = dict(mx.load(str(tmp_path / "out" / "model.safetensors")))
    assert len(kept) > 100
    for name, value in kept.items():
        assert np.array_equal(np.array(made[name].astype(mx.float32)), value), name


def test_texts_become_rows(folder, text):
    tokenizer = Tokenizer.from_folder(folder)
    rows = token_rows(tokenizer)
    assert token_rows(tokenizer, text.read_text()).shape == (1, 256)
    assert rows.shape == (8, 256) and (rows[:, 0] == tokenizer.bos_token_id).all()
    assert len({tuple(row) for row in rows}) == 8
    assert np.array_equal(rows, token_rows(tokenizer))


def test_allocate_is_a_recipe(folder, text, short):
    recipe = allocate(folder, text.read_text(), target_bits=5)
    config = Gemma4Config.from_folder(folder).text
    model = load_model(folder)
    for path, module in model.named_modules():
        if hasattr(module, "to_quantized"):
            packing = recipe.choose(path, config)
            assert packing is None or packing.mode == "affine"
    with pytest.raises(UsageError) as error:
        recipe.choose("language_model.model.layers.99.mlp.up_proj", config)
    assert "another model" in one_line(error)


def test_sizes():
    assert parse_size("14GB") == 14_000_000_000
    assert parse_size("900 mb") == 900_000_000
    assert parse_size("1.5GiB") == 3 << 29
    assert parse_size("170000") == 170_000
    for bad in ("", "GB", "-3GB", "12TB", "0"):
        with pytest.raises(UsageError):
            parse_size(bad)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_bits": 4.2, "target_size": "1GB"}, "either"),
        ({"target_bits": 0.5}, "out of range"),
        ({"target_bits": 4.2, "bits": 4}, "leave out"),
        ({"target_size": "1GB", "recipe": "4bit"}, "leave out"),
        ({"target_size": "much"}, "14GB"),
        ({"calibrate": "text.txt"}, "--target-bits"),
        ({"target_bits": 4.2, "calibrate": "missing.txt"}, "missing.txt"),
        ({"target_bits": 1.5}, "ask for more"),
    ],
)
def test_refused(folder, tmp_path, options, said, monkeypatch):
    monkeypatch.setattr(calibrate, "token_rows", lambda *_: TOKENS[:, :4])
    with pytest.raises(UsageError) as error:
        convert(folder, tmp_path / "out", **options)
    assert said in one_line(error)
    assert not list(tmp_path.iterdir())


def test_a_text_too_short(folder, tmp_path):
    (tmp_path / "text.txt").write_text("the user")
    with pytest.raises(UsageError) as error:
        convert(folder, tmp_path / "out", target_bits=4, calibrate=tmp_path / "text.txt")
    assert "256" in one_line(error)
