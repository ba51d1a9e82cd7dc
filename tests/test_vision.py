"""The vision tower against stored references of transformers, in every shape it is called in, and how it is loaded.

Limit: 1e-4 of the reference's root mean square. The classes themselves stand 1.9e-5 from float64 (stored as `noise`),
and ours 3e-5 from them.
"""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import published
import pytest
import tiny
import vision_cases as cases
from checkpoints import edit_config, logits, one_line, rewrite, save_as_mlx
from mlx.utils import tree_flatten

from mlx_gemma4 import loading
from mlx_gemma4.config import Gemma4Config
from mlx_gemma4.config_vision import VisionConfig
from mlx_gemma4.conversions.names import to_mlx_name
from mlx_gemma4.errors import ConfigError, UsageError, WeightsError
from mlx_gemma4.media.images import POOL, ProcessedImage, load_image
from mlx_gemma4.models import vision
from mlx_gemma4.models.gemma4 import Model
from mlx_gemma4.models.vision import encode_images, pooling_order

LIMIT = 1e-4
BOTH = pytest.mark.parametrize("case", cases.CASES)
EACH = pytest.mark.parametrize("i", range(len(cases.GRIDS)), ids=[f"{r}x{c}" for r, c in cases.GRIDS])


@pytest.fixture(scope="module")
def references():
    with np.load(cases.FOLDER / "towers.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One checkpoint with towers per family, made when first asked for. Do not write into them."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = tiny.make_tiny(tmp_path_factory.mktemp("towers") / family, family, seed=5, towers=True)
        return made[family]

    return get


class Seeing:
    """What `encode_images` needs of a model."""

    def __init__(self, case):
        self.vision_tower, self.embed_vision = cases.build(case)


def processed(i: int) -> ProcessedImage:
    rows, columns = cases.GRIDS[i]
    return ProcessedImage(cases.patches(rows, columns, i), rows, columns, columns * 16, rows * 16)


# ------------------------------------------------------------------ the graph


@BOTH
@EACH
def test_each_picture_alone(references, case, i):
    (rows, columns), (tower, projector) = cases.GRIDS[i], cases.build(case)
    features = tower(mx.array(cases.patches(rows, columns, i)), cases.grid(rows, columns))
    assert features.shape == (rows * columns // POOL**2, 48) and features.dtype == mx.float32
    assert cases.relative(features, references[f"{case}/{i}/features"]) <= LIMIT
    assert cases.relative(projector(features), references[f"{case}/{i}/embeddings"]) <= LIMIT


@BOTH
@pytest.mark.parametrize("max_patches", [vision.MAX_PATCHES, 100, 1])
def test_pictures_of_different_sizes_together(references, case, max_patches, monkeypatch):
    """One pass, several, or one each: the same numbers in the order they were asked for, and not one patch more."""
    rows_seen, call = [], vision.VisionTower.__call__

    def counted(self, patches, positions, lengths):
        rows_seen.append(len(patches))
        return call(self, patches, positions, lengths)

    monkeypatch.setattr(vision.VisionTower, "__call__", counted)
    found = encode_images(Seeing(case), [processed(i) for i in range(len(cases.GRIDS))], max_patches=max_patches)
    for i, embeddings in enumerate(found):
        assert cases.relative(embeddings, references[f"{case}/{i}/embeddings"]) <= LIMIT, i
    assert sum(rows_seen) == sum(r * c for r, c in cases.GRIDS)
    assert len(rows_seen) == {vision.MAX_PATCHES: 1, 100: 3, 1: 6}[max_patches]
    assert max(rows_seen) <= max(max_patches, 108)


@BOTH
@pytest.mark.parametrize("scores", [1, 2000, 40_000])
def test_attention_in_slices(references, case, scores, monkeypatch):
    """Where the scores of a picture do not fit at once."""
    monkeypatch.setattr(vision, "MAX_SCORES", scores)
    found = encode_images(Seeing(case), [processed(0), processed(4), processed(5)])
    for i, embeddings in zip((0, 4, 5), found, strict=True):
        assert cases.relative(embeddings, references[f"{case}/{i}/embeddings"]) <= LIMIT


@BOTH
def test_patches_in_any_order_and_as_floats(references, case):
    """Positions say where a patch belongs, and pixels may come as the reference processor gives them."""
    tower, _ = cases.build(case)
    order = np.random.default_rng(0).permutation(108)
    pixels = mx.array(cases.patches(9, 12, 4)[order].astype(np.float32) / 255)
    features = tower(pixels, mx.array(cases.grid(9, 12)[order]))
    assert cases.relative(features, references[f"{case}/4/features"]) <= LIMIT


@BOTH
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_sixteen_bits(references, case, dtype):
    """As far from float32 as transformers is in the same type; which of the two is farther differs by case."""
    tower, projector = cases.build(case, dtype=dtype)
    features = tower(mx.array(cases.patches(9, 12, 4)), cases.grid(9, 12))
    assert features.dtype == projector(features).dtype == dtype
    theirs = references[f"{case}/{str(dtype).removeprefix('mlx.core.')}"]
    assert 0 < cases.spread(features, references[f"{case}/4/features"]) <= 1.2 * theirs


def test_the_pool_does_not_overflow_float16():
    """Features of 60,000 times the root of the width would be infinite before they are standardized."""
    tower, _ = cases.build("standardized", dtype=mx.float16)
    tower.std_bias, tower.std_scale = mx.zeros(48, mx.float16), mx.full((48,), 0.01, mx.float16)
    order = mx.array(pooling_order(cases.grid(3, 3), [9], tower.config))
    assert np.isclose(tower._pool(mx.full((9, 48), 60_000, mx.float16), order).max().item(), 600 * 48**0.5, rtol=1e-3)


def test_every_bound_clips(references):
    """Each of the four bounds of each linear changes the result when it is taken away."""
    inputs = mx.array(cases.patches(9, 12, 4)), cases.grid(9, 12)
    tower, _ = cases.build("clipped")
    before = np.array(tower(*inputs))
    bounds = [n for n, _ in tree_flatten(tower.parameters()) if n.endswith(("_min", "_max")) and ".layers.1." in n]
    assert len(bounds) == 7 * 4
    for name in bounds:
        path, _, leaf = name.rpartition(".")
        linear = dict(tower.named_modules())[path]
        old = linear[leaf]
        linear[leaf] = mx.array(np.inf if leaf.endswith("max") else -np.inf)
        assert np.abs(np.array(tower(*inputs)) - before).max() > 1e-3, name
        linear[leaf] = old


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: np.concatenate([p, np.full((9, 2), -1)]),  # the reference's padding
        lambda p: p[:-1],
        lambda p: np.concatenate([p[:-1], p[:1]]),
        lambda p: p + np.array([300, 0]),
        lambda p: cases.grid(4, 9),
        lambda p: p[:0],
    ],
    ids=["padding", "one missing", "one twice", "shifted", "no whole squares", "none"],
)
def test_positions_that_are_no_grid(spoil):
    positions = spoil(cases.grid(6, 6))
    with pytest.raises(UsageError) as error:
        pooling_order(positions, [len(positions)], VisionConfig())
    assert "grid" in one_line(error) or "positions" in one_line(error)


