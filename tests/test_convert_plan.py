"""Plans and recipes: from headers to every byte of the result, for the published shapes, without a weight."""

import json
import math

import pytest
from checkpoints import one_line
from published import SIZES, config, tensors

from mlx_gemma4.config import Gemma4Config
from mlx_gemma4.conversions import estimate, recipe
from mlx_gemma4.conversions.plan import build
from mlx_gemma4.conversions.recipe import Packing
from mlx_gemma4.errors import UsageError, WeightsError
from mlx_gemma4.safetensors_header import Tensor, check_header


def headers(size: str, files: int = 1) -> dict[str, dict[str, Tensor]]:
    """The published tensors as headers of one or several bfloat16 files."""
    out: dict[str, dict[str, Tensor]] = {f"model-{i + 1:05d}-of-{files:05d}.safetensors": {} for i in range(files)}
    ends = dict.fromkeys(out, 0)
    for i, (name, shape) in enumerate(sorted(tensors(size).items())):
        file = list(out)[i % files]
        begin = ends[file]
        ends[file] = begin + 2 * math.prod(shape)
        out[file][name] = Tensor("BF16", shape, begin, ends[file])
    return out


def plan_of(size: str, chosen: recipe.Recipe, files: int = 1, **options):
    parsed = Gemma4Config.from_dict(config(size))
    return build(
        headers(size, files), parsed, lambda p: chosen.choose(p, parsed.text), chosen.default, **options
    ), parsed


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [n for n in recipe.names() if n != "q4_0"])
def test_every_recipe_fits_every_published_shape(size, name):
    plan, parsed = plan_of(size, recipe.load(name))
    for number, header in enumerate(plan.headers):
        found = check_header("it", json.loads(header[8:]), len(header), plan.sizes[number])
        for tensor, entry in found.items():
            place = plan.places[tensor]
            assert (place.shard, place.begin) == (number, len(header) + entry.begin)
            assert place.begin % 4 == 0 or entry.dtype in ("BF16", "U8")  # aligned, so that it can be mapped
    assert max(plan.sizes) <= 5_000_000_000
    packed = {i.path: i.packing for i in plan.items if i.packing}
    for path, packing in packed.items():
        assert path.startswith("language_model."), path
        if path.endswith("router.proj"):
            assert packing.bits >= 8
    assert packed["language_model.model.embed_tokens"].bits >= packed["language_model.model.layers.9.mlp.up_proj"].bits
    assert sum(g.nbytes for g in estimate.groups(plan)) == plan.tensor_bytes
    # What is read: everything but the keys and values of sharing layers.
    unused = {"e2b": 60, "e4b": 54}.get(size, 0)
    assert len({s for i in plan.items for s in i.sources}) == len(tensors(size)) - unused
    resident = estimate.resident(plan.tensor_bytes, parsed)[131072]
    assert plan.tensor_bytes < resident[3.5] < resident[16]


@pytest.mark.parametrize("size", SIZES)
def test_the_plan_does_not_depend_on_the_sources_files(size):
    one, _ = plan_of(size, recipe.load("4bit"))
    many, _ = plan_of(size, recipe.load("4bit"), files=4)
    assert one.headers == many.headers and one.files == many.files
    assert one.order != many.order
    # Made in the order in which the files come.
    at = [max(s[0] for s in many.items[i].sources) for i in many.order]
    assert at == sorted(at)


def test_a_large_table_has_a_shard_of_its_own():
    """E4B's table in bfloat16 is 5.6 GB: the one tensor that no cutting brings below 5 GB."""
    plan, _ = plan_of("e4b", recipe.select(bits=16))
    over = [s for s in plan.sizes if s > 5_000_000_000]
    assert len(over) == 1 and over[0] < 5_700_000_000
    assert sum(plan.sizes) == plan.tensor_bytes + sum(map(len, plan.headers))


