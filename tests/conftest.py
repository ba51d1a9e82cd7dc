"""What every test runs under: a home of its own, no Hub, no settings of whoever runs the suite.

Owns the environment, the fixtures `clean_python`, `caller_environment` and `metal`, and the line that names the
machine. Leaves checkpoints to `tiny.py`, the Hub to `hub_server.py` and running Metal source to `metal_cpu/`.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Before anything imports huggingface_hub, which reads its variables once. pip still needs the caller's own
# (its configuration lies under HOME), hence the copy.
_CALLER = dict(os.environ)
_HOME = Path(tempfile.mkdtemp(prefix="mlx-gemma4-tests-"))

# Not a setting of the program: where a test finds a published tokenizer, which cannot be kept here.
_FOR_TESTS = {"GEMMA4_TOKENIZER"}
for name in set(os.environ) - _FOR_TESTS:
    if name.startswith(("GEMMA4_", "HF_", "HUGGING_FACE_", "XDG_", "TRANSFORMERS_")):
        del os.environ[name]
os.environ |= {
    "HOME": str(_HOME),
    "HF_HOME": str(_HOME / "huggingface"),
    # A test that means to use a Hub starts its own and says so; none may reach the real one by accident.
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
for name in ("NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE", "PYTHONPATH", "COLUMNS", "LINES"):
    os.environ.pop(name, None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        choices=("cpu", "metal"),
        help="where kernel tests run Metal source: the device (the default where MLX has one), or this CPU",
    )


def pytest_report_header(config: pytest.Config) -> str:
    """MLX, device and machine, so that a pasted report says where it ran."""
    import mlx.core as mx

    where = "Metal" if mx.metal.is_available() else "CPU, no Metal"
    where += f"; kernel tests on {kernel_backend(config)}"
    return f"mlx {mx.__version__} ({where}), {platform.platform()}, {platform.machine()}, {os.cpu_count()} cores"


def pytest_unconfigure() -> None:
    shutil.rmtree(_HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def caller_environment() -> dict[str, str]:
    """The environment pytest was started with: for pip, which must find its index and its certificates."""
    return dict(_CALLER)


@pytest.fixture(scope="session")
def clean_python() -> Callable[..., str]:
    """clean_python(code, *arguments) -> stdout of a fresh interpreter that finds this checkout; must succeed."""

    def run(code: str, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


def kernel_backend(config: pytest.Config) -> str:
    """Where kernel tests run: "cpu" or "metal"."""
    import mlx.core as mx

    return config.getoption("--backend") or ("metal" if mx.metal.is_available() else "cpu")


@pytest.fixture
def metal(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Our kernels run their Metal source: on a CPU through `metal_cpu`, whose session the fixture is; else None.

    Assertions about traffic and reports stand under `if metal is not None`.
    """
    from mlx_gemma4.kernels import backend

    if kernel_backend(request.config) == "metal":
        with backend.forced("metal"):
            yield None
        return
    import metal_cpu

    with backend.forced("metal", factory=metal_cpu.metal_kernel), metal_cpu.session() as session:
        yield session
