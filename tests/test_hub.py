"""The real Hub client against a Hub of our own: what is fetched, what is kept, and what each failure says.

Every case runs in a process of its own, because the client reads HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE
when it is imported, and because that is how users set them.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hub_server import Hub, environment

ROOT = Path(__file__).parent.parent
REPO = "someone/tiny-gemma"
# More than the client's pieces of 10 MB, so that a cut leaves something to go on from.
WEIGHTS = np.arange(6 << 20, dtype=np.uint32).tobytes()
SMALL = {"config.json": b"{}", "tokenizer.json": b'{"a": 1}', "generation_config.json": b"[]"}

DOWNLOAD = """
import sys
{prelude}
from mlx_gemma4.conversions.hub import download
from mlx_gemma4.errors import Gemma4Error
try:
    print(download(sys.argv[1], sys.argv[2] or None, **{arguments}))
except Gemma4Error as e:
    print(f"{{type(e).__name__}}: {{e}}", file=sys.stderr)
    sys.exit(e.exit_code)
"""


@pytest.fixture
def hub():
    with Hub() as server:
        server.repo(REPO, {**SMALL, "model.safetensors": WEIGHTS})
        yield server


@pytest.fixture
def get(hub, tmp_path):
    """get(repo, revision) -> the finished process, run with its own HF_HOME and no token."""

    def command(repo=REPO, revision="", prelude="", arguments="{}", **env):
        keep = environment(tmp_path, hub.url, **env)
        code = DOWNLOAD.format(prelude=prelude, arguments=arguments)
        return [sys.executable, "-c", code, repo, revision], {"env": keep, "cwd": ROOT, "text": True}

    def run(*args, **kwargs):
        argv, options = command(*args, **kwargs)
        return subprocess.run(argv, capture_output=True, timeout=60, **options)

    run.command = command
    return run


def folder(done: subprocess.CompletedProcess) -> Path:
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def failed(done: subprocess.CompletedProcess, kind: str, *words: str) -> str:
    """Asserts one line on stderr of the given error, with these words and its exit code; returns the line."""
    code = {"ModelNotFoundError": 3, "DoesNotFitError": 4, "UsageError": 2, "Gemma4Error": 1}[kind]
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == code and line.startswith(kind + ": "), done.stderr
    assert not any("Traceback" in text for text in done.stderr.splitlines()), done.stderr
    for word in words:
        assert word in line, line
    return line


def leftovers(tmp_path: Path) -> list[str]:
    return [p.name for p in (tmp_path / "hf").rglob("*.incomplete")]


def test_only_what_a_model_needs_is_fetched(hub, get):
    extra = [
        "model.gguf",
        "pytorch_model.bin",
        "original/model.safetensors",
        "consolidated.safetensors",
        "README.md",
    ]
    wanted = {
        **SMALL,
        "model-00001-of-00002.safetensors": WEIGHTS[:1000],
        "model-00002-of-00002.safetensors": WEIGHTS[:2000],
        "model.safetensors.index.json": b"{}",
        "tokenizer_config.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "processor_config.json": b"{}",
    }
    hub.repo("someone/many", {**wanted, **dict.fromkeys(extra, b"not wanted")})
    found = folder(get("someone/many"))
    assert {p.name: p.read_bytes() for p in found.iterdir()} == wanted
    assert not [r.path for r in hub.fetched() if any(name in r.path for name in extra)]


def test_second_time_comes_from_the_cache(hub, get):
    first = folder(get())
    count = len(hub.fetched())
    assert folder(get()) == first
    assert len(hub.fetched()) == count
    hub.requests.clear()
    assert folder(get(HF_HUB_OFFLINE="1")) == first
    assert hub.requests == []
    assert (first / "model.safetensors").read_bytes() == WEIGHTS


def test_a_complete_copy_serves_while_the_hub_is_down(hub, get):
    first = folder(get())
    hub.broken_with = 503
    assert folder(get()) == first


def test_revisions_are_kept_apart(hub, get):
    repo = hub.repos[REPO]
    old = repo.names["main"]
    repo.commit({**SMALL, "config.json": b'{"v": 2}', "model.safetensors": WEIGHTS}, "v2")
    main, v2, pinned = folder(get()), folder(get(REPO, "v2")), folder(get(REPO, old))
    assert main == pinned != v2
    assert (v2 / "config.json").read_bytes() == b'{"v": 2}' and (main / "config.json").read_bytes() == b"{}"
    assert len(hub.fetched("model.safetensors")) == 1  # the same bytes are not fetched twice


def test_a_cut_connection_is_taken_up_where_it_broke(hub, get):
    hub.cut_after = 14 << 20
    found = folder(get())
    assert (found / "model.safetensors").read_bytes() == WEIGHTS
    first, second = hub.fetched("model.safetensors")
    assert (first.start, first.sent) == (0, 14 << 20)
    assert 0 < second.start <= first.sent and second.start + second.sent == len(WEIGHTS)


NO_SLEEP = "import time; time.sleep = lambda s: None"  # between the client's retries


def test_a_lost_connection_says_so_and_the_next_run_goes_on(hub, get, tmp_path):
    shards = {f"model-0000{i}-of-00002.safetensors": WEIGHTS[: 1000 if i == 1 else None] for i in (1, 2)}
    hub.repo(REPO, {**SMALL, **shards})
    hub.cut_after, hub.refuse_after_cut = 12 << 20, True
    failed(get(prelude=NO_SLEEP), "Gemma4Error", "connection was lost", REPO, "run the same command again")
    assert leftovers(tmp_path) == []
    kept = {r.path for r in hub.fetched() if r.sent != 12 << 20}
    hub.refusing = hub.refuse_after_cut = False
    hub.requests.clear()
    found = folder(get())
    assert (found / "model-00002-of-00002.safetensors").read_bytes() == WEIGHTS
    assert kept and not kept & {r.path for r in hub.fetched()}


def test_unreachable_and_never_downloaded(get):
    line = failed(get(HF_ENDPOINT="http://127.0.0.1:9", prelude=NO_SLEEP), "ModelNotFoundError", "cannot reach")
    assert "http://127.0.0.1:9" in line and REPO in line


def test_offline_and_not_in_the_cache(hub, get):
    failed(get(HF_HUB_OFFLINE="1"), "ModelNotFoundError", "HF_HUB_OFFLINE", f"{REPO} is not in the cache")
    assert hub.requests == []


def test_offline_with_half_a_copy(hub, get):
    (folder(get()) / "model.safetensors").unlink()
    failed(get(HF_HUB_OFFLINE="1"), "ModelNotFoundError", f"{REPO} is only partly in the cache")


def test_gated(hub, get):
    hub.repos[REPO].tokens = {"hf_good"}
    failed(get(), "ModelNotFoundError", f"{REPO} is gated", f"{hub.url}/{REPO}", "HF_TOKEN")
    failed(get(HF_TOKEN="hf_bad"), "ModelNotFoundError", "your token has no access", f"{hub.url}/{REPO}")
    assert not hub.fetched()
    folder(get(HF_TOKEN="hf_good"))
    # The token goes to the Hub, not on to the host that stores the weights.
    assert {r.token for r in hub.fetched(".json")} == {"hf_good"}
    assert {r.token for r in hub.fetched(".safetensors")} == {None}


def test_a_token_given_by_the_caller_is_used(hub, get):
    hub.repos[REPO].tokens = {"hf_mine"}
    folder(get(arguments="dict(token='hf_mine')"))


def test_no_such_repository(hub, get):
    failed(get("someone/nothing"), "ModelNotFoundError", "no such repository", "set HF_TOKEN")
    failed(get("someone/nothing", HF_TOKEN="hf_x"), "ModelNotFoundError", "hidden from your token")


def test_no_such_revision(hub, get):
    failed(get(REPO, "v9"), "ModelNotFoundError", f"{REPO} has no revision 'v9'")


def test_not_a_repository_id(get):
    failed(get("some one/a b"), "UsageError", "owner/name")


def test_a_repository_without_a_model(hub, get):
    hub.repo("someone/gguf", {"config.json": b"{}", "model-q4.gguf": b"x"})
    hub.repo("someone/data", {"README.md": b"x"})
    failed(get("someone/gguf"), "ModelNotFoundError", "no model*.safetensors", "GGUF")
    failed(get("someone/data"), "ModelNotFoundError", "no config.json")
    assert not hub.fetched()


def test_the_hub_is_out_of_order(hub, get):
    hub.broken_with = 503
    failed(get(prelude=NO_SLEEP), "Gemma4Error", "answered 503", REPO)


def test_something_else_answers(hub, get):
    hub.broken_with = 200  # a login page, say
    failed(get(), "Gemma4Error", "does not answer as a Hub does", "HF_ENDPOINT")


SMALL_DISK = """
import shutil
from collections import namedtuple
shutil.disk_usage = lambda path: namedtuple("usage", "total used free")(10**9, 10**9 - 10**6, 10**6)
"""


def test_too_little_disk_is_told_before_the_first_byte(hub, get):
    line = failed(get(prelude=SMALL_DISK), "DoesNotFitError", REPO, "HF_HOME")
    assert "25.2 MB" in line and "1.0 MB free" in line
    assert not hub.fetched()


# The client's temporary file becomes /dev/full, where writing fails as on a full disk.
FULL_DISK = """
from pathlib import Path
plain = Path.open
def full(self, mode="r", *args, **kwargs):
    if not self.name.endswith(".incomplete"):
        return plain(self, mode, *args, **kwargs)
    plain(self, mode).close()
    return open("/dev/full", mode)
