"""Each way a checkpoint can be wrong ends in one line that names the file and the tensor."""

import json
import os
import shutil
import struct
from pathlib import Path

import mlx.core as mx
import pytest
import tiny
from checkpoints import LAYER, PACKINGS, edit_config, one_line, rewrite, save_packed

from mlx_gemma4 import loading
from mlx_gemma4.errors import ConfigError, TokenizerError, WeightsError


@pytest.fixture
def copy(tmp_path):
    """copy(family) -> a folder of one's own with a small checkpoint."""
    return lambda family="31b": tiny.make_tiny(tmp_path / family, family, seed=3)


# ------------------------------------------------------------------ damaged files


def header(path: Path) -> tuple[dict, bytes]:
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def with_header(path: Path, head: dict, data: bytes) -> None:
    text = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def flip(path: Path, change) -> None:
    head, data = header(path)
    name = next(n for n in head if n != "__metadata__")
    change(head, name)
    with_header(path, head, data)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda p: p.write_bytes(b""), "is empty"),
        (lambda p: cut(p, 5), "cut short"),
        (lambda p: cut(p, 1000), "ends within its header"),
        (lambda p: p.write_bytes(p.read_bytes() + b"abc"), "3 bytes follow the last tensor"),
        (lambda p: p.write_bytes(b"\x80\x02}q\x00" * 999), "not a safetensors file"),
        (lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
        (lambda p: p.write_bytes(struct.pack("<Q", 9) + b"{not json" + b"0" * 99), "header .* is damaged"),
        (lambda p: p.write_bytes(struct.pack("<Q", 2) + b"[]"), "header .* is damaged"),
        (lambda p: flip(p, lambda h, n: h[n].update(dtype="F8_E4M3")), "is stored as F8_E4M3"),
        (lambda p: flip(p, lambda h, n: h[n].update(shape=[1, 2])), r"of shape \[1, 2\]"),
        (lambda p: flip(p, lambda h, n: h[n].pop("shape")), "entry of tensor .* is incomplete"),
        (lambda p: flip(p, lambda h, n: h[n].update(data_offsets=[-4, 0])), "entry of tensor .* is incomplete"),
        (lambda p: flip(p, lambda h, n: h.pop(n)), "does not follow the one before"),
        (lambda p: p.unlink(), r"has no model\*.safetensors"),
    ],
)
def test_a_damaged_file_is_named(copy, harm, words):
    folder = copy()
    harm(folder / "model.safetensors")
    with pytest.raises(WeightsError, match=words) as error:
        loading.load(folder)
    assert str(folder) in one_line(error)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9999])
def test_a_cut_file_names_the_first_tensor_that_is_not_whole(copy, part):
    path = copy() / "model.safetensors"
    head, data = header(path)
    start, kept = path.stat().st_size - len(data), int(part * len(data))
    cut(path, start + kept)
    head.pop("__metadata__")
    first = min((t["data_offsets"][1], n) for n, t in head.items() if t["data_offsets"][1] > kept)[1]
    with pytest.raises(WeightsError, match="is cut short") as error:
        loading.load(path.parent)
    assert f"{path} is cut short: tensor {first} ends at byte" in one_line(error)


def test_missing_shards(tmp_path):
    with_index = tiny.make_tiny(tmp_path / "a", "31b", shards=3)
    second = "model-00002-of-00003.safetensors"
    (with_index / second).unlink()
    with pytest.raises(WeightsError, match=rf"{second} is missing") as error:
        loading.load(with_index)
    one_line(error)
    (with_index / loading.INDEX).unlink()
    with pytest.raises(WeightsError, match=rf"{second} is missing \(3 shards"):
        loading.load(with_index)