def test_lengths_that_do_not_add_up():
    with pytest.raises(UsageError, match="do not fit"):
        pooling_order(cases.grid(6, 6), [9, 9], VisionConfig())


# ------------------------------------------------------------------ the published sizes


@pytest.mark.parametrize("size", published.SIZES)
def test_names_and_shapes_of_the_published_towers(size):
    raw = published.config(size)
    ours = tree_flatten(Model(Gemma4Config.from_dict(raw), towers=True).parameters())
    mine = ("vision_tower.", "embed_vision.")
    files = {to_mlx_name(name): shape for name, shape in published.tensors(size).items()}
    assert {n: v.shape for n, v in ours if n.startswith(mine)} == {n: s for n, s in files.items() if n.startswith(mine)}
    config = VisionConfig.from_dict(raw["vision_config"])
    small = size in ("e2b", "e4b")
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim) == (
        (16, 768, 64) if small else (27, 1152, 72)
    )
    assert config.use_clipped_linears is small and config.standardize is not small
    assert config.default_output_length == 280 and config.rope_theta == 100.0


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "gemma4_unified_vision"},
        {"attention_bias": True},
        {"hidden_activation": "relu"},
        {"rope_parameters": {"rope_type": "yarn"}},
        {"head_dim": 66},
        {"num_key_value_heads": 5},
        {"patch_size": 0},
        {"num_hidden_layers": "16"},
    ],
    ids=str,
)
def test_a_tower_this_graph_does_not_compute(fields):
    with pytest.raises(ConfigError) as error:
        VisionConfig.from_dict(fields)
    assert "vision_config" in one_line(error)


