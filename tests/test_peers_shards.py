"""Checkpoints converted by mlx-lm and by mlx-vlm: read here, they give the logits of the package that wrote them."""

import json

import mlx.core as mx
import pytest
import tiny
from optional import optional

from mlx_gemma4.loading import load, load_model

# Several sliding windows of 8.
IDS = mx.array([[2, *range(20, 60), 400, 9, 333, 107, 250, 11]])

PLAIN = {"quantize": False}
PACKINGS = {
    "plain": PLAIN,
    "affine-4": {"quantize": True, "q_bits": 4, "q_group_size": 64},
    "affine-8": {"quantize": True, "q_bits": 8, "q_group_size": 32},
    "mixed-3-6": {"quantize": True, "quant_predicate": "mixed_3_6"},
    "mxfp4": {"quantize": True, "q_mode": "mxfp4", "q_bits": 4, "q_group_size": 32},
    "nvfp4": {"quantize": True, "q_mode": "nvfp4", "q_bits": 4, "q_group_size": 16},
    "mxfp8": {"quantize": True, "q_mode": "mxfp8", "q_bits": 8, "q_group_size": 32},
}
# Every family plain and in 4 bits, the other packings on one with and one without experts.
CASES = [(f, p) for f in tiny.FAMILIES for p in PACKINGS if p in ("plain", "affine-4") or f in ("e2b", "26b-a4b")]


def compare(theirs: mx.array, folder) -> None:
    assert theirs.dtype == mx.float32
    ours = load_model(folder, dtype="float32", check=True)(IDS)
    assert mx.max(mx.abs(theirs - ours)).item() <= 1e-3
    assert mx.max(mx.abs(theirs)).item() > 5  # not a comparison of nothing with nothing


@pytest.mark.parametrize(("family", "packing"), CASES)
def test_mlx_lm(tmp_path, capsys, family, packing):
    import mlx_lm as peer

    folder = tiny.make_tiny(tmp_path / "hf", family, seed=5)
    peer.convert(str(folder), str(tmp_path / "mlx"), **PACKINGS[packing])
    model, _ = peer.load(str(tmp_path / "mlx"))
    compare(model(IDS), tmp_path / "mlx")


@pytest.mark.parametrize("packing", ["plain", "affine-4"])
def test_mlx_lm_text_only(tmp_path, capsys, packing):
    import mlx_lm as peer

    folder = tiny.make_tiny(tmp_path / "hf", "e4b", seed=5)
    weights = dict(mx.load(str(folder / "model.safetensors")))
    mx.eval(weights)
    tiny.write_shards(folder, {k.replace("model.language_model.", "model."): v for k, v in weights.items()})
    text = json.loads((folder / "config.json").read_text())["text_config"]
    (folder / "config.json").write_text(json.dumps(text))
    peer.convert(str(folder), str(tmp_path / "mlx"), **PACKINGS[packing])
    model, _ = peer.load(str(tmp_path / "mlx"))
    compare(model(IDS), tmp_path / "mlx")


@pytest.mark.parametrize(("family", "packing"), CASES)
@pytest.mark.filterwarnings("ignore")
def test_mlx_vlm(tmp_path, capsys, family, packing):
    peer = optional("mlx_vlm")
    folder = tiny.make_tiny(tmp_path / "hf", family, seed=5, towers=True)
    peer.convert(str(folder), str(tmp_path / "mlx"), **PACKINGS[packing])
    names = mx.load(str(tmp_path / "mlx" / "model.safetensors"))
    assert any(n.startswith("vision_tower.") for n in names)
    model, _ = peer.load(str(tmp_path / "mlx"))
    compare(model(IDS).logits, tmp_path / "mlx")


def test_a_converted_repository_has_all_we_need(tmp_path, capsys):
    import mlx_lm as peer

    folder = tiny.make_tiny(tmp_path / "hf", "31b")
    peer.convert(str(folder), str(tmp_path / "mlx"), **PACKINGS["affine-4"])
    (_, before), (_, after) = load(folder), load(tmp_path / "mlx")
    assert after.encode("the user in a mode") == before.encode("the user in a mode")
    assert after.eos_token_ids == before.eos_token_ids == {1, 106, 50}
    turn = [{"role": "user", "content": "hello"}]
    assert after.apply_chat_template(turn) == before.apply_chat_template(turn)
