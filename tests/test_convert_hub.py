"""From the real Hub client to a converted model and back: ranges, shards a step ahead, cuts, freeing, upload.

Every case runs in a process of its own, because the client reads its environment when it is imported.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
import tiny
from hub_server import Hub, environment
from test_convert_q4_0 import qat

from mlx_gemma4.conversions.convert import convert

ROOT = Path(__file__).parent.parent
REPO = "someone/tiny-gemma"
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Large enough that a shard takes several pieces, with a table that makes the middle shard the longest."""
    made = tiny.make_tiny(
        tmp_path_factory.mktemp("hf") / "e2b", "e2b", dtype="bfloat16", vocab_size_per_layer_input=4096
    )
    weights = dict(mx.load(str(made / "model.safetensors")))
    mx.eval(weights)
    (made / "model.safetensors").unlink()
    tiny.write_shards(made, weights, 3)
    (made / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return made


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("local") / "mlx"
    convert(folder, target, 4)
    return files_of(target)


@pytest.fixture
def hub(folder):
    with Hub() as server:
        server.repo(REPO, files_of(folder))
        yield server


@pytest.fixture
def gemma4(hub, tmp_path):
    """gemma4(*arguments) -> the finished process, with its own HF_HOME and no token."""

    def command(*arguments, prelude="", **more):
        keep = environment(tmp_path, hub.url, PYTHONPATH=str(ROOT), HF_HUB_DISABLE_XET="1", **more)
        code = f"import sys\n{prelude}\nfrom mlx_gemma4.cli.app import run\nsys.exit(run(sys.argv[1:]))"
        return [sys.executable, "-c", code, *map(str, arguments)], {
            "env": keep,
            "text": True,
            "stdin": subprocess.DEVNULL,
        }

    def run(*arguments, **options):
        argv, settings = command(*arguments, **options)
        return subprocess.run(argv, capture_output=True, timeout=120, **settings)

    run.command = command
    return run


def ok(done) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def failed(done, code: int, *words: str) -> None:
    lines = done.stderr.strip().splitlines()
    assert done.returncode == code and lines[-1].startswith("gemma4: error: "), done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[-1], lines[-1]


def same_model(target: Path, expected: dict[str, bytes]) -> None:
    """The files of a conversion from a folder; only the record and the card name another source."""
    found = files_of(target)
    assert found.keys() == expected.keys()
    for name in expected:
        if name not in ("conversion.json", "README.md"):
            assert found[name] == expected[name], name


def blobs(tmp_path: Path) -> int:
    """Bytes of weights in the cache."""
    return sum(p.stat().st_size for p in (tmp_path / "hf").rglob("blobs/*") if p.stat().st_size > 100_000)


def test_dry_run_reads_headers_only(hub, gemma4, tmp_path, folder):
    record = json.loads(ok(gemma4("convert", REPO, "--dry-run", "--bits", "4", "--json")).splitlines()[-1])
    assert record["files"] == 1 and record["file_bytes"] > 100_000
    fetched = {name: sum(r.sent for r in hub.fetched(name)) for name in SHARDS}
    assert all(0 < sent <= 100_001 for sent in fetched.values()), fetched
    assert sum((folder / n).stat().st_size for n in SHARDS) > 10 * sum(fetched.values())
    assert blobs(tmp_path) == 0
    table = ok(gemma4("convert", REPO, "--dry-run"))
    assert "to download" in table and "per-layer embedding table" in table


# A calibration on so few tokens that it takes no time.
FEW_TOKENS = """
import numpy as np
from mlx_gemma4.conversions import calibrate
calibrate.token_rows = lambda *_: np.random.default_rng(1).integers(3, 500, (2, 8))
"""


def test_dry_run_of_a_target_reads_headers_only(hub, gemma4, tmp_path):
    record = json.loads(ok(gemma4("convert", REPO, "--dry-run", "--target-bits", "5", "--json")).splitlines()[-1])
    assert record["chosen_by"] == "calibration" and record["tensor_bytes_at_most"] > 100_000
    assert all(0 < sum(r.sent for r in hub.fetched(name)) <= 100_001 for name in SHARDS)
    assert blobs(tmp_path) == 0


def test_a_target_from_the_hub(hub, gemma4, tmp_path):
    """Downloaded as a whole, each shard once; killed and taken up; freed at the end, and the bytes of a folder's."""
    kinds = ["sliding_attention", "full_attention"]
    folder = tiny.make_tiny(tmp_path / "two", "31b", dtype="bfloat16", shards=2, layer_types=kinds)
    hub.repo("someone/two", files_of(folder))
    arguments = ("--target-bits", "5", "--quiet")
    ok(gemma4("convert", folder, "--to", tmp_path / "local", *arguments, prelude=FEW_TOKENS))
    argv, settings = gemma4.command(
        "convert", "someone/two", "--to", tmp_path / "mlx", *arguments, "--delete-source", prelude=FEW_TOKENS
    )
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, **settings)
    journal, deadline = tmp_path / ".mlx.calibration" / "journal.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline and not (journal.exists() and journal.read_text().count('"file"') > 12):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert journal.exists() and list((tmp_path / "hf").rglob("snapshots/*/*.safetensors"))
    ok(gemma4("convert", "someone/two", "--to", tmp_path / "mlx", *arguments, "--delete-source", prelude=FEW_TOKENS))
    same_model(tmp_path / "mlx", files_of(tmp_path / "local"))
    assert not journal.parent.exists() and not list((tmp_path / "hf").rglob("snapshots/*/*.safetensors"))
    length = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    headers = 4 * 100_001  # of two shards, by two runs
    assert length <= sum(r.sent for r in hub.fetched(".safetensors")) < 1.2 * length + headers