Path.open = full
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is of Linux: runs there")
def test_a_disk_that_fills_up_on_the_way(hub, get, tmp_path):
    failed(get(prelude=FULL_DISK), "DoesNotFitError", "disk filled up", REPO, "complete files are kept")
    blobs = [p for p in (tmp_path / "hf").rglob("blobs/*")]
    assert blobs == [] and leftovers(tmp_path) == []
    assert (folder(get()) / "model.safetensors").read_bytes() == WEIGHTS


def test_progress_goes_up_to_the_whole(hub, get):
    # One write per line: several threads report.
    done = get(arguments="dict(progress=lambda d, t: sys.stderr.write(f'{d} {t}\\n'))")
    folder(done)
    seen = [tuple(map(int, line.split())) for line in done.stderr.splitlines()]
    total = len(WEIGHTS) + sum(map(len, SMALL.values()))
    assert {t for _, t in seen} == {total}
    assert seen[-1][0] == total and [d for d, _ in seen] == sorted(d for d, _ in seen) and len(seen) > 3


def test_what_the_callback_raises_comes_out(get, tmp_path):
    done = get(arguments="dict(progress=lambda d, t: 1 / 0)")
    assert done.returncode == 1 and done.stderr.strip().endswith("ZeroDivisionError: division by zero")
    assert leftovers(tmp_path) == []


