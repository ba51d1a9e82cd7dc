"""The wheel: built from the checkout and from the sdist, compared with the tree, installed elsewhere and run there.

Owns what an installed copy contains. The trap it guards against: a wheel without a shader, a package or the built-in
model works in the checkout and fails installed.
"""

import ast
import email
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import mlx_gemma4

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# Folder at the top of the checkout -> where it lies in a wheel.
FOLDERS = {f: f"mlx_gemma4/{f}" for f in ("cli", "conversions", "kernels")} | {"mlx_gemma4": "mlx_gemma4"}
# In the tree, and on purpose not in a wheel: what trained the built-in model and the codebooks.
LEFT_OUT = ("mlx_gemma4/demo/training/", "mlx_gemma4/kernels/codebooks/train.py")
DATA = ("mlx_gemma4/demo/model/", "mlx_gemma4/kernels/codebooks/")


def expected_files(tree: Path = ROOT) -> set[str]:
    """Paths inside the wheel, from the tree: all modules, all shaders, the built-in model, the typing marker."""
    found = {"mlx_gemma4/py.typed"}
    for folder, target in FOLDERS.items():
        # os.walk does not follow the three links, so nothing is seen twice.
        for where, _, names in os.walk(tree / folder):
            for name in names:
                path = (Path(target) / Path(where, name).relative_to(tree / folder)).as_posix()
                if path.endswith((".py", ".metal", ".h", ".toml")) or path.startswith(DATA):
                    found.add(path)
    return {path for path in found if not path.startswith(LEFT_OUT)}


def run(command: list[str], env: dict[str, str], cwd: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=env, cwd=cwd, input=stdin, capture_output=True, text=True, timeout=300)


def built(tree: Path, out: Path, kind: str) -> Path:
    """The one file that `python -m build` leaves in `out`.

    With the setuptools of the test extra, so that this needs no network; installing the checkout has already gone
    through an isolated build.
    """
    command = [sys.executable, "-m", "build", "--no-isolation", kind, "--outdir", str(out), str(tree)]
    done = run(command, dict(os.environ), out.parent)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (file,) = out.iterdir()
    return file


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    """A copy of the checkout: building leaves build/ and egg-info behind, which later builds would read back."""
    copy = tmp_path_factory.mktemp("tree") / "mlx-gemma4"
    left_behind = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "fixtures")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=left_behind)
    return copy


