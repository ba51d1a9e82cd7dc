"""Caches in files: plain and compressed ones come back exactly, in another process too, and only where they belong."""

import json
import os

import mlx.core as mx
import numpy as np
import pytest
from compressed import Layer
from tiny import FAMILIES, make_tiny

from mlx_gemma4 import cache as kv
from mlx_gemma4.cache import GlobalCache, files
from mlx_gemma4.errors import Gemma4Error, UsageError
from mlx_gemma4.loading import load_model

PROMPT = mx.array(np.random.default_rng(1).integers(107, 500, (1, 260)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {f: make_tiny(tmp_path_factory.mktemp("tiny"), f, tokenizer=False) for f in FAMILIES}


def filled(model, bits):
    caches = model.make_cache(bits)
    for part in mx.split(PROMPT, [170, 250], axis=1):
        model(part, cache=caches)
        mx.eval([c.state for c in caches])
    return caches


NEW_PROCESS = """
import sys
import mlx.core as mx
from mlx_gemma4 import cache
from mlx_gemma4.loading import load_model
model = load_model(sys.argv[1], dtype="float32")
caches = model.make_cache(float(sys.argv[3]))
assert cache.load(sys.argv[2], caches, model.cache_identity) == {"ids": [1, 2]}
tokens = mx.array([[7, 8, 9]])
mx.save_safetensors(sys.argv[4], {"logits": model(tokens, cache=caches), "next": model(tokens[:, :1], cache=caches)})
"""


@pytest.mark.parametrize(("family", "bits"), [("e2b", 3.5), ("31b", 2), ("26b-a4b", 16)])
def test_saved_here_loaded_in_another_process(folders, tmp_path, clean_python, family, bits):
    model = load_model(folders[family], dtype="float32")
    caches = filled(model, bits)
    file, out = str(tmp_path / "cache.safetensors"), str(tmp_path / "out.safetensors")
    kv.save(file, caches, model.cache_identity, {"ids": [1, 2]})
    tokens = mx.array([[7, 8, 9]])
    truth = {"logits": model(tokens, cache=caches), "next": model(tokens[:, :1], cache=caches)}
    clean_python(NEW_PROCESS, str(folders[family]), file, str(bits), out)
    found = mx.load(out)
    assert all(mx.array_equal(found[name], truth[name]) for name in truth)
    assert os.listdir(tmp_path).count("cache.safetensors") == 1 and len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("kind", ["global", "one-vector", "ring"])
def test_a_loaded_layer_goes_on(kind, tmp_path):
    """Ragged rows, sinks after the padding, a trimmed tail; growing and going back included."""
    layer = Layer(kind, 3, [0, 30])
    for length in (200, 60, 1):
        layer.append(length)
    layer.cache.trim(5)
    layer.cut(256)
    kv.save(tmp_path / "a.safetensors", [layer.cache], "m")
    again = Layer(kind, 3, [0, 30])
    kv.load(tmp_path / "a.safetensors", [again.cache], "m")
    again.exact, again.codes, again.coded = layer.exact, layer.codes, layer.coded
    for length in (1, 3, 70):
        again.append(length)
    here = again.snapshot()
    again.append(150)
    again.restore(here)
    again.append(1)


def test_only_what_is_held_is_written(tmp_path):
    """Positions taken back and spare room are not in the file."""
    cache, x = GlobalCache(), mx.ones((1, 1, 10, 32))
    cache.append(x, x)
    cache.trim(3)
    layer = Layer("global", 4)
    layer.append(300)
    layer.cache.trim(300 - 128)
    kv.save(tmp_path / "a.safetensors", [cache, layer.cache], "m")
    shapes = {name: a.shape[2] for name, a in mx.load(str(tmp_path / "a.safetensors")).items()}
    assert shapes["layers.0.keys"] == shapes["layers.0.values"] == 7
    assert shapes["layers.1.keys.codes"] == shapes["layers.1.keys.scales"] == shapes["layers.1.values.codes"] == 128


def test_empty_caches(folders, tmp_path):
    model = load_model(folders["e2b"], dtype="float32")
    kv.save(tmp_path / "a.safetensors", model.make_cache(3), "m")
    caches = model.make_cache(3)
    assert kv.load(tmp_path / "a.safetensors", caches, "m") == {}
    assert all(c.empty() for c in caches)
    assert mx.array_equal(model(PROMPT, cache=caches), model(PROMPT, cache=model.make_cache(3)))


def test_what_does_not_fit_is_refused(folders, tmp_path, monkeypatch):
    """One line that names what differs; nothing is changed."""
    model = load_model(folders["e2b"], dtype="float32")
    file = tmp_path / "a.safetensors"
    kv.save(file, filled(model, 3.5), model.cache_identity)

    def refused(caches, says, path=file, identity=model.cache_identity):
        with pytest.raises(Gemma4Error, match=says) as e:
            kv.load(path, caches, identity)
        assert "\n" not in str(e.value) and all(c.empty() and c.nbytes == 0 for c in caches)

    refused(model.make_cache(3), "keys bits 3.5, .*values bits 3.5.* in layer 3, this cache has keys bits 3")
    refused(model.make_cache(3.5, kv_mode="pairs"), "mode trellis.* in layer 3, this cache has .*mode pairs")
    refused(model.make_cache(16), "keys compressed.* in layer 3, this cache has keys at 16 bits")
    other = load_model(folders["e4b"], dtype="float32")
    refused(other.make_cache(3.5), "another model", identity=other.cache_identity)
    refused(other.make_cache(3.5), "5 layers, the model's cache has 4")
    refused(model.make_cache(3.5), "not there or cannot be read", path=tmp_path / "none.safetensors")
    (tmp_path / "short.safetensors").write_bytes(file.read_bytes()[:-100])
    refused(model.make_cache(3.5), "damaged|cannot be read", path=tmp_path / "short.safetensors")
    mx.save_safetensors(str(tmp_path / "b.safetensors"), {"x": mx.zeros(3)})
    refused(model.make_cache(3.5), "format None, this version reads", path=tmp_path / "b.safetensors")
    # Codes mean nothing without the table they were found in.
    monkeypatch.setattr(files, "FORMAT", "mlx-gemma4 cache 2")
    refused(model.make_cache(3.5), "format 'mlx-gemma4 cache 1'")
    monkeypatch.undo()
    caches = filled(model, 3.5)
    with pytest.raises(UsageError, match="new caches"):
        kv.load(file, caches, model.cache_identity)
    with pytest.raises(UsageError, match="must end in"):
        kv.save(tmp_path / "a.bin", caches, "m")
    with pytest.raises(Gemma4Error, match="cannot be written"):
        kv.save(tmp_path / "no" / "a.safetensors", caches, "m")


def test_the_table_is_named_by_its_contents(tmp_path):
    layer = Layer("global", 5)
    layer.append(200)
    file = tmp_path / "a.safetensors"
    kv.save(file, [layer.cache], "m")
    arrays, metadata = mx.load(str(file), return_metadata=True)
    layers = json.loads(metadata["layers"])
    layers[0]["settings"]["keys"]["codebook"] = "0" * 64
    mx.save_safetensors(str(file), arrays, metadata | {"layers": json.dumps(layers)})
    with pytest.raises(Gemma4Error, match="keys codebook 00000000 in layer 0"):
        kv.load(file, [Layer("global").cache], "m")


def test_the_identity_is_of_shapes(folders):
    models = [load_model(folders[f], dtype="float32", lazy=True) for f in FAMILIES]
    names = [m.cache_identity for m in models]
    assert len(set(names)) == 4 and all(n.startswith("gemma4 ") for n in names)
    assert load_model(folders["e2b"], dtype="float32", lazy=True).cache_identity == names[0]
