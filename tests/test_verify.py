"""`gemma4 verify` and what `gemma4 info` says of a converted folder; the command `convert` as people type it."""

import json

import mlx.core as mx
import pytest
import tiny
from checkpoints import one_line

from mlx_gemma4.cli.app import run
from mlx_gemma4.conversions.convert import convert
from mlx_gemma4.conversions.verify import verify
from mlx_gemma4.errors import Gemma4Error


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.make_tiny(tmp_path_factory.mktemp("hf") / "e4b", "e4b", dtype="bfloat16", towers=True)


@pytest.fixture
def model(source, tmp_path):
    convert(source, tmp_path / "mlx", 4)
    return tmp_path / "mlx"


def test_a_sound_folder(model, capsys):
    assert [name for name, _ in verify(model)] == ["files", "tensors", "values", "token"]
    assert run(["verify", str(model)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{model} is sound"
    assert run(["verify", str(model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sound"] is True
    assert [name for name, _ in verify(model, quick=True)] == ["files", "tensors"]


def test_a_folder_without_a_record_says_so(source):
    assert next(verify(source))[1].startswith("no conversion.json")
    assert len(list(verify(source))) == 4


def flip(path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def test_what_is_not_sound_is_one_line(model, capsys):
    weights = model / "model.safetensors"
    original = weights.read_bytes()

    def unsound(*words: str, quick: bool = False) -> None:
        with pytest.raises(Gemma4Error) as error:
            list(verify(model, quick=quick))
        for word in words:
            assert word in one_line(error)
        assert run(["verify", str(model), *(["--quick"] if quick else [])]) == 1
        assert capsys.readouterr().err.count("\n") == 1

    flip(weights, len(original) // 2)
    unsound("model.safetensors", "changed since")
    list(verify(model, quick=True))  # a bit in a weight is not its business
    weights.write_bytes(original[:-10])
    unsound("bytes, not the", quick=True)
    weights.unlink()
    unsound("missing", quick=True)
    weights.write_bytes(original)
    (model / "conversion.json").write_text("{")
    unsound("conversion.json is damaged")
    (model / "conversion.json").unlink()
    arrays = dict(mx.load(str(weights)))
    mx.eval(arrays)
    norm = "language_model.model.layers.1.input_layernorm.weight"
    tiny.write_shards(model, arrays | {norm: arrays[norm] * float("nan")}, format="mlx")
    unsound("NaN", norm)
    tiny.write_shards(model, {k: v for k, v in arrays.items() if k != norm}, format="mlx")
    (model / "model.safetensors.index.json").unlink()
    unsound("lacks 1 tensor", quick=True)


def test_info_says_what_was_converted_and_how(model, capsys):
    assert run(["info", str(model), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["converted"]
    assert "from e4b" in said and "recipe 4bit" in said
    assert run(["info", "demo"]) == 0
    assert "converted" in capsys.readouterr().out


def test_the_command_in_its_three_voices(source, tmp_path, capsys):
    assert run(["convert", str(source), "--to", str(tmp_path / "a"), "--bits", "6"]) == 0
    shown = capsys.readouterr()
    assert "gemma4 chat --model" in shown.out and "converting" in shown.err and "\x1b" not in shown.err
    assert run(["convert", str(source), "--to", str(tmp_path / "b"), "--quiet"]) == 0
    shown = capsys.readouterr()
    assert shown.out == shown.err == ""
    assert run(["convert", str(source), "--to", str(tmp_path / "c"), "--json"]) == 0
    shown = capsys.readouterr()
    lines = [json.loads(line) for line in shown.out.splitlines()]
    assert {s["stage"] for s in lines} == {"convert", "verify", "done"} and shown.err == ""
    whole = [s for s in lines if s["stage"] == "convert"][-1]
    assert whole["bytes"] == whole["of"] and whole["tensors"] == whole["of_tensors"] and "seconds_left" in whole


def test_dry_run_writes_nothing(source, tmp_path, capsys):
    assert run(["convert", str(source), "--dry-run", "--recipe", "mixed-4-6"]) == 0
    table = capsys.readouterr().out
    assert "per-layer embedding table" in table and "6-bit affine" in table and "files:" in table
    assert run(["convert", "demo", "--dry-run"]) == 0
    assert not list(tmp_path.iterdir())


def test_dry_run_of_a_target(tmp_path, capsys):
    """What a calibration is allowed, from headers alone."""
    source = tiny.make_tiny(tmp_path / "e4b", "e4b", dtype="bfloat16", towers=True, max_position_embeddings=131_072)
    wanted = ["--target-bits", "8"]
    assert run(["convert", str(source), "--dry-run", *wanted]) == 0
    table = capsys.readouterr().out
    assert "bits from" in table and "files: at most" in table and "8.00 bits per parameter" in table
    assert "found by the calibration" in table and "this dry run reads none" in table
    assert run(["convert", str(source), "--dry-run", *wanted, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    by_name = {g["name"]: g for g in record["groups"]}
    assert by_name["mlp down"]["least_bits"] < 3 and by_name["mlp down"]["most_bits"] == 16
    norms, tower = by_name["norms and scalars"], by_name["vision tower"]
    assert norms["least_bits"] == norms["most_bits"] and tower["least_bytes"] == tower["most_bytes"]
    assert sum(g["least_bytes"] for g in record["groups"]) < record["tensor_bytes_at_most"]
    assert sum(g["most_bytes"] for g in record["groups"]) > record["tensor_bytes_at_most"]
    assert set(record["resident_bytes_at_most"]) == {"8192", "32768", "131072"}
    assert all(set(row) == {"16", "3.5"} for row in record["resident_bytes_at_most"].values())
    size = record["file_bytes_at_most"]
    assert run(["convert", str(source), "--dry-run", "--target-size", str(size), "--json"]) == 0
    sized = json.loads(capsys.readouterr().out)
    assert sized["file_bytes_at_most"] <= size and "at_most" in " ".join(sized)
    assert run(["convert", str(source), "--dry-run", "--target-bits", "1.1"]) == 2
    assert "ask for more" in capsys.readouterr().err
    assert run(["convert", str(source), "--dry-run", "--calibrate", "x.txt"]) == 2
    assert "--target-bits" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["e4b"]


def test_the_size_of_a_target_is_kept(tmp_path, capsys, monkeypatch):
    import numpy as np

    from mlx_gemma4.conversions import calibrate

    folder = tiny.make_tiny(tmp_path / "hf", "31b", dtype="bfloat16", layer_types=["full_attention"])
    monkeypatch.setattr(calibrate, "token_rows", lambda *_: np.arange(20, 36).reshape(2, 8))
    for wanted in (["--target-bits", "5.1"], ["--target-size", "120kB"]):
        assert run(["convert", str(folder), "--dry-run", *wanted, "--json"]) == 0
        most = json.loads(capsys.readouterr().out)
        target = tmp_path / wanted[0]
        assert run(["convert", str(folder), "--to", str(target), *wanted, "--quiet"]) == 0
        made = (target / "model.safetensors").stat().st_size
        assert 0.9 * most["file_bytes_at_most"] < made <= most["file_bytes_at_most"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "--to"),
        (["--to", "x", "--bits", "7"], 2, "allowed are 2, 3"),
        (["--to", "x", "--recipe", "none.toml"], 2, "no recipe"),
        (["--dry-run", "--upload", "a/b"], 2, "--upload"),
        (["--to", "x", "--bits", "many"], 2, "--bits"),
    ],
)
def test_wrong_use_of_the_command(source, tmp_path, monkeypatch, capsys, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    assert run(["convert", str(source), *arguments]) == code
    errors = capsys.readouterr().err
    assert words in errors and errors.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_bar_of_a_terminal(monkeypatch):
    """Drawn from any steps, also when sizes are unknown."""
    import io

    from mlx_gemma4.cli.tui import conversion
    from mlx_gemma4.conversions.convert import Step

    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    bar = conversion.meter(quiet=False, as_json=False)
    assert isinstance(bar, conversion.Bar)
    for step in (
        Step("note", text="going on"),
        Step("convert", 0, 100, 0, 4),
        Step("convert", 100, 100, 4, 4),
        Step("verify", 5, 10),
        Step("upload", text="owner/name"),
    ):
        bar(step)
    bar.close()
    assert "going on" in screen.getvalue() and "converting" in screen.getvalue()
