"""Weights on the Q4_0 lattice: recognised exactly, kept exactly, and never claimed when one value is off."""

import json

import mlx.core as mx
import numpy as np
import pytest
import tiny
from checkpoints import one_line

from mlx_gemma4.conversions import q4_0
from mlx_gemma4.conversions.convert import convert
from mlx_gemma4.errors import UsageError

DTYPES = (mx.bfloat16, mx.float16, mx.float32)


def lattice(rows: int, columns: int, dtype: mx.Dtype, seed: int = 0, extreme: bool = True) -> mx.array:
    """Values d * q, rounded to `dtype`; d is a bfloat16 number (float16 for float16) of either sign."""
    rng = np.random.default_rng(seed)
    kind = mx.float16 if dtype == mx.float16 else mx.bfloat16
    d = mx.array(rng.standard_normal((rows, columns // 32, 1)).astype(np.float32) * 0.02).astype(kind)
    q = rng.integers(-8 if extreme else -7, 8, (rows, columns // 32, 32)).astype(np.float32)
    if extreme:
        q[..., 5] = -8
    return (d.astype(mx.float32) * mx.array(q)).reshape(rows, columns).astype(dtype)


def unpacked(words, scales, biases, dtype) -> mx.array:
    arrays = [mx.array(a) if a.dtype != np.uint16 else mx.array(a).view(dtype) for a in (scales, biases)]
    return mx.dequantize(mx.array(words), *(a.astype(mx.float32) for a in arrays), 32, 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("extreme", [True, False], ids=["with -8", "without -8"])
def test_every_value_survives(dtype, extreme):
    value = lattice(64, 256, dtype, extreme=extreme)
    parts = q4_0.pack(value, dtype)
    assert mx.array_equal(unpacked(*parts, dtype).astype(dtype), value).item()
    # As MLX unpacks it in its own packing, and as its matrix product sees it.
    x = mx.random.normal((3, 256), key=mx.random.key(1))
    scales, biases = (mx.array(a).view(dtype) if a.dtype == np.uint16 else mx.array(a) for a in parts[1:])
    product = mx.quantized_matmul(
        x, mx.array(parts[0]), scales.astype(mx.float32), biases.astype(mx.float32), group_size=32, bits=4
    )
    plain = x @ unpacked(*parts, dtype).T
    assert mx.max(mx.abs(product - plain)).item() < 1e-4


def test_the_mapping_is_scale_d_and_bias_minus_8_d():
    d, q = 0.375, np.arange(-8, 24) % 16 - 8.0
    words, scales, biases = q4_0.pack(mx.array(d * q[None].astype(np.float32)), mx.float32)
    assert scales.tolist() == [[d]] and biases.tolist() == [[-8 * d]]
    codes = [(int(w) >> (4 * i)) & 15 for w in words[0] for i in range(8)]
    assert codes == (q + 8).astype(int).tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_value_off_by_one_unit_is_noticed(dtype):
    """In every position of a group but those where another lattice fits."""
    value = lattice(8, 64, dtype)
    bits, unit = (mx.uint32, 1) if dtype == mx.float32 else (mx.uint16, 1)
    for column in range(64):
        raw = value.view(bits)
        raw[3, column] = raw[3, column] + mx.array(unit, bits)
        spoiled = raw.view(dtype)
        if value[3, column].item() == 0:
            continue  # next to zero lies a number so small that a group may well hold it as its d
        assert q4_0.scales(spoiled) is None, column
        with pytest.raises(ValueError, match="lattice"):
            q4_0.pack(spoiled, dtype)


def test_what_no_lattice_is():
    noise = mx.random.normal((16, 128), key=mx.random.key(0))
    for dtype in DTYPES:
        assert q4_0.scales(noise.astype(dtype)) is None
    # On a lattice of 17 steps, and with a d that no 16-bit type holds.
    assert q4_0.scales(mx.array((np.arange(32) % 17 - 8)[None].astype(np.float32))) is None
    assert q4_0.scales(mx.array((np.arange(-8, 24) % 16 - 8)[None].astype(np.float32) * np.float32(0.1))) is None
    assert (q4_0.scales(mx.zeros((4, 64))) == 0).all()


def qat(folder, spoil: str | None = None, family: str = "e4b"):
    """A tiny checkpoint whose matrices lie on the lattice, in bfloat16; `spoil` names one with a value off it."""
    tiny.make_tiny(folder, family, dtype="bfloat16")
    weights = dict(mx.load(str(folder / "model.safetensors")))
    for i, (name, value) in enumerate(weights.items()):
        if value.ndim >= 2:
            flat = lattice(value.size // value.shape[-1], value.shape[-1], mx.bfloat16, seed=i)
            weights[name] = flat.reshape(value.shape)
    if spoil is not None:
        raw = weights[spoil].view(mx.uint16)
        at = int(mx.argmax(mx.abs(weights[spoil][2])).item())
        raw[2, (at + 1) % 32 + at // 32 * 32] += 1
        raw[2, (at + 2) % 32 + at // 32 * 32] += 1
        weights[spoil] = raw.view(mx.bfloat16)
    mx.eval(weights)
    tiny.write_shards(folder, weights)
    return folder, weights


@pytest.mark.parametrize("family", ["e4b", "26b-a4b"])
def test_a_checkpoint_on_the_lattice(tmp_path, family):
    folder, weights = qat(tmp_path / "hf", family=family)
    notes = []
    result = convert(folder, tmp_path / "mlx", recipe="q4_0", progress=lambda s: notes.append(s.text))
    assert any("every matrix" in n for n in notes)
    made = dict(mx.load(str(tmp_path / "mlx" / "model.safetensors")))
    matrices = [n for n in made if n.endswith(".scales")]
    assert len(matrices) == result.q4_0_matrices > 20
    for name in ("mlp.up_proj.weight", "self_attn.q_proj.weight"):
        path = f"language_model.model.layers.1.{name}"
        parts = (made[path], *(made[path.replace("weight", k)].astype(mx.float32) for k in ("scales", "biases")))
        back = mx.dequantize(*parts, 32, 4).astype(mx.bfloat16)
        assert mx.array_equal(back, weights["model.language_model" + path[20:]]).item(), name
    raw = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert {k: raw["quantization"][k] for k in ("bits", "group_size", "mode")} == {
        "bits": 4,
        "group_size": 32,
        "mode": "affine",
    }
    # And back to 16 bits: the checkpoint that was.
    convert(tmp_path / "mlx", tmp_path / "16", 16)
    again = dict(mx.load(str(tmp_path / "16" / "model.safetensors")))
    for name, value in weights.items():
        ours = name.replace("model.language_model.", "language_model.model.")
        if ours in again:
            assert mx.array_equal(again[ours], value).item(), name


def test_a_matrix_off_the_lattice_is_reported_and_not_claimed(tmp_path):
    spoiled = "model.language_model.layers.2.mlp.down_proj.weight"
    folder, _ = qat(tmp_path / "hf", spoiled)
    notes = []
    convert(folder, tmp_path / "mlx", recipe="q4_0", progress=lambda s: notes.append(s.text))
    (note,) = [n for n in notes if "do not" in n]
    assert "language_model.model.layers.2.mlp.down_proj" in note
    raw = json.loads((tmp_path / "mlx" / "config.json").read_text())["quantization"]
    assert {k: v["bits"] for k, v in raw.items() if isinstance(v, dict)} == {
        "language_model.model.layers.2.mlp.down_proj": 8
    }


def test_no_lattice_at_all_is_refused(tmp_path):
    folder = tiny.make_tiny(tmp_path / "hf", "31b", dtype="bfloat16")
    with pytest.raises(UsageError) as error:
        convert(folder, tmp_path / "mlx", recipe="q4_0")
    assert "Q4_0" in one_line(error) and not (tmp_path / "mlx").exists()


def test_converted_twice(tmp_path):
    folder, _ = qat(tmp_path / "hf")
    convert(folder, tmp_path / "1", recipe="q4_0")
    convert(tmp_path / "1", tmp_path / "2", recipe="q4_0")
    assert (tmp_path / "1" / "model.safetensors").read_bytes() == (tmp_path / "2" / "model.safetensors").read_bytes()