def test_the_size_promised_is_the_size_made(hub, gemma4, tmp_path, expected):
    record = json.loads(ok(gemma4("convert", REPO, "--dry-run", "--json")).splitlines()[-1])
    assert record["file_bytes"] == len(expected["model.safetensors"])


def test_from_the_hub(hub, gemma4, tmp_path, expected):
    ok(gemma4("convert", REPO, "--to", tmp_path / "mlx", "--bits", "4", "--quiet"))
    same_model(tmp_path / "mlx", expected)
    card = (tmp_path / "mlx" / "README.md").read_text()
    assert f"base_model: {REPO}" in card and "license: apache-2.0" in card
    record = json.loads((tmp_path / "mlx" / "conversion.json").read_text())
    assert record["source"] == {"name": REPO, "commit": hub.repos[REPO].names["main"]}
    assert blobs(tmp_path) > 0  # without --delete-source the download stays


def test_converting_begins_while_the_next_shard_comes(hub, gemma4, tmp_path, expected):
    hub.chunk_delay = 0.02
    lines = ok(gemma4("convert", REPO, "--to", tmp_path / "mlx", "--bits", "4", "--json")).splitlines()
    steps = [json.loads(line) for line in lines]
    last_download = max(i for i, s in enumerate(steps) if s["stage"] == "download")
    assert any(s["stage"] == "convert" and s["tensors"] > 5 for s in steps[:last_download])
    same_model(tmp_path / "mlx", expected)


def test_cut_every_200_kb(hub, gemma4, tmp_path, expected):
    hub.cut_every = 200_000
    no_sleep = "import time; time.sleep = lambda s: None"  # between the client's retries
    ok(gemma4("convert", REPO, "--to", tmp_path / "mlx", "--bits", "4", "--quiet", prelude=no_sleep))
    same_model(tmp_path / "mlx", expected)
    assert len(hub.fetched(SHARDS[0])) > 2


def test_a_lost_connection_keeps_what_is_done(hub, gemma4, tmp_path, expected):
    hub.cut_after, hub.refuse_after_cut = 400_000, True
    no_sleep = "import time; time.sleep = lambda s: None"
    hub.chunk_delay = 0.005
    done = gemma4("convert", REPO, "--to", tmp_path / "mlx", "--bits", "4", prelude=no_sleep)
    failed(done, 1, "connection was lost")
    assert not (tmp_path / "mlx").exists()
    hub.refusing = False
    ok(gemma4("convert", REPO, "--to", tmp_path / "mlx", "--bits", "4", "--quiet"))
    same_model(tmp_path / "mlx", expected)


def test_delete_source_frees_what_it_downloaded(hub, gemma4, tmp_path, expected):
    ok(gemma4("convert", REPO, "--to", tmp_path / "mlx", "--bits", "4", "--delete-source", "--quiet"))
    same_model(tmp_path / "mlx", expected)
    assert blobs(tmp_path) == 0 and not list((tmp_path / "hf").rglob("snapshots/*/*.safetensors"))
    # What was in the cache before stays there.
    ok(gemma4("convert", REPO, "--to", tmp_path / "again", "--bits", "8", "--quiet"))
    held = blobs(tmp_path)
    assert held > 0
    ok(gemma4("convert", REPO, "--to", tmp_path / "third", "--bits", "4", "--delete-source", "--quiet"))
    assert blobs(tmp_path) == held
    same_model(tmp_path / "third", expected)


