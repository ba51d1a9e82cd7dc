"""Every barrier in our Metal sources is needed, and the tests notice when one is missing.

For each barrier a copy of the sources with that barrier deleted or weakened is put in their place, and the kernel's
own `mutation_check()`, in its `test_kernel_<name>.py`, must fail: with a race, a read of what is not there, or a wrong
result.
"""

import functools
import importlib
import shutil
from pathlib import Path

import metal_cpu
import pytest
from metal_cpu.mutate import mutants

from mlx_gemma4.kernels import backend

pytestmark = pytest.mark.skipif(metal_cpu.unsupported() is not None, reason=str(metal_cpu.unsupported()))

KERNELS = sorted(path.stem for path in backend.SOURCES.glob("*.metal"))
FILES = sorted([*backend.SOURCES.glob("*.metal"), *backend.SOURCES.glob("include/*.h")])
MUTANTS = [(path, mutant) for path in FILES for mutant in mutants(path.read_text())]


def module_of(kernel: str):
    return importlib.import_module(f"test_kernel_{kernel}")


def check(kernel: str) -> set[str]:
    """Runs the kernel's mutation_check; returns the headers it was built with."""
    headers = set()

    # A new object every time: kernels are kept by the factory that made them.
    def factory(*, name, header, **options):
        headers.update(path.name for path in FILES if path.suffix == ".h" and path.read_text() in header)
        return metal_cpu.metal_kernel(name=name, header=header, **options)

    with backend.forced("metal", factory=factory), metal_cpu.session(time_limit=20) as session:
        module_of(kernel).mutation_check()
    assert session.reports, f"test_kernel_{kernel}.mutation_check launched nothing"
    return headers


headers_of = functools.cache(check)


def users_of(path: Path) -> list[str]:
    """The kernels to check when `path` changes; each passes as it stands."""
    if path.suffix == ".metal":
        assert hasattr(module_of(path.stem), "mutation_check"), f"test_kernel_{path.stem} has no mutation_check()"
        headers_of(path.stem)
        return [path.stem]
    able = [kernel for kernel in KERNELS if hasattr(module_of(kernel), "mutation_check")]
    users = [kernel for kernel in able if path.name in headers_of(kernel)]
    assert users, f"no mutation_check() launches a kernel with {path.name}"
    return users


@pytest.mark.parametrize(
    "path, mutant", MUTANTS, ids=[f"{path.name}:{mutant.line} {mutant.change}" for path, mutant in MUTANTS]
)
def test_barrier_is_missed(path, mutant, tmp_path, monkeypatch):
    users = users_of(path)
    changed = tmp_path / "metal"
    shutil.copytree(backend.SOURCES, changed)
    (changed / path.relative_to(backend.SOURCES)).write_text(mutant.source)
    monkeypatch.setattr(backend, "SOURCES", changed)
    for kernel in users:
        try:
            check(kernel)
        except metal_cpu.CompileError as error:
            pytest.fail(f"the changed source does not compile: {error}")
        except Exception:
            return
    pytest.fail(f"nobody missed the barrier in line {mutant.line} of {path.name}, {mutant.change}: {', '.join(users)}")


def test_mutants_of_a_source():
    comment = "a; /* threadgroup_barrier(x); */\n"
    source = comment + "if (b) threadgroup_barrier(mem_flags::mem_device |\n mem_flags::mem_none);\nc;"
    found = {mutant.change: mutant for mutant in mutants(source)}
    assert list(found) == ["deleted", "for the SIMD-group only", "without mem_device", "without mem_none"]
    assert {mutant.line for mutant in found.values()} == {2}
    assert found["deleted"].source == comment + "if (b) ;\n\nc;"
    assert "if (b) threadgroup_barrier(mem_flags::mem_none);\n\nc;" in found["without mem_device"].source
