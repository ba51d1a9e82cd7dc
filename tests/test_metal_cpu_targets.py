"""The runner builds for every machine it promises, and a kernel needs nothing that is not there when it is loaded."""

import metal_cpu
import mlx.core as mx
import pytest
from elftools.elf.elffile import ELFFile
from metal_cpu import compile as compiler
from metal_cpu.signature import signature

pytestmark = pytest.mark.skipif(metal_cpu.unsupported() is not None, reason=str(metal_cpu.unsupported()))

MACHINES = {"x86_64": "EM_X86_64", "aarch64": "EM_AARCH64"}
# From the C library, which every process has: what vector types and mathematics become.
C_LIBRARY = {"expf", "logf", "powf", "sinf", "fmodf", "memcpy", "memset", "memmove"}
SOURCE = """
    threadgroup half s[64]; uint t = thread_index_in_threadgroup;
    s[t] = half(x[t]) * half(0.3); threadgroup_barrier(mem_flags::mem_threadgroup);
    bfloat b = bfloat(float(s[63 - t])) + bfloat(x[t]);
    simdgroup_half8x8 m; simdgroup_load(m, s, 8); simdgroup_multiply(m, m, m); simdgroup_store(m, s, 8);
    float f = exp(float(b)) + pow(x[t], 2.5f) + float(fmod(half(x[t]), half(2))) + sin(x[t]) + log(x[t]);
    out[t] = T(simd_sum(f) + float(m.thread_elements()[0]) + float(int(t) / int(x[t] + 1)));
"""


def undefined_and_defined(library):
    symbols = ELFFile(library.open("rb")).get_section_by_name(".dynsym").iter_symbols()
    names = [(symbol.name, symbol["st_shndx"] == "SHN_UNDEF") for symbol in symbols if symbol.name]
    return {name for name, undefined in names if undefined}, {name for name, undefined in names if not undefined}


@pytest.mark.parametrize("checked", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("machine", compiler.TARGETS)
def test_kernel_and_runtime_build_for(machine, checked):
    text = signature(
        "all", [("x", "float", (64,), 64)], [("out", "bfloat16_t")], SOURCE, "", [("T", mx.bfloat16)], False
    )
    runtime = compiler.runtime_library(compiler.TARGETS[machine])
    kernel = compiler.kernel_library(text, "all", checked, compiler.TARGETS[machine])
    for library in (runtime, kernel):
        assert ELFFile(library.open("rb"))["e_machine"] == MACHINES[machine]
    needed, entry = undefined_and_defined(kernel)
    _, offered = undefined_and_defined(runtime)
    assert needed - offered <= C_LIBRARY and "metal_cpu_entry" in entry
    assert any(name.startswith("__tsan_") for name in needed) == checked


def test_an_unknown_machine_is_named(monkeypatch):
    monkeypatch.setattr(compiler.platform, "machine", lambda: "riscv64")
    with pytest.raises(metal_cpu.CompileError, match="x86_64 and aarch64"):
        compiler.target()
