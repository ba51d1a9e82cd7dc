"""Calls the runtime: buffers and grid in, outputs and a report out.

Owns the ctypes side of `runtime/launch.cpp`. Leaves to `kernel.py` what the buffers hold.
"""

import ctypes
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from . import compile as compiler
from . import lines
from .faults import Fault, Report, Traffic

ORDERS = ("forward", "reverse", "random")
# In the order of the runtime's Counts.
COUNTS = (
    *("threads", "threadgroups", "simd_operations", "divergent_simd", "partial_simd", "threadgroup_barriers"),
    *("simdgroup_barriers", "accesses", "atomics", "races", "threadgroup_bytes", "threadgroup_read"),
    "threadgroup_written",
)
MAX_THREADS = 1024  # of a threadgroup, on every Apple GPU
MAX_THREADGROUPS = 1 << 22  # of a launch: what the race check can tell apart


@dataclass(frozen=True)
class Settings:
    """How launches run. order: of lanes, SIMD-groups and threadgroups; seed: of "random"; time_limit: s per launch.

    checks=False runs optimised code that reports nothing, for values alone.
    """

    order: str = "forward"
    seed: int = 0
    checks: bool = True
    time_limit: int = 60

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order={self.order!r} is not one of {', '.join(ORDERS)}")


@dataclass(frozen=True)
class Buffer:
    """memory: uint8, changed in place where `writable`. element: bytes of one. shown: whether the report lists it."""

    name: str
    memory: np.ndarray
    element: int
    writable: bool = False
    initialised: bool = True
    shown: bool = True


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("element", ctypes.c_uint32),
        ("writable", ctypes.c_uint32),
        ("initialised", ctypes.c_uint32),
        ("read", ctypes.c_uint64),
        ("read_unique", ctypes.c_uint64),
        ("written", ctypes.c_uint64),
        ("written_unique", ctypes.c_uint64),
        ("unwritten", ctypes.c_uint64),
    )


_one_at_a_time = threading.Lock()  # the runtime's state is the process's


@cache
def _runtime() -> ctypes.CDLL:
    # Kernels find both in the process: mathematics in libm, everything else in the runtime.
    ctypes.CDLL("libm.so.6", mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(compiler.runtime_library()), mode=ctypes.RTLD_GLOBAL)


@cache
def _entry(library: Path) -> ctypes.c_void_p:
    _runtime()
    return ctypes.cast(ctypes.CDLL(str(library)).metal_cpu_entry, ctypes.c_void_p)


def launch(
    library: Path,
    name: str,
    buffers: Sequence[Buffer],
    grid: Sequence[int],
    threadgroup: Sequence[int],
    settings: Settings,
) -> Report:
    """Runs the kernel over `grid` threads in threadgroups of `threadgroup`; outputs are in the buffers afterwards."""
    grid, threadgroup = _extent("grid", grid), _extent("threadgroup", threadgroup)
    threads = int(np.prod(threadgroup))
    if threads > MAX_THREADS:
        raise ValueError(f"{name}: a threadgroup of {threads} threads; Metal has {MAX_THREADS}")
    if np.prod([-(-whole // part) for whole, part in zip(grid, threadgroup, strict=True)]) > MAX_THREADGROUPS:
        raise ValueError(f"{name}: grid={grid} is more than {MAX_THREADGROUPS} threadgroups")
    structures = (_Buffer * len(buffers))(
        *(
            _Buffer(
                buffer.memory.ctypes.data,
                buffer.memory.nbytes,
                buffer.name.encode(),
                buffer.element,
                buffer.writable,
                buffer.initialised,
            )
            for buffer in buffers
        )
    )
    counts = (ctypes.c_uint64 * len(COUNTS))()
    with _one_at_a_time:
        entry, runtime = _entry(library), _runtime()
        started = time.perf_counter()
        found = runtime.metal_cpu_launch(
            entry,
            (ctypes.c_uint32 * 3)(*grid),
            (ctypes.c_uint32 * 3)(*threadgroup),
            structures,
            len(buffers),
            settings.checks,
            ORDERS.index(settings.order),
            ctypes.c_uint64(settings.seed),
            settings.time_limit,
            counts,
        )
        seconds = time.perf_counter() - started
        faults = [_fault(runtime, i, library, name) for i in range(found)]
    return Report(
        name,
        [fault for fault in faults if fault.kind != "same-value"],
        [fault for fault in faults if fault.kind == "same-value"],
        dict(zip(COUNTS, counts, strict=True)),
        {
            buffer.name: Traffic(s.size, s.read, s.read_unique, s.written, s.written_unique, s.unwritten)
            for buffer, s in zip(buffers, structures, strict=True)
            if buffer.shown
        },
        seconds,
    )


def _extent(what: str, extent: Sequence[int]) -> tuple[int, ...]:
    values = tuple(int(value) for value in extent)
    if len(values) != 3 or min(values) < 1:
        raise ValueError(f"{what}={tuple(extent)}: three positive numbers of threads are wanted")
    return values


def _fault(runtime: ctypes.CDLL, i: int, library: Path, name: str) -> Fault:
    kind, message, file = ctypes.c_char_p(), ctypes.c_char_p(), ctypes.c_char_p()
    address, earlier = ctypes.c_uint64(), ctypes.c_uint32()
    line = runtime.metal_cpu_fault(i, *(ctypes.byref(out) for out in (kind, message, file, address, earlier)))
    if line:
        where = f"{Path(_text(file)).name}:{line}"
    else:
        where = lines.place(library, address.value) if address.value else "?"
    sentence = _text(message)
    if earlier.value:
        sentence += f" at {_unpacked(earlier.value, library, name)}"
    return Fault(_text(kind), where, sentence)


def _unpacked(place: int, library: Path, name: str) -> str:
    """The runtime's Site::packed."""
    if not place >> 31:
        return lines.place(library, place)
    return f"{'header' if place >> 30 & 1 else f'{name}.metal'}:{place & (1 << 30) - 1}"


def _text(pointer: ctypes.c_char_p) -> str:
    return (pointer.value or b"").decode()
