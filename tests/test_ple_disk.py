"""`load(..., ple="disk")`: the same numbers as in memory, from every kind of shard, and none of the table in memory."""

import json
import math
import shutil

import checkpoints
import mlx.core as mx
import numpy as np
import pytest
import tiny
from checkpoints import PACKINGS, one_line
from mlx.utils import tree_flatten

from mlx_gemma4 import ple_disk
from mlx_gemma4.chat import Chat, Done
from mlx_gemma4.cli.app import run
from mlx_gemma4.cli.loader import introduction
from mlx_gemma4.errors import UsageError, WeightsError
from mlx_gemma4.generation import generate_step
from mlx_gemma4.loading import load, load_model
from mlx_gemma4.sampling import Sampling

TOKENS = mx.array([[2, 108, 400, 9, 108, 108, 250, 2], [2, 9, 9, 333, 107, 5, 77, 511]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_tiny(tmp_path_factory.mktemp("e2b"), "e2b", dtype="bfloat16")


def both(folder, dtype="float32"):
    return load_model(folder, dtype=dtype), load_model(folder, dtype=dtype, ple="disk")


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_same_logits_from_the_hubs_layout(tmp_path, shards, dtype):
    memory, disk = both(tiny.make_tiny(tmp_path / "m", "e4b", shards=shards), dtype)
    assert mx.array_equal(memory(TOKENS), disk(TOKENS))
    assert disk.disk_table is not None and memory.disk_table is None


@pytest.mark.parametrize("settings", PACKINGS, ids=lambda s: f"{s.get('mode', 'affine')}{s['bits']}")
def test_same_logits_from_packed_shards(folder, tmp_path, settings):
    _, packed = checkpoints.save_packed(folder, tmp_path / "packed", settings)
    for dtype in ("float32", "bfloat16"):
        memory, disk = both(packed, dtype)
        assert disk.disk_table.is_packed
        assert mx.array_equal(memory(TOKENS), disk(TOKENS))


@pytest.mark.parametrize("stored", [mx.float16, mx.float32])
def test_same_logits_from_other_stored_types(folder, tmp_path, stored):
    copy = tmp_path / "m"
    shutil.copytree(folder, copy)
    checkpoints.rewrite(copy, lambda weights: {n: w.astype(stored) for n, w in weights.items()})
    memory, disk = both(copy)
    assert disk.disk_table.stored_dtype == stored
    assert mx.array_equal(memory(TOKENS), disk(TOKENS))


def test_same_tokens_in_batches_caches_and_chat(folder):
    memory, disk = both(folder)
    padding = [0, 3]
    outputs = []
    for model in (memory, disk):
        cache = model.make_cache(left_padding=padding)
        outputs.append([model(TOKENS[:, :5], cache=cache), model(TOKENS[:, 5:6], cache=cache)])
    assert all(mx.array_equal(a, b) for a, b in zip(*outputs, strict=True))

    (one, tokenizer), (two, _) = load(folder, dtype="float32"), load(folder, dtype="float32", ple="disk")
    answers = []
    for model in (one, two):
        conversation = Chat(model, tokenizer, sampling=Sampling(max_tokens=12, temperature=0))
        answers.append(
            [[repr(e) for e in conversation.stream(q) if not isinstance(e, Done)] for q in ("user", "models")]
        )
    assert answers[0] == answers[1]


def test_decoding_reads_rows_when_tokens_are_known(folder, monkeypatch):
    memory, disk = both(folder)
    prompt = TOKENS[0]
    wanted = [t for t, _ in generate_step(prompt, memory, max_tokens=20)]
    waited = []
    fill = ple_disk.DiskTable._fill
    monkeypatch.setattr(ple_disk.DiskTable, "_fill", lambda *a: (waited.append(1), fill(*a)))
    assert [t for t, _ in generate_step(prompt, disk, max_tokens=20)] == wanted
    assert len(waited) == 19
    # A sampler that may look at what it gets must find rows in place.
    waited.clear()
    looked = lambda logprobs: mx.array([int(mx.argmax(logprobs, axis=-1).item())])  # noqa: E731
    assert [t for t, _ in generate_step(prompt, disk, max_tokens=20, sampler=looked)] == wanted
    assert not waited


def test_rows_not_read_yet_are_nan(folder, tmp_path):
    _, packed = checkpoints.save_packed(folder, tmp_path / "packed", {"group_size": 64, "bits": 4})
    for path in (folder, packed):
        table = load_model(path, dtype="float32", ple="disk").disk_table
        with ple_disk.late():
            early = table(TOKENS)
            assert mx.all(mx.isnan(early)).item()
            late = table(TOKENS)
        assert mx.array_equal(late, table(TOKENS))


def test_a_row_is_read_once_per_call(folder, monkeypatch):
    table = load_model(folder, dtype="float32", ple="disk").disk_table
    sizes = []
    read = ple_disk._Stored.read
    monkeypatch.setattr(
        ple_disk._Stored, "read", lambda self, rows, out: (sizes.append(rows.size), read(self, rows, out))
    )
    assert table(TOKENS).shape == (*TOKENS.shape, table._parts["weight"].width)
    assert sizes == [len(set(TOKENS.reshape(-1).tolist()))]


def test_nothing_of_the_table_is_a_parameter(folder):
    memory, disk = both(folder)
    assert not [n for n, _ in tree_flatten(disk.parameters()) if "embed_tokens_per_layer" in n]
    held = [sum(v.nbytes for _, v in tree_flatten(m.parameters())) for m in (memory, disk)]
    config = disk.text_config
    rows = config.vocab_size_per_layer_input * config.num_hidden_layers * config.hidden_size_per_layer_input
    assert held[0] - held[1] == 4 * rows and disk.disk_table.nbytes == 2 * rows


def test_resident_memory_falls_by_the_table(tmp_path, clean_python):
    """Two processes, one per side, on a table of 101 MB; benchmarks/ple_disk.py has a larger one."""
    folder = tiny.make_tiny(tmp_path / "m", "e4b", dtype="bfloat16")
    raw = json.loads((folder / "config.json").read_text())
    text = raw["text_config"]
    text["vocab_size_per_layer_input"] = rows = 131_072
    (folder / "config.json").write_text(json.dumps(raw))
    width = text["num_hidden_layers"] * text["hidden_size_per_layer_input"]
    name = "model.language_model.embed_tokens_per_layer.weight"
    checkpoints.rewrite(folder, lambda weights: weights | {name: mx.zeros((rows, width), mx.bfloat16)})
    code = """
import resource, sys
from pathlib import Path
import mlx.core as mx
from mlx_gemma4.loading import load_model
model = load_model(sys.argv[1], ple=sys.argv[2], dtype="bfloat16")
mx.eval(model(mx.array([[2, 108, 400, 9]])))
status = Path("/proc/self/status")
if status.exists():
    print(next(int(x.split()[1]) for x in status.read_text().splitlines() if x.startswith("VmRSS:")) * 1024)
else:  # macOS: the peak, in bytes; the table is by far the largest thing here
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    memory, disk = (int(clean_python(code, str(folder), ple)) for ple in ("memory", "disk"))
    assert math.isclose(memory - disk, 2 * rows * width, rel_tol=0.05)


def test_check_reads_the_whole_table(folder, tmp_path):
    assert load_model(folder, ple="disk", check=True).disk_table is not None
    copy = tmp_path / "m"
    shutil.copytree(folder, copy)
    name = "model.language_model.embed_tokens_per_layer.weight"

    def spoil(weights):
        weights[name][-1, -1] = math.nan
        return weights

    checkpoints.rewrite(copy, spoil)
    load_model(copy, ple="disk")
    with pytest.raises(WeightsError) as error:
        load_model(copy, ple="disk", check=True)
    assert "embed_tokens_per_layer" in one_line(error)


@pytest.mark.parametrize("family", ["26b-a4b", "31b"])
def test_models_without_a_table(tmp_path, family):
    folder = tiny.make_tiny(tmp_path / "m", family)
    with pytest.raises(UsageError) as error:
        load_model(folder, ple="disk")
    assert "per-layer" in one_line(error)


def test_errors(folder, tmp_path):
    with pytest.raises(UsageError) as error:
        load(folder, ple="gpu")
    assert "memory, disk" in one_line(error)
    table = load_model(folder, ple="disk").disk_table
    for tokens in ([[table.rows]], [[-1]]):
        with pytest.raises(UsageError) as error:
            table(mx.array(tokens))
        assert str(tokens[0][0]) in one_line(error)
    with pytest.raises(UsageError), ple_disk.late():
        table(mx.array([[table.rows]]))
    assert table(TOKENS).shape[0] == 2  # an error leaves nothing behind

    copy = tmp_path / "m"
    shutil.copytree(folder, copy)
    table = load_model(copy, ple="disk").disk_table
    with (copy / "model.safetensors").open("r+b") as file:
        file.truncate(table._parts["weight"].begin)
    with pytest.raises(WeightsError) as error:
        table(TOKENS)
    assert "shorter" in one_line(error)


def test_a_table_of_another_shape(folder, tmp_path):
    copy = tmp_path / "m"
    shutil.copytree(folder, copy)
    name = "model.language_model.embed_tokens_per_layer.weight"
    checkpoints.rewrite(copy, lambda weights: weights | {name: weights[name][:100]})
    with pytest.raises(WeightsError) as error:
        load_model(copy, ple="disk")
    assert "embed_tokens_per_layer" in one_line(error)
    checkpoints.rewrite(copy, lambda weights: {n: w for n, w in weights.items() if n != name})
    with pytest.raises(WeightsError) as error:
        load_model(copy, ple="disk")
    assert "embed_tokens_per_layer" in one_line(error)


def test_rows_are_the_tables_own_bits(folder):
    table = load_model(folder, dtype="bfloat16", ple="disk").disk_table
    name = "model.language_model.embed_tokens_per_layer.weight"
    plain = mx.load(str(folder / "model.safetensors"))[name]
    assert mx.array_equal(table(TOKENS).view(mx.uint16), plain[TOKENS].view(mx.uint16))
    whole = mx.concatenate(list(table.blocks(100)))
    assert np.array_equal(np.array(whole.view(mx.uint16)), np.array(plain.view(mx.uint16)))


def test_on_the_command_line(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    said = []
    for ple in ("memory", "disk"):
        assert (
            run(["generate", "--model", str(folder), "--ple", ple, "--max-tokens", "8", "--temperature", "0", "hello"])
            == 0
        )
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert run(["generate", "--model", str(folder), "--ple", "gpu", "hello"]) == 2
    assert "memory, disk" in capsys.readouterr().err
    assert run(["info", str(folder)]) == 0
    assert "in model.safetensors; --ple disk" in capsys.readouterr().out
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert run(["info", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["per_layer_embedding_table"] is None
    model = load_model(folder, ple="disk")
    assert any("left in model.safetensors" in line for line in introduction("m", model, {}))