@pytest.fixture(scope="session")
def wheel(tree, tmp_path_factory) -> Path:
    return built(tree, tmp_path_factory.mktemp("wheel"), "--wheel")


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory, caller_environment) -> Path:
    """A fresh environment elsewhere with the wheel in it; returns its bin folder.

    The dependencies are those of the running interpreter, lent through a .pth line: path entries added that way do not
    have their own .pth files read, so an editable install of the checkout cannot be what runs.
    """
    home = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(home, symlinks=True)
    install = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python"), "install", "-q", "--no-deps"]
    done = run([*install, str(wheel)], caller_environment, home)
    assert done.returncode == 0, done.stderr
    (packages,) = (home / "lib").glob("python*/site-packages")
    (packages / "lent.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return home / "bin"


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as z:
        return {n for n in z.namelist() if not n.endswith("/")}


def test_wheel_holds_the_tree_and_nothing_else(wheel, tree):
    names = {n for n in names_in(wheel) if ".dist-info/" not in n}
    assert names == expected_files(tree)


def test_wheel_through_sdist_is_the_same(tree, wheel, tmp_path):
    sdist = built(tree, tmp_path / "sdist", "--sdist")
    safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python before 3.11.4 has none
    shutil.unpack_archive(sdist, tmp_path / "unpacked", **safe)
    (source,) = (tmp_path / "unpacked").iterdir()
    assert not (source / "mlx_gemma4" / "cli").exists(), "a folder behind its link: packed twice"
    assert not (source / "tests").exists(), "the tests need the whole repository"
    assert names_in(built(source, tmp_path / "wheel", "--wheel")) == names_in(wheel)


def test_expected_files_are_the_ones_a_user_needs():
    """The comparison above is worth as much as its right side."""
    expected = expected_files()
    for path in ("__init__.py", "cli/app.py", "cli/tui/stream.py", "kernels/reference/flash_attention.py"):
        assert f"mlx_gemma4/{path}" in expected
    for file in ("config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert f"mlx_gemma4/demo/model/{file}" in expected
    assert any(p.startswith("mlx_gemma4/demo/model/") and p.endswith(".safetensors") for p in expected)


def test_no_generic_top_level_name(wheel):
    """`kernels` is a distribution of its own that transformers imports; ours must not stand in its way."""
    tops = {n.split("/")[0] for n in names_in(wheel)}
    assert tops == {"mlx_gemma4", f"mlx_gemma4-{mlx_gemma4.__version__}.dist-info"}
    for folder in ("cli", "conversions", "kernels"):
        assert not (ROOT / folder / "__init__.py").exists()
        link = ROOT / "mlx_gemma4" / folder
        assert link.is_symlink() and os.readlink(link) == f"../{folder}"


def test_packages_are_the_folders():
    found = {Path(p).parent.as_posix().replace("/", ".") for p in expected_files() if p.endswith(".py")}
    assert sorted(found) == sorted(PROJECT["tool"]["setuptools"]["packages"])


def test_package_data_names_every_shader_folder():
    metal = {p for p in expected_files() if p.endswith((".metal", ".h"))}
    patterns = PROJECT["tool"]["setuptools"]["package-data"].get("mlx_gemma4.kernels", [])
    for path in metal:
        assert any(Path(path).relative_to("mlx_gemma4/kernels").match(p) for p in patterns), path


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as z:
        info = f"mlx_gemma4-{mlx_gemma4.__version__}.dist-info"
        meta = email.message_from_bytes(z.read(f"{info}/METADATA"))
        assert b"gemma4 = mlx_gemma4.cli.app:main" in z.read(f"{info}/entry_points.txt")
        assert f"{info}/licenses/LICENSE" in z.namelist()
    assert meta["Version"] == PROJECT["project"]["version"] == mlx_gemma4.__version__
    assert meta["Requires-Python"] == ">=3.11"
    core = [r for r in meta.get_all("Requires-Dist") or [] if "extra ==" not in r]
    assert not [r for r in core if re.match(r"(torch|transformers|mlx-vlm)\b", r)]
    # Linux wheels of mlx have no backend of their own; macOS gets Metal with the plain name.
    assert [r for r in core if r.startswith("mlx[cpu]") and "darwin" in r.split("!=")[-1]]


# Import name -> distribution, where they differ.
DISTRIBUTION = {"PIL": "pillow", "markdown_it": "markdown-it-py"}


def test_every_import_is_declared():
    """What the package imports, at the top of a module or in a function, is a core dependency by name."""
    declared = {re.split(r"[^A-Za-z0-9_-]", d)[0].lower().replace("_", "-") for d in PROJECT["project"]["dependencies"]}
    missing = {}
    for path in sorted(expected_files()):
        if not path.endswith(".py"):
            continue
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in {n.split(".")[0] for n in names} - sys.stdlib_module_names - {"mlx_gemma4"}:
                if DISTRIBUTION.get(name, name.replace("_", "-")) not in declared:
                    missing.setdefault(name, path)
    assert not missing


def test_installed_copy_runs_elsewhere(installed, tmp_path):
    """From another folder, without the checkout on the path: what runs is the wheel."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    code = "import mlx_gemma4.cli.app as a, mlx_gemma4.kernels.flash_attention as f; print(a.__file__, f.__file__)"
    where = run([str(installed / "python"), "-c", code], env, tmp_path)
    assert where.returncode == 0, where.stderr
    for file in where.stdout.split():
        assert Path(file).is_relative_to(installed.parent) and "/mlx_gemma4/" in file

    gemma4 = str(installed / "gemma4")
    shown = run([gemma4, "--help"], env, tmp_path)
    assert shown.returncode == 0 and "generate" in shown.stdout, shown.stderr
    assert run([gemma4, "--version"], env, tmp_path).stdout == f"mlx-gemma4 {mlx_gemma4.__version__}\n"
    table = run([gemma4, "cache-size"], env, tmp_path)
    assert table.returncode == 0 and "26b-a4b" in table.stdout, table.stderr

    greedy = [gemma4, "generate", "--temperature", "0", "--max-tokens", "16"]
    answer = run([*greedy, "What is mlx-gemma4?"], env, tmp_path)
    assert answer.returncode == 0 and answer.stdout.strip(), answer.stderr
    assert answer.stdout == run(greedy, env, tmp_path, stdin="What is mlx-gemma4?\n").stdout
