"""What every test runs under: a home of its own, no Hub, no settings of whoever runs the suite.

Owns the environment, the fixtures `clean_python` and `caller_environment`, and the line that names the machine.
Leaves checkpoints to `tiny.py` and the Hub of the tests to `hub_server.py`.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

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


def pytest_report_header() -> str:
    """MLX, device and machine, so that a pasted report says where it ran."""
    import mlx.core as mx

    where = "Metal" if mx.metal.is_available() else "CPU, no Metal"
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
