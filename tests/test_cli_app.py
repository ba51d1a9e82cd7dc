"""The `gemma4` command line from arguments to output and exit code, in this process, on a tiny random model."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from scripted import ScriptedModel
from tiny import make_tiny

from mlx_gemma4 import errors
from mlx_gemma4.cli import app, loader

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny(tmp_path_factory.mktemp("cli") / "tiny", "e2b"))


class Input(io.TextIOWrapper):
    """stdin with these bytes; a terminal if asked."""

    def __init__(self, data: bytes = b"", terminal: bool = False):
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


class Ran:
    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def gemma4(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    def run(*arguments: str, stdin: bytes = b"", terminal: bool = False) -> Ran:
        monkeypatch.setattr(sys, "stdin", Input(stdin, terminal))
        capsys.readouterr()
        code = app.run(list(arguments))
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return run


def one_line(ran: Ran) -> str:
    assert ran.out == ""
    assert ran.err.startswith("gemma4: error: ") and ran.err.count("\n") == 1, ran.err
    return ran.err


def test_generate_streams_the_answer_alone_to_stdout(gemma4, model):
    ran = gemma4("generate", "hello", "--model", model, "--max-tokens", "8", "--seed", "3")
    assert ran.code == 0 and ran.out.endswith("\n") and ran.out.strip() and ran.err == ""
    again = gemma4("generate", "-m", model, "--max-tokens", "8", "--seed", "3", stdin=b"hello\n")
    assert again.out == ran.out, "a prompt is a prompt, from the argument or from stdin"
    other = gemma4("generate", "hello", "-m", model, "--max-tokens", "8", "--seed", "4")
    assert other.out != ran.out


def test_argument_and_stdin_make_one_prompt(gemma4, model):
    both = gemma4("generate", "Sum up:", "-m", model, "--max-tokens", "6", "--seed", "1", stdin=b"a text\n")
    joined = gemma4("generate", "Sum up:\n\na text", "-m", model, "--max-tokens", "6", "--seed", "1")
    assert both.code == 0 and both.out == joined.out


def test_json_is_one_object_with_the_figures(gemma4, model):
    ran = gemma4("generate", "hello", "-m", model, "--max-tokens", "8", "--temperature", "0", "--json")
    record = json.loads(ran.out)
    assert ran.out.count("\n") == 1
    assert record["finish_reason"] == "length" and record["generation_tokens"] == 8
    assert record["context_used"] >= record["prompt_tokens"] > 5 and record["cache_bytes"] > 0
    plain = gemma4("generate", "hello", "-m", model, "--max-tokens", "8", "--temperature", "0")
    assert plain.out.rstrip("\n") == record["text"].rstrip("\n")


def test_raw_has_no_template(gemma4, model):
    raw = json.loads(gemma4("generate", "hello", "-m", model, "--max-tokens", "4", "--raw", "--json").out)
    turns = json.loads(gemma4("generate", "hello", "-m", model, "--max-tokens", "4", "--json").out)
    assert raw["prompt_tokens"] < turns["prompt_tokens"]
    assert raw["finish_reason"] == "length" and raw["generation_tokens"] == 4
    refused = gemma4("generate", "hello", "-m", model, "--raw", "--system", "x")
    assert refused.code == 2 and "--raw" in one_line(refused)


def test_thoughts_stay_out_of_pipes(gemma4, model, monkeypatch):
    from mlx_gemma4.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(model)
    reply = "<|channel>thought\nlet me see<channel|>yes"
    scripted = (ScriptedModel(tokenizer, [reply]), tokenizer)
    monkeypatch.setattr(loader, "open_model", lambda *_, **__: scripted)
    for command in ("generate", "chat"):
        ran = gemma4(command, "hi", "--model", model, "--think", "on", "--temperature", "0")
        assert (ran.code, ran.out) == (0, "yes\n")
        assert "let me see" not in ran.err
    record = json.loads(gemma4("generate", "hi", "--think", "low", "--temperature", "0", "--json").out)
    assert (record["text"], record["thought"]) == ("yes", "let me see")


def test_stats_go_to_stderr(gemma4, model):
    ran = gemma4("generate", "hello", "-m", model, "--max-tokens", "4", "--stats")
    assert re.fullmatch(r"cut at the token limit · prompt \d+ tokens at .*answer 4 tokens.*cache .*B\n", ran.err)


def test_chat_without_a_terminal_is_one_turn(gemma4, model):
    given = gemma4("chat", "hello", "-m", model, "--max-tokens", "5", "--seed", "1", stdin=b"not read")
    piped = gemma4("chat", "-m", model, "--max-tokens", "5", "--seed", "1", stdin=b"hello\n")
    assert given.code == piped.code == 0
    assert given.out == piped.out != ""
    assert given.err.count("\n") == 1 and "context" in given.err, "one line of figures"


def test_sampling_starts_from_the_checkpoint(gemma4, tmp_path):
    folder = make_tiny(tmp_path / "greedy", "e2b")
    (folder / "generation_config.json").write_text('{"do_sample": false, "eos_token_id": [1, 106]}')
    runs = {gemma4("generate", "hello", "-m", str(folder), "--max-tokens", "6").out for _ in range(2)}
    assert len(runs) == 1, "do_sample false is greedy"
    hot = gemma4("generate", "hello", "-m", str(folder), "--max-tokens", "6", "--temperature", "9", "--seed", "1")
    assert hot.out not in runs, "an option goes over it"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["generate"], 2, "no prompt"),
        (["chat"], 2, "nothing to answer"),
        (["generate", "x", "--kv-bits", "3.3"], 2, "--kv-bits takes 16, 4, 3.5, 3, 2.5 or 2, not 3.3"),
        (["chat", "x", "--kv-bits", "0"], 2, "--kv-bits takes 16, 4, 3.5, 3, 2.5 or 2, not 0"),
        (["chat", "x", "--kv-bits", "17"], 2, "--kv-bits takes 16, 4, 3.5, 3, 2.5 or 2, not 17"),
        (["generate", "x", "--kv-bits", "abc"], 2, "--kv-bits takes 16, 4, 3.5, 3, 2.5 or 2, not abc"),
        (["generate", "x", "--kv-key-bits", "1"], 2, "--kv-key-bits takes 16, 4, 3.5, 3, 2.5 or 2, not 1"),
        (["generate", "x", "--kv-bits-sliding", "x"], 2, "--kv-bits-sliding takes 16, 4, 3.5, 3, 2.5 or 2, not x"),
        (["generate", "x", "--kv-value-bits", "4"], 2, "compressed together: give --kv-bits, or --kv-key-bits and"),
        (["generate", "x", "--kv-bits", "4", "--kv-mode", "x"], 2, "--kv-mode takes trellis, pairs or paper, not x"),
        (["generate", "x", "--kv-bits-sliding", "4"], 2, "reaches none of this model"),
        (["cache-size", "--kv-bits", "3.3"], 2, "--kv-bits takes 16, 4, 3.5, 3, 2.5 or 2, not 3.3"),
        (["cache-size", "31b", "--kv-key-bits", "4", "--kv-value-bits", "3"], 2, "one vector for both"),
        (["chat", "x", "--temperature", "-1"], 2, "temperature must be a number at least 0"),
        (["chat", "x", "--top-p", "1.5"], 2, "between 0 and 1"),
        (["chat", "x", "--max-tokens", "0"], 2, "at least 1"),
        (["chat", "x", "--context", "many"], 2, "such as 8192 or 8k"),
        (["chat", "x", "--seed", "x"], 2, "--seed"),
        (["chat", "x", "--dtype", "int8"], 2, "bfloat16, float16, float32"),
        (["chat", "x", "--colour"], 2, "see gemma4 chat --help"),
        (["talk"], 2, "see gemma4 --help"),
        (["chat", "x", "--model", "/no/such/folder"], 3, "no folder /no/such/folder"),
        (["chat", "x", "--model", "e3b"], 3, "did you mean 'e4b'"),
        (["cache-size", "e3b"], 3, "did you mean 'e4b'"),
        (["cache-size", "--context", "8k,x"], 2, "not 'x'"),
        (["cache-size", "e2b", "--context", "256k"], 2, "131,072"),
        (["cache-size", "--dtype", "int8"], 2, "bfloat16"),
    ],
)
def test_bad_input_is_one_line_and_its_exit_code(gemma4, arguments, code, says):
    ran = gemma4(*arguments)
    assert says in one_line(ran)
    assert ran.code == code


def test_prompt_longer_than_the_context(gemma4, model):
    ran = gemma4("generate", "word " * 50, "-m", model, "--context", "40")
    assert ran.code == 1 and "the context holds 40" in one_line(ran)
    ran = gemma4("generate", "hi", "-m", model, "--context", "1m")
    assert ran.code == 2 and "4,096" in one_line(ran)


def test_context_ends_the_answer(gemma4, model):
    record = json.loads(gemma4("generate", "hi", "-m", model, "--context", "30", "--json", "--temperature", "5").out)
    assert record["finish_reason"] == "length" and record["context_limit"] == 30
    assert record["context_used"] == 30


def test_broken_checkpoint_names_the_file(gemma4, tmp_path):
    folder = make_tiny(tmp_path / "cut", "e2b")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    ran = gemma4("chat", "hi", "-m", str(folder))
    assert ran.code == 1 and "model.safetensors" in one_line(ran)


def test_stdin_that_is_not_text(gemma4):
    ran = gemma4("generate", stdin=b"abc\xff")
    assert ran.code == 2 and "not UTF-8 text (byte 3)" in one_line(ran)
    ran = gemma4("generate", os.fsdecode(b"abc\xff"))
    assert ran.code == 2 and "the prompt is not UTF-8" in one_line(ran)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (errors.Gemma4Error("a\n  b"), 1, "gemma4: error: a b\n"),
        (errors.ModelNotFoundError("gone"), 3, "gemma4: error: gone\n"),
        (errors.DoesNotFitError("too big"), 4, "gemma4: error: too big\n"),
        (OSError(28, "No space left on device", "x"), 1, "gemma4: error: [Errno 28] No space left on device: 'x'\n"),
        (ValueError("odd"), 1, "gemma4: error: ValueError: odd; run again with --debug for the traceback\n"),
        (MemoryError(), 1, "gemma4: error: MemoryError; run again with --debug for the traceback\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_each_failure_has_its_line_and_code(gemma4, monkeypatch, error, code, line):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(loader, "open_model", fail)
    ran = gemma4("chat", "hi")
    assert (ran.code, ran.out, ran.err) == (code, "", line)
    if line:
        for arguments in (["chat", "--debug", "hi"], ["--debug", "chat", "hi"]):
            ran = gemma4(*arguments)
            assert ran.code == code and "Traceback" in ran.err and ran.err.endswith(line)
        monkeypatch.setenv("GEMMA4_DEBUG", "1")
        assert "Traceback" in gemma4("chat", "hi").err
        assert "Traceback" not in "".join(line)


def test_model_name_from_the_environment(gemma4, monkeypatch):
    monkeypatch.setenv("GEMMA4_MODEL", "/no/such/model")
    assert "/no/such/model" in gemma4("chat", "hi").err
    assert "/another" in gemma4("chat", "hi", "--model", "/another").err


def test_version_help_and_nothing(gemma4):
    from mlx_gemma4 import __version__

    assert gemma4("--version").out == f"mlx-gemma4 {__version__}\n"
    for arguments in (["--help"], ["-h"], []):
        ran = gemma4(*arguments)
        assert ran.code == 0 and "generate" in ran.out and "cache-size" in ran.out


def test_cache_size_is_the_arithmetic_of_the_published_shapes(gemma4):
    """bf16 bytes from the published tables: producers x heads x width x 2 (K and V; one vector: 1) x positions."""
    table = json.loads(gemma4("cache-size", "--json", "--context", "1k,8k,32k").out)["bytes"]
    assert list(table) == ["e2b", "e4b", "26b-a4b", "31b"]
    for n in (1024, 8192, 32768):
        e2b, e4b, moe, big = (table[name][str(n)] for name in table)
        assert e2b["sliding"] == 12 * 512 * 1 * 256 * 2 * 2
        assert e2b["global"] == 3 * n * 1 * 512 * 2 * 2
        assert e4b["sliding"] == 20 * 512 * 2 * 256 * 2 * 2
        assert e4b["global"] == 4 * n * 2 * 512 * 2 * 2
        assert moe["sliding"] == 25 * 1024 * 8 * 256 * 2 * 2
        assert moe["one-vector"] == 5 * n * 2 * 512 * 2
        assert big["sliding"] == 50 * 1024 * 16 * 256 * 2 * 2
        assert big["one-vector"] == 10 * n * 4 * 512 * 2
        for row in (e2b, e4b, moe, big):
            assert row["total"] == row["sliding"] + row["global"] + row["one-vector"]


def test_cache_size_of_compressed_caches(gemma4):
    """The published shapes at 3.5 bits and full context: what 16 bits would take stands beside it."""
    ran = gemma4("cache-size", "31b", "--kv-bits", "3.5", "--context", "256k", "--json")
    record = json.loads(ran.out)
    big = record["bytes"]["31b"]["262144"]
    assert record["kv_bits"] == {"keys": 3.5, "values": 3.5, "sliding": 16, "mode": "trellis"}
    assert big["one-vector"] == 10 * 4 * ((262144 - 64) * (224 + 56 + 2) + 144 * 512 * 2)
    assert big["sliding"] == 50 * 1024 * 16 * 256 * 2 * 2
    assert big["keys and values apart"] == big["sliding"] + 10 * 262144 * 4 * 512 * 2 * 2
    rings = json.loads(gemma4("cache-size", "31b", "--kv-bits-sliding", "4", "--context", "8k", "--json").out)
    assert rings["bytes"]["31b"]["8192"]["sliding"] == 50 * 16 * (1024 * (2 * 128 + 2) + 128 * 256 * 2 * 2)


def test_kv_bits_on_the_command_line(gemma4, tmp_path, monkeypatch):
    """From option and environment to the cache, in turns and raw; the option goes over the environment."""
    folder = str(make_tiny(tmp_path / "model", "e4b"))

    def bytes_of(*arguments: str) -> int:
        common = ["-m", folder, "--max-tokens", "2", "--temperature", "0", "--json"]
        return json.loads(gemma4("generate", "the model " * 100, *common, *arguments).out)["cache_bytes"]

    plain, two = bytes_of(), bytes_of("--kv-bits", "2")
    assert two < plain and bytes_of("--kv-bits", "16") == plain
    assert two < bytes_of("--kv-key-bits", "4", "--kv-value-bits", "4") < plain
    assert bytes_of("--raw", "--kv-bits", "2", "--kv-mode", "pairs") < bytes_of("--raw")
    monkeypatch.setenv("GEMMA4_KV_BITS", "2")
    assert bytes_of() == two and bytes_of("--kv-bits", "16") == plain
    monkeypatch.setenv("GEMMA4_KV_BITS", "many")
    assert "2.5 or 2, not many" in one_line(gemma4("generate", "x"))


def test_cache_size_in_a_pipe_is_aligned_text(gemma4, model):
    ran = gemma4("cache-size", "26b-a4b", model, "--context", "4k")
    lines = ran.out.splitlines()
    assert lines[0].split() == ["model", "cache", "4,096"]
    assert ["26b-a4b", "sliding", "210", "MB"] in [line.split() for line in lines]
    assert len({len(line) for line in lines}) == 1, "columns line up"
    assert "\x1b" not in ran.out


def test_list_and_info(gemma4, model):
    names = [r["name"] for r in json.loads(gemma4("list", "--json").out)]
    assert names[:4] == ["e2b", "e4b", "26b-a4b", "31b"]
    assert "google/gemma-4-31B-it" in gemma4("list").out
    assert json.loads(gemma4("info", "31b", "--json").out)["layers"] == 60
    assert json.loads(gemma4("info", model, "--json").out)["layers"] == 8
    assert re.search(r"one vector for key and value +yes", gemma4("info", "26b-a4b").out)


def command(*arguments: str, **options) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_gemma4.cli.app", *arguments],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        bufsize=0,
        **options,
    )


def test_ctrl_c_ends_a_one_shot_with_130(model):
    # Greedy, this model says something for all of its 4,096 tokens; sampled, it may stop before it is asked to.
    ran = command("generate", "hi", "-m", model, "--temperature", "0", "--context", "4k")
    assert ran.stdout is not None
    first = ran.stdout.read(20)
    assert first, "the answer has begun"
    ran.send_signal(signal.SIGINT)
    out, err = ran.communicate(timeout=60)
    assert ran.returncode == 130 and err == b""
    (first + out).decode("utf-8")


def test_a_reader_that_leaves_is_no_error(model):
    # Greedy, this model says something for all of its 4,096 tokens; sampled, it may stop before it is asked to.
    ran = command("generate", "hi", "-m", model, "--temperature", "0", "--context", "4k")
    assert ran.stdout is not None and ran.stderr is not None
    ran.stdout.read(10)
    ran.stdout.close()
    end = time.monotonic() + 60
    while ran.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    assert ran.returncode == 1
    assert ran.stderr.read() == b""
    ran.stderr.close()


def test_help_takes_less_than_half_of_mlx_lms():
    """Paired and interleaved, best of two each: a machine that is busy is so for both."""
    ours, theirs = [], []
    for _ in range(2):
        for module, times in (("mlx_gemma4.cli.app", ours), ("mlx_lm.generate", theirs)):
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-m", module, "--help"], capture_output=True, cwd=ROOT, check=True, timeout=120
            )
            times.append(time.perf_counter() - start)
            assert b"--help" in done.stdout
    assert min(ours) < min(theirs) / 2
