"""The README does what it says: its commands, its Python, its table, its tree and its links.

Owns nothing of what they do; only that the page and the program agree. `.ci/run` runs the two commands themselves.
"""

import importlib.util
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")
PAGES += ("kernels/README.md", "benchmarks/README.md", "conversions/README.md")


def blocks(*languages: str) -> list[str]:
    """Contents of the fenced blocks in these languages, in order; `""` is a block without one."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [body for language, body in found if language in languages]


def test_the_first_two_shell_blocks_are_the_two_commands():
    first, second = blocks("sh", "bash", "shell", "console")[:2]
    for block in (first, second):
        assert block.count("\n") == 1, "one line each"
        assert block.startswith("python3 -m venv .venv && .venv/bin/pip install "), "works without an environment"
    assert ".venv/bin/gemma4 chat " in first
    assert second.rstrip().endswith("-m pytest -n auto"), "all tests, no selection"
    assert "torch" not in second and "dev" not in second


def test_ci_runs_those_two_commands():
    """`.ci/run` reads them from the README; this is what it reads."""
    shown = subprocess.run([str(ROOT / ".ci" / "run"), "--show"], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines() == [b.strip() for b in blocks("sh")[:2]]


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_examples_run(clean_python, number):
    """As they stand, on the built-in model, in an interpreter of their own."""
    out = clean_python(blocks("python")[number])
    assert len(out.split()) > 3, "an example that shows nothing"


def test_shell_examples_are_commands_that_exist(clean_python):
    """Every `gemma4 word`, and every `--option` of it or alone, in blocks and text, is one the program has."""
    code = "".join(blocks("sh")).splitlines() + re.findall(r"`([^`\n]+)`", README)
    lines = [line.partition("#")[0] for line in code if re.search(r"\bgemma4 [a-z]|^--", line)]
    words = {word for line in lines for word in re.findall(r"\bgemma4 ([a-z][a-z-]+)", line)}
    assert {"chat", "generate", "cache-size", "list", "info"} <= words
    # Wide, so that no option is broken in two.
    helps = (
        "import os, sys; os.environ['COLUMNS'] = '200'; from mlx_gemma4.cli.app import run\n"
        "sys.exit(run(['--help']) or max(run([word, '--help']) for word in sys.argv[1:]))"
    )
    shown = clean_python(helps, *sorted(words))
    options = {option for line in lines for option in re.findall(r"(?:^| )(--[a-z-]+)", line)}
    assert {"--model", "--context", "--debug"} <= options
    assert [o for o in sorted(options) if o not in shown] == []


def test_cache_size_example(clean_python):
    line = next(line for line in "".join(blocks("sh")).splitlines() if line.startswith("gemma4 cache-size"))
    arguments = shlex.split(line, comments=True)[1:]
    out = clean_python("import sys; from mlx_gemma4.cli.app import run; sys.exit(run(sys.argv[1:]))", *arguments)
    assert "26b-a4b" in out and "131,072" in out


def test_memory_table_is_current():
    spec = importlib.util.spec_from_file_location("memory_table", ROOT / "benchmarks" / "memory_table.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.in_readme(README) == module.table(), "run: python -m benchmarks.memory_table --write"
    # One cell by hand. 31B at 32K, global: 10 layers x 4 heads x 512 x 2 bytes = 40,960 bytes a position for one
    # vector; sliding: 50 layers x 2 x 16 heads x 256 x 2 bytes x 1,024 positions.
    one_vector = 40_960 * 32_768 + 50 * 2 * 16 * 256 * 2 * 1024
    row = next(r for r in module.table().splitlines()[::-1] if "one vector" in r)
    assert f"{one_vector / 1e9:.1f} GB" == row.split("|")[4].strip()


def test_the_tree_is_there():
    tree = next(b for b in blocks("") if b.startswith("mlx_gemma4/"))
    missing = []
    for line in tree.splitlines():
        # The name of the row, and files its explanation mentions.
        inside = line.startswith(" ")
        names = re.findall(r"[\w./]+(?:\.py|/)(?=[ ;]|$)", line)
        assert names, line
        parent = ROOT / "mlx_gemma4" if inside else ROOT
        own = parent / names[0]
        for name in names[1:]:
            candidates = (own / name, own.parent / name)
            missing += [name] if not any(c.exists() for c in candidates) else []
        missing += [names[0]] if not own.exists() else []
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    path = ROOT / page
    targets = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    for target in targets:
        if not target.startswith(("https://", "http://", "#")):
            assert (path.parent / target.split("#")[0]).exists(), target


def test_ci_run_is_executable():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