def test_k_proj_is_a_value_where_there_is_no_other():
    parsed = Gemma4Config.from_dict(config("31b"))
    text = 'bits = 4\n[[rules]]\nmatch = ["self_attn.v_proj"]\nends = 0.125\nbits = 6\n'
    chosen = recipe.parse(text, "own")
    layers = parsed.text.num_hidden_layers
    k = {i: chosen.choose(f"language_model.model.layers.{i}.self_attn.k_proj", parsed.text).bits for i in range(layers)}
    v = {
        i: chosen.choose(f"language_model.model.layers.{i}.self_attn.v_proj", parsed.text).bits
        for i in range(layers)
        if not parsed.text.k_is_v(i)
    }
    assert all(k[i] == 4 for i in v)  # a key beside a value
    raised = [i for i in range(layers) if parsed.text.k_is_v(i) and k[i] == 6]
    assert 59 in raised and 5 in raised  # the first and the last global layer
    assert {v[0], v[1], v[58]} == {6} and 4 in v.values()


def test_mixed_recipes_as_calibrations_choose():
    """Values, keys and embeddings before the rest of attention, that before MLPs, at every family's shapes."""
    named = ("mixed-3-4", "mixed-3-5", "mixed-3-6", "mixed-4-5", "mixed-4-6", "4bit", "3bit")
    for size, name in ((s, n) for s in SIZES for n in named):
        parsed = Gemma4Config.from_dict(config(size))
        chosen = recipe.load(name)
        middle = parsed.text.num_hidden_layers // 2

        def bits(matrix, chosen=chosen, parsed=parsed, middle=middle) -> int:
            return chosen.choose(f"language_model.model.layers.{middle}.{matrix}", parsed.text).bits

        assert bits("self_attn.v_proj") >= bits("self_attn.k_proj") >= bits("self_attn.o_proj") >= bits("mlp.up_proj")
        assert chosen.choose("language_model.model.embed_tokens", parsed.text).bits > bits("mlp.down_proj")
        assert bits("mlp.gate_proj") == int(name.removeprefix("mixed-")[0])
        first = chosen.choose("language_model.model.layers.0.mlp.down_proj", parsed.text).bits
        assert first == bits("mlp.down_proj") + (name in ("mixed-3-6", "mixed-4-5", "mixed-4-6"))


def test_groups_of_128_where_they_divide():
    """704 and 2,112 columns of 26B-A4B's down projections are no multiples of 128; --group-size asks and is refused."""
    for name in ("mixed-3-4", "mixed-3-5", "mixed-4-5"):
        plan, _ = plan_of("26b-a4b", recipe.load(name))
        groups = {i.path: i.packing.group_size for i in plan.items if i.packing}
        for path, group in groups.items():
            narrow = path.endswith((".mlp.down_proj", ".switch_glu.down_proj", "router.proj"))
            assert group == (64 if narrow else 128), path
        record = plan.quantization()
        assert record is not None and record["group_size"] == 128
        assert record["language_model.model.layers.9.mlp.down_proj"]["group_size"] == 64
        plan_of("31b", recipe.select(name, group_size=32))
    with pytest.raises(UsageError, match="704 columns"):
        plan_of("26b-a4b", recipe.select("mixed-4-5", group_size=128))