def test_without_a_terminal_nothing_is_drawn(get):
    done = get()
    assert folder(done) and done.stderr == ""


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo terminals on Windows: runs on macOS and Linux")
def test_on_a_terminal_one_line_is_drawn(hub, get, tmp_path):
    import pty

    hub.chunk_delay = 0.001
    for quiet in ("0", "1"):
        argv, options = get.command(HF_HUB_DISABLE_PROGRESS_BARS=quiet, HF_HOME=str(tmp_path / quiet))
        master, slave = pty.openpty()
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=slave, **options)
        os.close(slave)
        drawn = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while piece := os.read(master, 4096):
                drawn += piece
        os.close(master)
        drawn = drawn.decode().replace("\r\n", "\n")
        assert process.wait(60) == 0
        process.stdout.close()
        if quiet == "1":
            assert drawn == ""
        else:
            assert "tiny-gemma  " in drawn and "25.2 MB of 25.2 MB  100 %" in drawn
            assert drawn.count("\n") == 1 and drawn.endswith("\n")


def test_ctrl_c_ends_a_long_transfer(hub, get, tmp_path):
    hub.chunk_delay = 0.02  # 384 pieces: about 8 seconds
    argv, options = get.command()
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    deadline = time.monotonic() + 30
    while not list((tmp_path / "hf").rglob("*.incomplete")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, stderr = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in stderr
    assert time.monotonic() - started < 6  # the piece of 10 MB in flight, not the file
    assert leftovers(tmp_path) == []
