"""From what one types to a model: sources, every layout the ecosystem writes, types and threads."""

import json
import threading
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny
from checkpoints import IDS, PACKINGS, difference, one_line, rewrite, save_as_mlx, save_packed
from mlx.utils import tree_flatten

from mlx_gemma4 import loading
from mlx_gemma4.conversions import hub
from mlx_gemma4.errors import ModelNotFoundError, UsageError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One checkpoint per family, made when first asked for. Do not write into them."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tiny.make_tiny(tmp_path_factory.mktemp("tiny") / family, family, seed=3)
        return made[family]

    return get


# ------------------------------------------------------------------ what a source means


def test_a_folder_in_every_spelling(folders, monkeypatch):
    folder = folders("31b")
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    for source in (folder, str(folder), f"{folder}/", f"./{folder.name}", f"~/{folder.name}", folder.name):
        assert loading.resolve(source).resolve() == folder


def test_the_built_in_model_needs_no_network():
    from mlx_gemma4 import demo

    assert loading.resolve() == loading.resolve("demo") == Path(demo.path())


@pytest.mark.parametrize(
    ("source", "revision", "asked"),
    [
        ("e2b", None, ("google/gemma-4-E2B-it", None)),
        ("26B-A4B-base", None, ("google/gemma-4-26B-A4B", None)),
        ("31b@v1", None, ("google/gemma-4-31B-it", "v1")),
        ("someone/some-model", None, ("someone/some-model", None)),
        ("someone/some-model@abc123", None, ("someone/some-model", "abc123")),
        ("someone/some-model", "dev", ("someone/some-model", "dev")),
    ],
)
def test_names_and_repositories_are_downloaded(monkeypatch, tmp_path, source, revision, asked):
    calls = []

    def download(repo, rev, *, token, progress):
        calls.append(((repo, rev), token, progress))
        return tmp_path

    monkeypatch.setattr(hub, "download", download)
    assert loading.resolve(source, revision=revision, token="hf_x", progress=False) == tmp_path
    assert calls == [(asked, "hf_x", False)]


@pytest.mark.parametrize("source", ["/no/such/model", "./nothing", "~/nothing", "nothing/", Path("a/b"), "a/b/c"])
def test_a_missing_folder_is_not_taken_for_a_repository(monkeypatch, source):
    monkeypatch.setattr(hub, "download", lambda *a, **k: pytest.fail("asked the Hub"))
    with pytest.raises(ModelNotFoundError) as error:
        loading.resolve(source)
    assert "there is no folder" in one_line(error) and error.value.exit_code == 3


def test_wrong_sources(folders):
    with pytest.raises(ModelNotFoundError, match="is a file; give the folder"):
        loading.resolve(folders("31b") / "config.json")
    with pytest.raises(ModelNotFoundError, match="did you mean 'e2b'"):
        loading.resolve("e2bb")
    for source, revision in (("", None), ("a/b@", None), ("a/b@c", "d"), (folders("31b"), "main"), ("demo", "v1")):
        with pytest.raises(UsageError):
            loading.resolve(source, revision=revision)


def test_wrong_options_are_told_before_anything_is_read():
    with pytest.raises(UsageError, match="bfloat16, float16, float32"):
        loading.load("/no/such/model", dtype="int8")
    with pytest.raises(UsageError, match=r"kv_bits takes 16, .* not 3\.3"):
        loading.load("/no/such/model", kv_bits=3.3)


# ------------------------------------------------------------------ layouts


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_original_weights_in_every_form_give_the_same_model(folders, tmp_path, family):
    plain = loading.load_model(folders(family), dtype="float32")
    forms = {
        "bfloat16": {"dtype": "bfloat16"},
        "float16": {"dtype": "float16"},
        "sharded": {"shards": 3},
        "towers": {"towers": True},
    }
    for name, form in forms.items():
        other = loading.load_model(tiny.make_tiny(tmp_path / name, family, seed=3, **form), dtype="float32")
        # The fill is exact in bfloat16; in float16 only numbers below 6e-5 are rounded.
        assert difference(plain, other) <= (1e-3 if name == "float16" else 0), name
    shared = plain.text_config.first_shared_layer
    names = [n for n, _ in tree_flatten(plain.parameters())]
    assert not [n for n in names if "k_proj" in n and int(n.split(".")[3]) >= shared]


def test_mlx_layout_with_and_without_towers(folders, tmp_path):
    model = loading.load_model(folders("e2b"))
    mlx = save_as_mlx(folders("e2b"), model, tmp_path / "mlx")
    assert difference(model, loading.load_model(mlx)) == 0
    towers = {
        k.removeprefix("model."): mx.zeros(s) for k, s in tiny.tower_shapes(tiny.tiny_config(towers=True)).items()
    }
    packed = {"vision_tower.x.weight": mx.zeros((4, 4), mx.uint32), "vision_tower.x.scales": mx.zeros((4, 1))}
    rewrite(mlx, lambda w: {**w, **towers, **packed})
    assert difference(model, loading.load_model(mlx)) == 0