# ------------------------------------------------------------------ loading


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_towers_are_loaded_when_asked_for(folders, family):
    """And text is the same with them as without."""
    plain, seeing = (loading.load_model(folders(family), dtype="float32", towers=t) for t in (False, True))
    names = [n for n, _ in tree_flatten(plain.parameters())]
    assert plain.towers == () and not [n for n in names if not n.startswith("language_model.")]
    assert seeing.towers[:2] == ("vision_tower.", "embed_vision.")
    (found,) = encode_images(seeing, [load_image(cases.picture(120, 200), 70)])
    assert found.shape == (60, 64) and mx.all(mx.isfinite(found)).item()
    assert mx.array_equal(logits(plain), logits(seeing)).item()


def test_packed_towers(folders, tmp_path):
    """As converters write them: every linear of the tower packed, the table of positions not."""
    model = loading.load_model(folders("31b"), dtype="float32", towers=True)
    image = load_image(cases.picture(64, 64), 70)
    plain = np.array(encode_images(model, [image])[0])
    nn.quantize(model, group_size=64, bits=8)
    (expected,) = encode_images(model, [image])
    target = save_as_mlx(folders("31b"), model, tmp_path / "packed")
    edit_config(target, quantization={"group_size": 64, "bits": 8, "mode": "affine"})
    (found,) = encode_images(loading.load_model(target, dtype="float32", towers=True), [image])
    assert mx.array_equal(found, expected).item() and 0 < cases.relative(found, plain) < 0.2
    assert loading.load_model(target).towers == ()


def test_a_tower_with_a_tensor_missing(folders, tmp_path):
    folder = tiny.make_tiny(tmp_path / "spoiled", "31b", towers=True)
    rewrite(folder, lambda weights: {n: v for n, v in weights.items() if not n.endswith("std_bias")})
    loading.load_model(folder)
    with pytest.raises(WeightsError) as error:
        loading.load_model(folder, towers=True)
    assert "vision_tower.std_bias" in one_line(error)


def test_a_model_that_does_not_see(folders, tmp_path):
    image = load_image(cases.picture(64, 64), 70)
    with pytest.raises(UsageError, match="towers=True") as error:
        encode_images(loading.load_model(folders("31b")), [image])
    one_line(error)
    blind = tiny.make_tiny(tmp_path / "blind", "31b")
    with pytest.raises(UsageError, match="no vision tower") as error:
        encode_images(loading.load_model(blind, towers=True), [image])
    one_line(error)


def test_load_takes_towers(folders):
    model, _ = loading.load(folders("e2b"), towers=True)
    assert "vision_tower." in model.towers
    assert encode_images(model, []) == []


def test_the_style_transformers_saves(folders):
    """rope_type "axial" instead of "default"."""
    raw = json.loads((folders("e2b") / "config.json").read_text())["vision_config"]
    axial = {**raw, "rope_parameters": {"rope_theta": 100.0, "rope_type": "axial"}}
    assert VisionConfig.from_dict(raw) == VisionConfig.from_dict(axial)


def test_memory_depends_on_the_largest_pass_only():
    """Twelve pictures in passes of one need what one needs, and their results."""
    model, images = Seeing("clipped"), [load_image(cases.picture(300, 300), 70) for _ in range(12)]
    encode_images(model, images[:1])

    def peak(some):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        found = encode_images(model, some, max_patches=600)
        return mx.get_peak_memory() - before - sum(part.nbytes for part in found)

    assert peak(images) < 1.5 * peak(images[:1])


def test_pixels_need_no_mlx(clean_python):
    code = "import sys, mlx_gemma4.media.images as i; i.target_size(9, 9); print('mlx.core' in sys.modules)"
    assert clean_python(code).strip() == "False"
