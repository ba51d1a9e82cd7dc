"""What `convert` writes: every family, every packing, both layouts, read here and by mlx-lm and mlx-vlm."""

import json

import mlx.core as mx
import pytest
import tiny
from checkpoints import edit_config, one_line
from optional import optional

from mlx_gemma4.conversions import blocks
from mlx_gemma4.conversions.convert import convert
from mlx_gemma4.errors import ConfigError, Gemma4Error, UsageError, WeightsError
from mlx_gemma4.loading import load, load_model
from mlx_gemma4.safetensors_header import read_header

IDS = mx.array([[2, *range(20, 60), 400, 9, 333, 107, 250, 11]])
FAMILIES = tuple(tiny.FAMILIES)
PACKINGS = [
    *({"bits": b} for b in (16, 8, 6, 5, 4, 3, 2)),
    *({"mode": m} for m in ("mxfp4", "nvfp4", "mxfp8")),
    {"recipe": "mixed-4-6"},
    {"recipe": "mixed-3-6"},
    {"recipe": "mixed-4-5"},
    {"bits": 4, "group_size": 32},
]
# Every family at 16 and 4 bits, everything else on one with per-layer embeddings and one with experts.
CASES = [(f, p) for f in FAMILIES for p in PACKINGS if p in ({"bits": 16}, {"bits": 4}) or f in ("e2b", "26b-a4b")]


def name_of(value) -> str:
    return "-".join(map(str, value.values())) if isinstance(value, dict) else value


def weights(folder) -> dict[str, mx.array]:
    out = {}
    for file in sorted(folder.glob("model*.safetensors")):
        out |= dict(mx.load(str(file)))
    return out