def test_index_and_shards_disagree(tmp_path):
    folder = tiny.make_tiny(tmp_path / "a", "31b", shards=2)
    index = json.loads((folder / loading.INDEX).read_text())
    name = next(n for n, f in index["weight_map"].items() if "00001" in f)
    index["weight_map"][name] = "model-00002-of-00002.safetensors"
    (folder / loading.INDEX).write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=rf"model-00002-of-00002\.safetensors lacks tensor {name}"):
        loading.load(folder)
    for text in ("{", "[]", '{"weight_map": 3}'):
        (folder / loading.INDEX).write_text(text)
        with pytest.raises(WeightsError, match=f"{loading.INDEX} is damaged"):
            loading.load(folder)


def test_files_beside_the_index_are_not_read(tmp_path):
    folder = tiny.make_tiny(tmp_path / "a", "31b", shards=2)
    (folder / "model-old.safetensors").write_bytes(b"")
    loading.load_model(folder)


# ------------------------------------------------------------------ wrong tensors


def test_missing_tensors_are_named_and_counted(copy):
    folder = copy()
    rewrite(folder, lambda w: {k: v for k, v in w.items() if "layers.1.mlp" not in k and "q_norm" not in k})
    with pytest.raises(WeightsError) as error:
        loading.load(folder)
    assert f"lacks 9 tensors ({LAYER}self_attn.q_norm.weight, " in one_line(error)


def test_unexpected_tensors_are_named_and_counted(copy):
    folder = copy()
    rewrite(folder, lambda w: {**w, "model.language_model.layers.0.self_attn.sinks": mx.zeros((4,))})
    with pytest.raises(WeightsError) as error:
        loading.load(folder)
    assert f"holds 1 tensor ({LAYER}self_attn.sinks)" in one_line(error)


def test_a_tensor_twice(tmp_path):
    folder = tiny.make_tiny(tmp_path / "a", "31b")
    shutil.copy(folder / "model.safetensors", folder / "model-copy.safetensors")
    with pytest.raises(WeightsError, match=r"is both in model-copy\.safetensors and in .*model\.safetensors"):
        loading.load(folder)


def test_shapes_that_do_not_fit_the_config(copy):
    folder = copy()
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit_config(folder, text_config={**text, "intermediate_size": 192})
    with pytest.raises(WeightsError, match=r"shape \[\d+, \d+\], config.json asks for \[") as error:
        loading.load(folder)
    line = one_line(error)
    assert "model.safetensors: tensor " in line and ".mlp." in line


@pytest.mark.parametrize("stored", ["int16", "int32", "uint8", "uint32", "bool_"])
def test_integers_instead_of_weights(copy, stored):
    folder = copy()
    key = "model.language_model.layers.0.mlp.up_proj.weight"
    rewrite(folder, lambda w: {**w, key: w[key].astype(getattr(mx, stored))})
    with pytest.raises(WeightsError, match="not floating point") as error:
        loading.load(folder)
    assert f"{folder / 'model.safetensors'}: tensor {LAYER}mlp.up_proj.weight is {stored.strip('_')}" in one_line(error)


def test_packed_weights_that_do_not_fit(copy, tmp_path):
    settings = {"group_size": 32, "bits": 4, "mode": "affine"}
    _, folder = save_packed(copy("31b"), tmp_path / "packed", settings)
    key = LAYER + "mlp.up_proj."
    good = dict(mx.load(str(folder / "model.safetensors")))
    mx.eval(good)
    wrong = {
        r"lacks 1 tensor .*up_proj\.biases": {key + "biases": None},
        r"lacks 1 tensor .*up_proj\.weight": {key + "weight": None},
        r"up_proj\.weight is uint32, not floating": {key + "scales": None},
        r"up_proj\.weight has shape \[128, 7\].* no packing of MLX": {key + "weight": mx.zeros((128, 7), mx.uint32)},
        r"scales \[128, 1\].* no packing of MLX": {key + "scales": mx.zeros((128, 1), mx.uint8)},
        r"up_proj\.scales has shape \[64, 2\]": {key + "scales": mx.zeros((64, 2))},
        r"holds 1 tensor .*\.sinks\.scales": {LAYER + "sinks.scales": mx.zeros((4, 4))},
    }
    for words, changes in wrong.items():
        changed = {k: v for k, v in {**good, **changes}.items() if v is not None}
        mx.save_safetensors(str(folder / "model.safetensors"), changed)
        with pytest.raises(WeightsError, match=words) as error:
            loading.load(folder)
        one_line(error)
    mx.save_safetensors(str(folder / "model.safetensors"), good)
    for declared, words in ((None, "no 'quantization'"), ({**settings, "quantize_input": True}, "activations")):
        edit_config(folder, quantization=declared)
        with pytest.raises(ConfigError, match=words) as error:
            loading.load(folder)
        one_line(error)


