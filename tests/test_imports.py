"""What importing and running this package loads, each in an interpreter of its own.

Owns the promise that the heavy peers stay out: mlx-lm costs a second at import and mlx-vlm a gigabyte on disk, and
neither may be on the way from a command to an answer.
"""

import ast
from pathlib import Path

import pytest
from tiny import make_tiny

import mlx_gemma4

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("transformers", "mlx_lm", "mlx_vlm", "torch")
# What is not ready within a few hundredths of a second.
SLOW = (*PEERS, "mlx", "numpy", "huggingface_hub", "tokenizers", "jinja2", "prompt_toolkit")

LOADED = """
def loaded(names):
    import sys
    return sorted(n for n in names.split(",") if n in sys.modules)
"""


def test_the_probe_sees_a_module(clean_python):
    """Without this, a typing error in the other tests' probe would pass them all."""
    out = clean_python(LOADED + "import json, sys, xml.dom; print(loaded('json,xml.dom,mailbox'))")
    assert out.strip() == "['json', 'xml.dom']"


def test_import_loads_nothing_heavy(clean_python):
    out = clean_python(LOADED + "import sys, mlx_gemma4; print(loaded(sys.argv[1]))", ",".join(SLOW))
    assert out.strip() == "[]"


COMMANDS = ("chat", "generate", "detect", "convert", "verify", "cache-size", "kv-check", "info", "list")


@pytest.mark.parametrize("arguments", ["--help", "--version", *(f"{command} --help" for command in COMMANDS)])
def test_help_loads_nothing_heavy(clean_python, arguments):
    code = LOADED + (
        "import sys\n"
        "from mlx_gemma4.cli.app import run\n"
        "code = run(sys.argv[2:])\n"
        "print('\\nloaded', code, loaded(sys.argv[1]))"
    )
    out = clean_python(code, ",".join(SLOW), *arguments.split())
    assert out.splitlines()[-1] == "loaded 0 []"
    assert len(out.splitlines()) > 1, "the command printed nothing"


def test_a_whole_conversation_needs_no_peer(clean_python, tmp_path):
    """load, generate, stream_generate and Chat on a checkpoint as the Hub has it."""
    code = LOADED + (
        "import sys\n"
        "from mlx_gemma4 import Chat, generate, load, stream_generate\n"
        "model, tokenizer = load(sys.argv[2])\n"
        "generate(model, tokenizer, 'the user', max_tokens=4)\n"
        "n = sum(1 for _ in stream_generate(model, tokenizer, 'the user', max_tokens=4))\n"
        "kinds = [event.kind for event in Chat(model, tokenizer).stream('the user')]\n"
        "print(n > 0, kinds[-1], loaded(sys.argv[1]))"
    )
    folder = make_tiny(tmp_path / "tiny", "e2b", max_position_embeddings=64)
    assert clean_python(code, ",".join(PEERS), str(folder)).strip() == "True done []"


def test_the_command_needs_no_peer(clean_python):
    """`gemma4 generate` on the built-in model, from the arguments to the answer."""
    code = LOADED + (
        "import sys\n"
        "from mlx_gemma4.cli.app import run\n"
        "code = run(['generate', 'What is mlx-gemma4?'])\n"
        "print('\\nloaded', code, loaded(sys.argv[1]))"
    )
    lines = clean_python(code, ",".join(PEERS)).splitlines()
    assert lines[-1] == "loaded 0 []"
    assert "".join(lines[:-1]).strip(), "no answer"


def test_every_public_name_resolves(clean_python):
    """Each in turn in one fresh interpreter: a lazy name that points nowhere fails only when it is used."""
    code = "import mlx_gemma4 as m\nfor n in m.__all__: assert getattr(m, n) is not None, n\nprint(*sorted(dir(m)))"
    assert clean_python(code).split() == sorted(mlx_gemma4.__all__)
    assert {*mlx_gemma4._HOME, "__version__"} == set(mlx_gemma4.__all__)


def test_type_checkers_see_the_same_names():
    """The `if TYPE_CHECKING` block of __init__.py imports exactly the lazy names, from the same modules."""
    tree = ast.parse((ROOT / "mlx_gemma4" / "__init__.py").read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    seen = {a.name: n.module for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert seen == mlx_gemma4._HOME


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Engin'"):
        _ = mlx_gemma4.Engin  # type: ignore[attr-defined]


def test_no_module_imports_a_peer_at_its_top():
    """Even what the tests above do not reach. A peer may be imported where it is used, in a function."""
    found = []
    for folder in ("mlx_gemma4", "cli", "conversions", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "training" in path.parts:
                continue
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                names = []
                if isinstance(node, ast.Import):
                    names = [a.name for a in node.names]
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    names = [node.module or ""]
                found += [f"{path.relative_to(ROOT)}: {n}" for n in names if n.split(".")[0] in PEERS]
    assert not found


def test_this_process_runs_the_checkout():
    """The suite must not test another copy that happens to be installed."""
    assert Path(mlx_gemma4.__file__).resolve().parent.parent == ROOT
