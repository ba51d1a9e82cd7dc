"""Every full-size graph against the published files: the same names, shapes and totals, and nothing allocated."""

import math
import time

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from published import SIZES, config, tensors

from mlx_gemma4.config import Gemma4Config
from mlx_gemma4.conversions.names import is_tower, is_unused, sanitize, to_mlx_name
from mlx_gemma4.models.gemma4 import Model

# Tensors in the file, of these unused (keys and values of sharing layers), parameters used, of these in the text graph.
# The totals are the published ones: model cards' "effective" and total counts, and the index of each repository.
PUBLISHED = {
    "e2b": (2011, 60, 5_104_298_467, None),
    "e4b": (2130, 54, 7_941_101_802, None),
    "26b-a4b": (1013, 0, 25_805_936_206, 25_233_141_790),
    "31b": (1188, 0, 31_273_088_876, 30_697_345_340),
}

ALL = pytest.mark.parametrize("size", SIZES)


def shapes_of(model: Model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tree_flatten(model.parameters())}


def count(shapes) -> int:
    return sum(math.prod(shape) for shape in shapes)


@ALL
def test_names_and_shapes(size):
    """`sanitize` turns exactly the published text tensors into exactly the graph's parameters."""
    parsed = Gemma4Config.from_dict(config(size))
    files = {name: mx.zeros(shape, mx.bfloat16) for name, shape in tensors(size).items()}
    found = {name: tuple(value.shape) for name, value in sanitize(files, parsed).items()}
    assert found == shapes_of(Model(parsed))


@ALL
def test_every_other_tensor_is_known(size):
    parsed, names = Gemma4Config.from_dict(config(size)), [to_mlx_name(name) for name in tensors(size)]
    towers = {name for name in names if is_tower(name)}
    unused = {name for name in names if is_unused(name, parsed)}
    text = {name for name in names if name.startswith("language_model.")}
    assert len(names) == len(set(names)) == PUBLISHED[size][0]
    assert len(unused) == PUBLISHED[size][1] and unused <= text
    assert towers | text == set(names) and not towers & text
    assert towers, "every published size sees images"


@ALL
def test_totals(size):
    parsed, files = Gemma4Config.from_dict(config(size)), tensors(size)
    text = count(shapes_of(Model(parsed)).values())
    towers = count(shape for name, shape in files.items() if is_tower(to_mlx_name(name)))
    _, _, used, published_text = PUBLISHED[size]
    assert text + towers == used
    assert published_text is None or text == published_text


@ALL
def test_mlx_names_stay(size):
    parsed = Gemma4Config.from_dict(config(size))
    names = dict.fromkeys(shapes_of(Model(parsed)), mx.zeros(()))
    assert set(sanitize(names, parsed)) == set(names)


def test_nothing_is_allocated():
    """All four graphs stand in seconds, and in kilobytes: parameters are promises until weights are loaded."""
    mx.clear_cache()
    mx.reset_peak_memory()
    before, start = mx.get_active_memory(), time.perf_counter()
    models = [Model(Gemma4Config.from_dict(config(size))) for size in SIZES]
    assert sum(count(shapes_of(model).values()) for model in models) > 68e9
    assert mx.get_peak_memory() - before < 4 << 20
    assert time.perf_counter() - start < 20


def test_text_only_names():
    """Checkpoints of the text classes alone, and an output head where the embedding is not tied."""
    assert to_mlx_name("model.layers.3.mlp.up_proj.weight") == "language_model.model.layers.3.mlp.up_proj.weight"
    assert to_mlx_name("lm_head.weight") == "language_model.lm_head.weight"
    tied = Gemma4Config.from_dict(config("31b"))
    assert sanitize({"lm_head.weight": mx.zeros(())}, tied) == {}
    raw = config("31b")
    raw["tie_word_embeddings"] = raw["text_config"]["tie_word_embeddings"] = False
    untied = Gemma4Config.from_dict(raw)
    assert set(sanitize({"lm_head.weight": mx.zeros(())}, untied)) == {"language_model.lm_head.weight"}
    assert set(shapes_of(Model(untied))) - set(shapes_of(Model(tied))) == {"language_model.lm_head.weight"}


def test_gate_comes_before_up():
    parsed = Gemma4Config.from_dict(config("26b-a4b"))
    name = "model.language_model.layers.0.experts."
    both = mx.concatenate([mx.zeros((2, 3, 4)), mx.ones((2, 3, 4))], axis=1)
    out = sanitize({name + "gate_up_proj": both, name + "down_proj": mx.ones((2, 4, 3))}, parsed)
    prefix = "language_model.model.layers.0.experts.switch_glu."
    assert set(out) == {prefix + f"{part}_proj.weight" for part in ("gate", "up", "down")}
    assert out[prefix + "gate_proj.weight"].max().item() == 0 and out[prefix + "up_proj.weight"].min().item() == 1
