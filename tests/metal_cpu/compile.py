"""Metal source to a shared library of this machine, with the clang that comes in the ziglang package.

Owns the compiler's flags, the generated entry point and the cache of libraries. Leaves the text that MLX writes to
`signature.py` and what is forbidden beyond the compiler's own rules to `lint.py`.

The cache is `.pytest_cache/d/metal_cpu` of this checkout, so that `pytest --cache-clear` empties it; METAL_CPU_CACHE
names another folder. Files are put in place by renaming, so several processes may share it.
"""

import hashlib
import os
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from . import lint
from .faults import CompileError
from .rewrite import rewrite
from .signature import ATTRIBUTES, Signature

HERE = Path(__file__).resolve().parent
INCLUDE, RUNTIME = HERE / "include", HERE / "runtime"


@dataclass(frozen=True)
class Target:
    """One machine. kernel: flags of `zig clang`; runtime: flags of `zig c++`, which brings the C library's headers."""

    kernel: tuple[str, ...]
    runtime: tuple[str, ...]


# half and bfloat arithmetic must round after every operation: F16C on x86-64, the fp16 extension on arm64.
TARGETS = {
    "x86_64": Target(
        ("--target=x86_64-linux-gnu", "-march=x86-64-v3"), ("-target", "x86_64-linux-gnu.2.28", "-mcpu=x86_64_v3")
    ),
    "aarch64": Target(("--target=aarch64-linux-gnu", "-march=armv8.2-a+fp16"), ("-target", "aarch64-linux-gnu.2.28")),
}

_LANGUAGE = (
    *("-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc", "-Xclang", "-cl-ext=+all"),
    *("-Xclang", "-cl-single-precision-constant", "-cl-fp32-correctly-rounded-divide-sqrt", "-ffp-contract=off"),
    *("-Xclang", "-ffloat16-excess-precision=none", "-Xclang", "-fbfloat16-excess-precision=none"),
    *("-fPIC", "-fno-exceptions", "-fno-rtti", "-fno-stack-protector", "-fno-math-errno", "-nostdinc"),
    *("-Wno-everything", "-Wimplicit-float-conversion", "-Wno-implicit-int-float-conversion"),
    *("-Werror=uninitialized", "-Werror=return-type", f"-Wframe-larger-than={lint.PRIVATE_LIMIT}"),
)
_CHECKED = (
    *("-O1", "-fno-vectorize", "-fno-slp-vectorize", "-gline-tables-only", "-ftrivial-auto-var-init=pattern"),
    *("-fsanitize=thread", "-mllvm", "-tsan-instrument-func-entry-exit=0"),
    *("-mllvm", "-tsan-instrument-read-before-write=1"),
    "-fsanitize=bounds,local-bounds,alignment,signed-integer-overflow,integer-divide-by-zero,float-cast-overflow,bool",
    *("-fsanitize-recover=all", "-fno-sanitize-trap=local-bounds"),
)
_UNCHECKED = ("-O2", "-fno-sanitize=all")
_RUNTIME = ("-std=c++17", "-O2", "-fPIC", "-fno-exceptions", "-fno-rtti", "-fno-sanitize=all", "-Wall", "-Wextra")


def unsupported() -> str | None:
    """Why the runner does not work on this machine; None where it does."""
    if sys.platform == "linux" and platform.machine() in TARGETS:
        return None
    return f"Metal source runs on a CPU under Linux on {' and '.join(TARGETS)}, not under {platform.platform()}"


def target() -> Target:
    """This machine's. Raises CompileError where the runner does not work."""
    reason = unsupported()
    if reason:
        raise CompileError(reason)
    return TARGETS[platform.machine()]


@cache
def zig() -> str:
    """The executable of the ziglang package."""
    try:
        import ziglang
    except ImportError as error:
        raise CompileError("no compiler for Metal source: pip install ziglang") from error
    return str(Path(ziglang.__file__).parent / "zig")


@cache
def cache_folder() -> Path:
    """Where libraries are kept."""
    named = os.environ.get("METAL_CPU_CACHE")
    folders = [Path(named)] if named else [HERE.parents[1] / ".pytest_cache" / "d" / "metal_cpu"]
    folders.append(Path(tempfile.gettempdir()) / f"metal_cpu-{os.getuid()}")
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise CompileError(f"none of {', '.join(map(str, folders))} can be written")