def test_rules():
    text = Gemma4Config.from_dict(config("e2b")).text
    chosen = recipe.parse(
        """
        bits = 4
        [[rules]]
        match = ["mlp.*"]
        bits = 3
        group_size = 32
        [[rules]]
        match = ["mlp.down_proj"]
        ends = 0.1
        bits = 8
        [[rules]]
        match = ["self_attn.o_proj"]
        bits = 16
        """,
        "mine",
    )
    path = "language_model.model.layers.{}.{}"
    assert chosen.choose(path.format(20, "mlp.down_proj"), text) == Packing(32, 3)
    assert chosen.choose(path.format(0, "mlp.down_proj"), text) == Packing(64, 8)  # the last rule decides, alone
    assert chosen.choose(path.format(34, "mlp.down_proj"), text) == Packing(64, 8)
    assert chosen.choose(path.format(3, "self_attn.o_proj"), text) is None
    assert chosen.choose("language_model.model.embed_tokens", text) == Packing(64, 4)
    assert chosen.choose(path.format(3, "router.proj"), text) == Packing(64, 8)  # always on


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("bits = 4\nbit = 3", ["'bit'", "group_size"]),
        ('bits = 4\n[[rules]]\nmatch = ["a"]\nlayer = 3', ["rule 1", "'layer'"]),
        ("bits = 4\n[[rules]]\nbits = 3", ["rule 1", "match"]),
        ("bits = 7", ["bits 7"]),
        ("group_size = 64", ["how many bits"]),
        ('bits = "4"', ["bits is '4'"]),
        ("bits = 4\ngroup_size = 48", ["48"]),
        ("bits = 4\ngroup_size = [128, 48]", ["48"]),
        ("bits = 4\ngroup_size = []", ["[128, 64]"]),
        ('bits = 4\ngroup_size = ["128"]', ["[128, 64]"]),
        ('bits = 4\nmode = "mxfp4"\ngroup_size = [32, 64]', ["affine"]),
        ('bits = 4\ngroup_size = "128"', ["group_size is '128'"]),
        ('bits = 4\nmode = "int"', ["int", "nvfp4"]),
        ('bits = 6\nmode = "mxfp4"\ngroup_size = 32', ["mxfp4 has 4 bits"]),
        ('bits = 4\n[[rules]]\nmatch = ["a"]\nends = 0.7', ["ends"]),
        ("bits = 4\nbits = 5", ["TOML"]),
        ("bits = 16", ["--bits 16"]),
    ],
)
def test_wrong_recipes(tmp_path, toml, words):
    (tmp_path / "mine.toml").write_text(toml)
    with pytest.raises(UsageError) as error:
        recipe.select(str(tmp_path / "mine.toml"))
    text = one_line(error)
    assert "mine.toml" in text
    for word in words:
        assert word in text, text


def test_what_options_mean():
    assert recipe.select().name == "4bit" and recipe.select(bits=6).name == "6bit"
    assert recipe.select(mode="nvfp4").default == Packing(16, 4, "nvfp4")
    assert recipe.select(bits=16).default is None
    text = Gemma4Config.from_dict(config("e2b")).text
    grouped = recipe.select(bits=4, group_size=32)
    assert grouped.choose("language_model.model.layers.3.mlp.up_proj", text) == Packing(32, 4)
    assert grouped.choose("language_model.model.embed_tokens", text) == Packing(32, 6)
    for name in recipe.names():
        assert recipe.load(name).description.endswith(".")


def test_groups_that_do_not_divide_are_named():
    with pytest.raises(UsageError) as error:
        plan_of("26b-a4b", recipe.select(bits=4, group_size=128))
    assert "704 columns" in one_line(error) and "64 does" in one_line(error)


def test_a_tensor_of_another_shape_and_one_too_many():
    parsed = Gemma4Config.from_dict(config("e2b"))
    found = headers("e2b")
    (tensors_,) = found.values()
    name = "model.language_model.layers.3.mlp.up_proj.weight"
    good = tensors_[name]
    tensors_[name] = Tensor("BF16", (good.shape[0] // 2, good.shape[1] * 2), good.begin, good.end)
    with pytest.raises(WeightsError) as error:
        build(found, parsed, lambda p: None, None)
    assert name in one_line(error) and "shape" in one_line(error)
    tensors_[name] = good
    tensors_["model.language_model.layers.3.mlp.third_proj.weight"] = good
    with pytest.raises(WeightsError, match=r"holds 1 tensor .*third_proj"):
        build(found, parsed, lambda p: None, None)