def test_folders_that_are_no_checkpoint(copy):
    folder = copy()
    (folder / "tokenizer.json").rename(folder / "tokenizer.away")
    with pytest.raises(TokenizerError) as error:
        loading.load(folder)
    one_line(error)
    edit_config(folder, model_type="llama")
    with pytest.raises(ConfigError, match="'llama'"):
        loading.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        loading.load(folder)


# ------------------------------------------------------------------ --check


def test_check_passes_good_weights(copy):
    for family in tiny.FAMILIES:
        loading.load(copy(family), check=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["embed_tokens.weight", "layers.3.input_layernorm.weight", "layers.1.layer_scalar"])
def test_check_finds_what_is_no_number(copy, value, where):
    folder = copy()
    key = "model.language_model." + where

    def spoil(weights):
        flat = weights[key].flatten()
        flat[flat.size // 2] = value
        return {**weights, key: flat.reshape(weights[key].shape)}

    rewrite(folder, spoil)
    loading.load(folder)  # not looked at unless asked for
    with pytest.raises(WeightsError, match="NaN or infinite") as error:
        loading.load(folder, check=True)
    assert f"{folder / 'model.safetensors'}: tensor language_model.model.{where}" in one_line(error)


def test_check_finds_numbers_too_large_for_the_type(copy):
    folder = copy()
    key = "model.language_model.layers.0.mlp.up_proj.weight"
    rewrite(folder, lambda w: {**w, key: w[key] * 1e6})
    loading.load(folder, dtype="float32", check=True)
    with pytest.raises(WeightsError, match="NaN or infinite"):
        loading.load(folder, dtype="float16", check=True)


@pytest.mark.parametrize("settings", [PACKINGS[2], *PACKINGS[-3:]], ids=lambda s: s.get("mode"))
def test_check_looks_into_packed_weights(copy, tmp_path, settings):
    _, folder = save_packed(copy("26b-a4b"), tmp_path / "packed", settings)
    loading.load(folder, check=True)
    key = LAYER + "experts.switch_glu.down_proj.scales"

    def spoil(weights):
        flat = weights[key].flatten()
        flat[7] = float("nan") if settings["mode"] == "affine" else 255
        return {**weights, key: flat.reshape(weights[key].shape)}

    rewrite(folder, spoil)
    with pytest.raises(WeightsError, match=r"experts\.switch_glu\.down_proj\.weight holds NaN"):
        loading.load(folder, check=True)


@pytest.mark.parametrize(("real", "declared"), [("float16", "bfloat16"), ("bfloat16", "float16")])
def test_check_finds_bits_of_another_type(copy, real, declared):
    folder = copy()
    read_as = {"float16": mx.float16, "bfloat16": mx.bfloat16}
    rewrite(folder, lambda w: {k: v.astype(read_as[real]).view(read_as[declared]) for k, v in w.items()})
    with pytest.raises(WeightsError, match="saved as another type"):
        loading.load(folder, check=True)


def test_nothing_is_written(copy):
    folder = copy()
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.iterdir()}
    os.chmod(folder, 0o555)
    try:
        loading.load(folder, check=True)
    finally:
        os.chmod(folder, 0o755)
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.iterdir()} == before