def contents(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def config(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def furthest(a, b) -> float:
    return mx.max(mx.abs(a.astype(mx.float32) - b.astype(mx.float32))).item()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """source(family) -> a tiny checkpoint with towers, made once."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = tiny.make_tiny(tmp_path_factory.mktemp("hf") / family, family, seed=5, towers=True)
        return made[family]

    return get


@pytest.mark.parametrize(("family", "packing"), CASES, ids=name_of)
def test_mlx_lm_reads_the_same_model(source, tmp_path, family, packing):
    import mlx_lm as peer

    convert(source(family), tmp_path / "mlx", **packing)
    ours = load_model(tmp_path / "mlx", dtype="float32", check=True)(IDS)
    theirs, _ = peer.load(str(tmp_path / "mlx"))
    assert furthest(theirs(IDS), ours) <= 1e-5 * max(1.0, mx.max(mx.abs(ours)).item())
    assert mx.max(mx.abs(ours)).item() > 5  # not a comparison of nothing with nothing
    if packing == {"bits": 16}:
        assert furthest(load_model(source(family), dtype="float32")(IDS), ours) == 0


@pytest.mark.parametrize(
    ("family", "packing"),
    [(f, p) for f, p in CASES if p in ({"bits": 16}, {"bits": 4}) or p == {"mode": "nvfp4"}],
    ids=name_of,
)
@pytest.mark.filterwarnings("ignore")
def test_mlx_vlm_reads_the_same_model_and_its_towers(source, tmp_path, family, packing):
    peer = optional("mlx_vlm.utils")
    convert(source(family), tmp_path / "mlx", **packing)
    model = peer.load_model(tmp_path / "mlx")
    ours = load_model(tmp_path / "mlx", dtype="float32")(IDS)
    assert furthest(model(IDS).logits, ours) <= 1e-4 * max(1.0, mx.max(mx.abs(ours)).item())
    plain = peer.load_model(source(family))
    before, after = (dict(peer.tree_flatten(m.parameters())) for m in (plain, model))
    towers = [n for n in before if n.startswith(("vision_tower", "audio_tower", "embed_vision", "embed_audio"))]
    assert len(towers) > 10
    for name in towers:
        assert mx.array_equal(before[name], after[name]).item(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layout(source, tmp_path, family):
    """Names, types, records and companions as the peers expect them, and nothing twice."""
    folder = source(family)
    convert(folder, tmp_path / "mlx", 4)
    header = read_header(tmp_path / "mlx" / "model.safetensors")
    raw, index = config(tmp_path / "mlx"), json.loads((tmp_path / "mlx" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(header)
    assert index["metadata"]["total_size"] == sum(t.end - t.begin for t in header.values())
    assert not [n for n in header if n.startswith("model.") or "gate_up_proj" in n]
    first_shared = len(raw["text_config"]["layer_types"]) - raw["text_config"]["num_kv_shared_layers"]
    for layer in range(first_shared, len(raw["text_config"]["layer_types"])):
        assert not [n for n in header if f"language_model.model.layers.{layer}.self_attn.k_proj" in n]
    assert not [n for n in header if n.endswith(".scales") and not n.startswith("language_model.")]
    assert raw["quantization"] == raw["quantization_config"]
    assert raw["vision_config"] == config(folder)["vision_config"]
    assert {k: v for k, v in raw["quantization"].items() if not isinstance(v, dict)} == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
    }
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "mlx" / name).read_bytes() == (folder / name).read_bytes()
    if family == "26b-a4b":
        path = "language_model.model.layers.0.router.proj"
        assert raw["quantization"][path] == {"group_size": 64, "bits": 8, "mode": "affine"}
        k_is_v = raw["quantization"].get("language_model.model.layers.2.self_attn.k_proj")
        assert k_is_v == {"group_size": 64, "bits": 6, "mode": "affine"}  # a key that is a value, too
    assert not list(tmp_path.glob(".*"))  # no folder in the making is left behind


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_how_the_source_is_cut_makes_no_difference(tmp_path, shards, dtype):
    whole = tiny.make_tiny(tmp_path / "whole", "26b-a4b", dtype=dtype)
    cut = tiny.make_tiny(tmp_path / "cut", "26b-a4b", dtype=dtype, shards=shards)
    convert(whole, tmp_path / "a" / "m", 4)
    convert(cut, tmp_path / "b" / "m", 4)
    one, two = contents(tmp_path / "a" / "m"), contents(tmp_path / "b" / "m")
    for name in ("conversion.json", "README.md"):  # these name the source
        del one[name], two[name]
    assert one == two


@pytest.mark.parametrize("packing", PACKINGS, ids=name_of)
def test_converting_twice_changes_nothing(source, tmp_path, packing):
    for family in ("e2b", "26b-a4b"):
        once, twice = tmp_path / family / "1", tmp_path / family / "2"
        convert(source(family), once, **packing, shard_bytes=300_000)
        convert(once, twice, **packing, shard_bytes=300_000)
        assert len(list(once.glob("*.safetensors"))) > 1
        one, two = contents(once), contents(twice)
        for name in ("conversion.json", "README.md"):
            del one[name], two[name]
        assert one == two


def test_packed_to_16_bits_and_to_other_bits(source, tmp_path):
    """Unpacking gives MLX's own numbers; packing anew gives what packing those numbers gives."""
    convert(source("e2b"), tmp_path / "8", 8)
    convert(tmp_path / "8", tmp_path / "16", 16)
    convert(tmp_path / "8", tmp_path / "4", 4)
    convert(tmp_path / "16", tmp_path / "4too", 4)
    packed, plain = weights(tmp_path / "8"), weights(tmp_path / "16")
    assert config(tmp_path / "16").get("quantization") is None
    path = "language_model.model.layers.0.mlp.up_proj."
    parts = (packed[path + leaf] for leaf in ("weight", "scales", "biases"))
    assert mx.array_equal(plain[path + "weight"], mx.dequantize(*parts, group_size=64, bits=8)).item()
    one, two = weights(tmp_path / "4"), weights(tmp_path / "4too")
    for name in one:
        # What stays at 8 bits is copied by the first and packed anew by the second.
        if "per_layer_" not in name or "norm" in name:
            assert mx.array_equal(one[name], two[name]).item(), name
    kept = "language_model.model.layers.0.per_layer_input_gate.weight"
    assert mx.array_equal(one[kept], packed[kept]).item()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype(source, tmp_path, dtype):
    convert(source("e4b"), tmp_path / "mlx", 4, dtype=dtype)
    kinds = {str(v.dtype).removeprefix("mlx.core.") for v in weights(tmp_path / "mlx").values()}
    assert kinds == {dtype, "uint32"}
    raw = config(tmp_path / "mlx")
    assert raw["dtype"] == raw["text_config"]["dtype"] == dtype


def test_text_only(source, tmp_path):
    convert(source("e2b"), tmp_path / "text", 4, text_only=True)
    convert(source("e2b"), tmp_path / "all", 4)
    raw, names = config(tmp_path / "text"), weights(tmp_path / "text")
    assert "vision_config" not in raw and "audio_config" not in raw
    assert all(n.startswith("language_model.") for n in names)
    assert furthest(load_model(tmp_path / "text")(IDS), load_model(tmp_path / "all")(IDS)) == 0
    assert "pipeline_tag: text-generation" in (tmp_path / "text" / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in (tmp_path / "all" / "README.md").read_text()


def test_a_text_checkpoint_without_outer_model(tmp_path):
    """model_type gemma4_text: mlx-lm reads the result, and the logits are those of the source."""
    folder = tiny.make_tiny(tmp_path / "hf", "e4b", seed=5)
    loaded = {k.replace("model.language_model.", "model."): v for k, v in weights(folder).items()}
    mx.eval(loaded)
    tiny.write_shards(folder, loaded)
    text = config(folder)["text_config"]
    (folder / "config.json").write_text(json.dumps(text))
    convert(folder, tmp_path / "mlx", 16)
    ours = load_model(tmp_path / "mlx", dtype="float32")(IDS)
    assert furthest(load_model(folder, dtype="float32")(IDS), ours) == 0
    import mlx_lm as peer

    assert furthest(peer.load(str(tmp_path / "mlx"))[0](IDS), ours) <= 1e-4


def test_blocks_of_any_size_give_the_same_bytes(source, tmp_path, monkeypatch):
    convert(source("26b-a4b"), tmp_path / "a" / "m", 4)
    monkeypatch.setattr(blocks, "BLOCK", 1 << 12)
    monkeypatch.setattr(blocks.ranges, "__defaults__", (1 << 12,))
    convert(source("26b-a4b"), tmp_path / "b" / "m", 4)
    assert contents(tmp_path / "a" / "m") == contents(tmp_path / "b" / "m")


def test_load_takes_the_result(source, tmp_path):
    convert(source("31b"), tmp_path / "mlx", 6)
    _, before = load(source("31b"))
    _, after = load(tmp_path / "mlx")
    assert after.encode("the user in a mode") == before.encode("the user in a mode")


def test_the_card_carries_base_model_and_licence(tmp_path):
    folder = tiny.make_tiny(tmp_path / "hf", "e4b")
    head = "---\nlicense: apache-2.0\nlicense_link: https://example.org/terms\nbase_model: owner/base\n---\n# Old\n"
    (folder / "README.md").write_text(head)
    convert(folder, tmp_path / "mlx", recipe="mixed-4-6")
    card = (tmp_path / "mlx" / "README.md").read_text()
    for line in ("license: apache-2.0", "license_link: https://example.org/terms", "base_model: owner/base"):
        assert line in card
    assert "library_name: mlx" in card and "mixed-4-6" in card and str(tmp_path) not in card


def test_progress_counts_every_byte_once(source, tmp_path):
    steps = []
    convert(source("e2b"), tmp_path / "mlx", 4, progress=steps.append)
    converting = [s for s in steps if s.stage == "convert"]
    assert converting[-1].bytes_done == converting[-1].bytes_total > 0
    assert converting[-1].tensors_done == converting[-1].tensors_total > 0
    assert [s.bytes_done for s in converting] == sorted(s.bytes_done for s in converting)
    verifying = [s for s in steps if s.stage == "verify"]
    assert verifying[-1].bytes_done == verifying[-1].bytes_total > 0


# Each is one line, before anything was written.


def refused(kind, folder, target, *words, **options) -> None:
    with pytest.raises(kind) as error:
        convert(folder, target, **options)
    text = one_line(error)
    for word in words:
        assert word in text, text
    assert not target.exists() and not list(target.parent.glob(f".{target.name}*"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 7}, ["7", "2, 3, 4, 5, 6, 8"]),
        ({"bits": 4, "group_size": 48}, ["48", "32, 64, 128"]),
        ({"bits": 4, "group_size": 128}, ["128 do not divide", "64 does"]),
        ({"bits": 5, "mode": "mxfp4"}, ["mxfp4 has 4 bits"]),
        ({"mode": "int4"}, ["int4", "affine"]),
        ({"recipe": "5bits"}, ["5bits", "mixed-4-6"]),
        ({"recipe": "4bit", "bits": 4}, ["--recipe", "--bits"]),
        ({"bits": 16, "group_size": 64}, ["--group-size"]),
        ({"bits": 4, "dtype": "int8"}, ["int8", "bfloat16"]),
        ({"recipe": "q4_0"}, ["Q4_0", "--recipe 4bit"]),
        ({"bits": 4, "upload": "no-owner"}, ["owner/name"]),
    ],
    ids=str,
)
def test_wrong_options(source, tmp_path, options, words):
    refused(UsageError, source("e4b"), tmp_path / "mlx", *words, **options)


def test_not_a_gemma_4(source, tmp_path):
    folder = tiny.make_tiny(tmp_path / "hf", "e4b")
    edit_config(folder, model_type="llama")
    refused(ConfigError, folder, tmp_path / "mlx", "llama", "gemma4", bits=4)
    (folder / "config.json").unlink()
    refused(ConfigError, folder, tmp_path / "mlx", "config.json", bits=4)


def test_damaged_sources(tmp_path):
    folder = tiny.make_tiny(tmp_path / "cut", "31b", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(WeightsError, folder, tmp_path / "mlx", "model-00002-of-00003", "missing", bits=4)

    folder = tiny.make_tiny(tmp_path / "short", "31b")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    refused(WeightsError, folder, tmp_path / "mlx", "cut short", bits=4)

    folder = tiny.make_tiny(tmp_path / "lacking", "31b")
    kept = {k: v for k, v in weights(folder).items() if "layers.3.mlp" not in k}
    mx.eval(kept)
    tiny.write_shards(folder, kept)
    refused(WeightsError, folder, tmp_path / "mlx", "lacks 3 tensors", bits=4)


def test_nan_in_the_source_is_named_and_nothing_gets_the_targets_name(tmp_path):
    folder = tiny.make_tiny(tmp_path / "hf", "31b", dtype="bfloat16")
    bad = weights(folder)
    mx.eval(bad)
    name = "model.language_model.layers.3.mlp.up_proj.weight"
    bad[name][5, 7] = float("nan")
    tiny.write_shards(folder, bad)
    with pytest.raises(WeightsError) as error:
        convert(folder, tmp_path / "mlx", 4)
    assert name in one_line(error) and "NaN" in one_line(error) and not (tmp_path / "mlx").exists()


def test_targets_that_are_refused(source, tmp_path):
    folder, target = source("e4b"), tmp_path / "mlx"
    convert(folder, target, 4)
    before = contents(target)
    with pytest.raises(UsageError, match=r"exists.*--force"):
        convert(folder, target, 8)
    assert contents(target) == before
    with pytest.raises(UsageError, match="lie in one another"):
        convert(target, target, 8, force=True)
    with pytest.raises(UsageError, match="lie in one another"):
        convert(target, target / "inside", 8)
    own = tmp_path / "documents"
    own.mkdir()
    (own / "novel.txt").write_text("chapter one")
    with pytest.raises(UsageError, match="no model folder"):
        convert(folder, own, 4, force=True)
    assert contents(own) == {"novel.txt": b"chapter one"}
    (tmp_path / "file").write_text("")
    with pytest.raises(Gemma4Error) as error:
        convert(folder, tmp_path / "file" / "mlx", 4)
    assert "cannot write" in one_line(error)
    assert contents(target) == before


def test_a_packed_tower_stays_packed_and_unpacks(source, tmp_path):
    """Towers are not packed here, but a source may have done it: at 8 bits beside a text of 4."""
    convert(source("e2b"), tmp_path / "plain", 16)
    found = weights(tmp_path / "plain")
    mx.eval(found)
    path = "vision_tower.encoder.layers.0.mlp.up_proj.linear"
    parts = mx.quantize(found.pop(f"{path}.weight"), 64, 8)
    found |= {f"{path}.{leaf}": part for leaf, part in zip(("weight", "scales", "biases"), parts, strict=True)}
    tiny.write_shards(tmp_path / "plain", found, format="mlx")
    (tmp_path / "plain" / "model.safetensors.index.json").unlink()
    eight = {"group_size": 64, "bits": 8, "mode": "affine"}
    edit_config(tmp_path / "plain", quantization={"group_size": 64, "bits": 4, "mode": "affine", path: eight})
    convert(tmp_path / "plain", tmp_path / "4", 4)
    kept = weights(tmp_path / "4")
    assert all(mx.array_equal(kept[f"{path}.{k}"], found[f"{path}.{k}"]).item() for k in ("weight", "scales", "biases"))
    assert config(tmp_path / "4")["quantization"][path] == eight
    convert(tmp_path / "4", tmp_path / "16", 16)
    unpacked = weights(tmp_path / "16")
    assert mx.array_equal(unpacked[f"{path}.weight"], mx.dequantize(*parts, 64, 8)).item()
    assert f"{path}.scales" not in unpacked