def start(*command: str) -> subprocess.Popen[str]:
    """A command of the compiler, started; its own caches lie beside ours."""
    folder = str(cache_folder() / "zig")
    environment = os.environ | {"ZIG_GLOBAL_CACHE_DIR": folder, "ZIG_LOCAL_CACHE_DIR": folder}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What it wrote: stdout, stderr. Raises CompileError with the latter if it failed."""
    written, complaints = process.communicate()
    if process.returncode:
        raise CompileError(complaints.strip())
    return written, complaints


@cache
def _sources_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted([*INCLUDE.rglob("*"), *RUNTIME.iterdir(), HERE / "lint.py"]):
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _cached(name: str, *decides: object) -> Path:
    digest = hashlib.sha256(repr((decides, _sources_digest())).encode()).hexdigest()
    return cache_folder() / f"{re.sub(r'[^A-Za-z0-9_]', '', name)[:40]}-{digest[:20]}.so"


def runtime_library(machine: Target | None = None) -> Path:
    """The runtime of a machine (None: this one), built on first use (about a second)."""
    flags = (*(machine or target()).runtime, *_RUNTIME)
    library = _cached("runtime", flags)
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
            built = Path(scratch) / "runtime.o"
            finish(start(zig(), "c++", *flags, "-c", str(RUNTIME / "runtime.cpp"), "-o", str(built)))
            _link(built, library)
    return library


def kernel_library(signature: Signature, name: str, checked: bool, machine: Target | None = None) -> Path:
    """The kernel of this signature, compiled and linted unless the cache has it. Raises CompileError.

    checked: with every access reported to the runtime; otherwise optimised. machine: None is this one.
    """
    text = kernel_text(signature, name)
    flags = (*(machine or target()).kernel, *_LANGUAGE, *(_CHECKED if checked else _UNCHECKED))
    library = _cached(name, text, flags)
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
            source, built = Path(scratch) / "kernel.cpp", Path(scratch) / "kernel.o"
            source.write_text(text)
            command = (zig(), "clang", *flags, f"-I{INCLUDE}", str(source))
            linting = start(*command, *lint.FLAGS)
            try:
                _, warnings = finish(start(*command, "-c", "-o", str(built)))
            finally:
                tree, _ = linting.communicate()
            complaints = [*lint.unqualified(tree), *lint.warned(warnings)]
            if complaints:
                raise CompileError("\n".join(complaints))
            _link(built, library)
    return library


def _link(built: Path, library: Path) -> None:
    # No C library and no sanitizer runtime: what is missing comes from our runtime and from libm at load time.
    linked = built.with_suffix(".so")
    finish(start(zig(), "ld.lld", "-shared", str(built), "-o", str(linked)))
    os.replace(linked, library)


def kernel_text(signature: Signature, name: str) -> str:
    """C++ for OpenCL: the headers, the kernel, and an entry point that takes all buffers as one array of addresses."""
    declaration = signature.declaration
    arguments = [
        f"{'*' if parameter.reference else ''}({parameter.type}*)(ulong)buffers[{i}]"
        for i, parameter in enumerate(signature.parameters)
    ] + [_attribute(attribute) for attribute in signature.attributes]
    return (
        "#include <metal_stdlib>\n"
        f'#line 1 "header"\n{rewrite(signature.header)}\n'
        f'{declaration}\n#line 1 "{name}.metal"\n{rewrite(signature.body)}\n}}\n'
        '#line 1 "entry"\n'
        'extern "C" __attribute__((visibility("default"), no_sanitize("thread", "undefined")))\n'
        "void metal_cpu_entry(char** buffers, const metal_cpu_thread* t) {\n"
        f"  {signature.function}{signature.arguments}({', '.join(arguments)});\n}}\n"
    )


def _attribute(name: str) -> str:
    kind, value = ATTRIBUTES[name]
    if kind == "uint":
        return str(value)
    return f"uint3{{{value}[0], {value}[1], {value}[2]}}" if value else "uint3{0, 0, 0}"