def test_text_only_checkpoint(folders, tmp_path):
    model = loading.load_model(folders("e4b"))
    text = save_as_mlx(folders("e4b"), model, tmp_path / "text", prefix="model.")
    (text / "config.json").write_text(json.dumps(tiny.tiny_config("e4b")["text_config"]))
    assert difference(model, loading.load_model(text)) == 0


@pytest.mark.parametrize("settings", PACKINGS, ids=lambda s: f"{s.get('mode', 'affine')}-{s['bits']}-{s['group_size']}")
@pytest.mark.parametrize("family", ["e2b", "26b-a4b"])
def test_packed_weights(folders, tmp_path, family, settings):
    packed, folder = save_packed(folders(family), tmp_path / "packed", settings)
    loaded = loading.load_model(folder, check=True)
    assert difference(packed, loaded) == 0
    assert difference(packed, loading.load_model(folders(family))) > 0
    module = loaded.language_model.model.embed_tokens
    assert isinstance(module, nn.QuantizedEmbedding) and module.bits == settings["bits"]


@pytest.mark.parametrize("default", [PACKINGS[2], PACKINGS[7]], ids=lambda s: s["mode"])
@pytest.mark.parametrize("prefix", ["language_model.model.", "language_model.", "model."])
def test_overrides_by_path_in_every_spelling(folders, tmp_path, prefix, default):
    mixed = {
        "embed_tokens": {"group_size": 64, "bits": 8},  # no mode: affine, whatever the default is
        "layers.1.experts.switch_glu.down_proj": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
        "layers.0.mlp.up_proj": False,
    }

    def choose(path, module):
        if not hasattr(module, "to_quantized"):
            return False
        return mixed.get(path.removeprefix("language_model.model."), True)

    overrides = {prefix + k: v for k, v in mixed.items()}
    packed, folder = save_packed(folders("26b-a4b"), tmp_path / "packed", default, choose, overrides)
    loaded = loading.load_model(folder)
    assert difference(packed, loaded) == 0
    layers, embedding = loaded.language_model.model.layers, loaded.language_model.model.embed_tokens
    assert type(layers[0].mlp.up_proj) is nn.Linear
    assert layers[0].mlp.down_proj.mode == default["mode"]
    assert layers[1].experts.switch_glu.down_proj.mode == "nvfp4"
    assert (embedding.mode, embedding.bits, embedding.group_size) == ("affine", 8, 64)


# ------------------------------------------------------------------ types, threads


def test_compute_type(folders, tmp_path):
    _, folder = save_packed(folders("31b"), tmp_path / "packed", {"group_size": 32, "bits": 4})
    default = mx.bfloat16 if mx.metal.is_available() else mx.float32
    for asked, expected in ((None, default), ("bfloat16", mx.bfloat16), (mx.float16, mx.float16)):
        model = loading.load_model(folder, dtype=asked)
        types = {n.rpartition(".")[2]: v.dtype for n, v in tree_flatten(model.parameters()) if "q_proj" in n}
        assert types == {"weight": mx.uint32, "scales": expected, "biases": expected}
        assert model.compute_dtype == expected == model.language_model.model(IDS).dtype
        assert model.language_model.model.layers[0].layer_scalar.dtype == expected


def on_a_thread(work):
    """What `work()` returns or raises on a new thread, which gives up its streams before it ends."""
    result = []

    def body():
        try:
            result.append(work())
        except Exception as e:
            result.append(e)
        finally:
            mx.clear_streams()

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_loaded_model_runs_on_any_thread(folders, family):
    def run(model):
        cache = model.make_cache()
        out = [model(IDS, cache=cache), model(IDS[:, :1], cache=cache)]
        mx.eval(out)
        return [o.tolist() for o in out]

    here, _ = loading.load(folders(family))
    there, _ = on_a_thread(lambda: loading.load(folders(family)))
    expected = run(here)
    assert on_a_thread(lambda: run(loading.load(folders(family))[0])) == expected
    fresh, _ = loading.load(folders(family))
    assert on_a_thread(lambda: run(fresh)) == expected
    assert run(there) == expected


def test_lazy_leaves_the_weights_in_the_file(folders):
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    model = loading.load_model(folders("e2b"), dtype="float32", lazy=True)
    assert mx.get_active_memory() - before < 100_000
    assert difference(model, loading.load_model(folders("e2b"), dtype="float32")) == 0