def test_killed_and_taken_up_with_delete_source(hub, gemma4, tmp_path, expected):
    arguments = ("convert", REPO, "--to", tmp_path / "mlx", "--bits", "4", "--delete-source", "--quiet")
    hub.chunk_delay = 0.02
    argv, settings = gemma4.command(*arguments)
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, **settings)
    journal, deadline = tmp_path / ".mlx.partial" / "journal.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline and not (journal.exists() and journal.read_text().count('"item"') > 40):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    hub.chunk_delay = 0.0
    first = len(hub.fetched(SHARDS[0]))
    ok(gemma4(*arguments))
    same_model(tmp_path / "mlx", expected)
    assert blobs(tmp_path) == 0
    assert first >= 1


def test_a_family_name_a_gated_and_a_missing_repository(hub, gemma4, tmp_path):
    hub.repos[REPO].tokens = {"secret"}
    failed(gemma4("convert", REPO, "--to", tmp_path / "mlx"), 3, "gated")
    ok(gemma4("convert", REPO, "--to", tmp_path / "mlx", "--quiet", HF_TOKEN="secret"))
    failed(gemma4("convert", "someone/none", "--to", tmp_path / "b"), 3, "someone/none")
    failed(gemma4("convert", f"{REPO}@nowhere", "--to", tmp_path / "b", HF_TOKEN="secret"), 3, "nowhere")
    failed(gemma4("convert", "e3b", "--to", tmp_path / "b"), 3, "e2b")
    assert not (tmp_path / "b").exists()


def test_no_gemma_on_the_hub(hub, gemma4, tmp_path):
    hub.repo(
        "someone/llama", {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"\x02" + bytes(7) + b"{}"}
    )
    failed(gemma4("convert", "someone/llama", "--to", tmp_path / "mlx"), 1, "llama", "gemma4")
    hub.repo("someone/broken", {"config.json": b"{}", "model.safetensors": b"\xff" * 64})
    failed(gemma4("convert", "someone/broken", "--to", tmp_path / "mlx"), 1, "damaged")


def test_offline_from_a_complete_copy(hub, gemma4, tmp_path, expected):
    ok(gemma4("convert", REPO, "--to", tmp_path / "a", "--bits", "8", "--quiet"))
    ok(gemma4("convert", REPO, "--to", tmp_path / "b", "--bits", "4", "--quiet", HF_HUB_OFFLINE="1"))
    same_model(tmp_path / "b", expected)


def test_upload(hub, gemma4, tmp_path, expected):
    target = ("--to", tmp_path / "mlx", "--upload", "someone/made")
    ok(gemma4("convert", REPO, *target, "--bits", "4", "--quiet", HF_TOKEN="secret"))
    repo = hub.repos["someone/made"]
    assert repo.commits[repo.names["main"]] == files_of(tmp_path / "mlx")
    same_model(tmp_path / "mlx", expected)
    # What was uploaded loads from the Hub.
    out = ok(gemma4("generate", "-m", "someone/made", "--max-tokens", "2", "hello"))
    assert isinstance(out, str)


def test_upload_without_a_token_keeps_the_model(hub, gemma4, tmp_path, expected):
    done = gemma4("convert", REPO, "--to", tmp_path / "mlx", "--bits", "4", "--upload", "someone/made", "--quiet")
    failed(done, 3, "token", "HF_TOKEN")
    same_model(tmp_path / "mlx", expected)


def test_the_lattice_is_looked_for_after_the_download(hub, gemma4, tmp_path):
    """Each shard comes once, though it is read twice, and is freed once it is used."""
    folder, _ = qat(tmp_path / "qat")
    hub.repo("someone/qat", files_of(folder))
    ok(gemma4("convert", "someone/qat", "--to", tmp_path / "mlx", "--recipe", "q4_0", "--delete-source", "--quiet"))
    convert(folder, tmp_path / "local", recipe="q4_0")
    same_model(tmp_path / "mlx", files_of(tmp_path / "local"))
    length = (folder / "model.safetensors").stat().st_size
    assert length <= sum(r.sent for r in hub.fetched("model.safetensors")) < 1.7 * length
    assert blobs(tmp_path) == 0


def test_a_folder_of_the_users_is_never_freed(gemma4, tmp_path, folder):
    before = files_of(folder)
    ok(gemma4("convert", folder, "--to", tmp_path / "mlx", "--delete-source", "--quiet"))
    assert files_of(folder) == before
