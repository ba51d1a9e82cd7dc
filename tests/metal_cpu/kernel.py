"""`metal_kernel`, with the signature and the rules of mx.fast.metal_kernel, and the session that collects reports.

Owns what a caller sees. Leaves the source text to `signature.py`, compiling to `compile.py` and running to `launch.py`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from . import arrays
from . import compile as compiler
from .faults import KernelFault, Report
from .launch import Buffer, Settings, launch
from .signature import Signature, Template, extras_named, signature


class Session:
    """What ran inside `session(...)`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.reports: list[Report] = []

    @property
    def last(self) -> Report:
        return self.reports[-1]


_sessions: list[Session] = []


@contextmanager
def session(order: str = "forward", seed: int = 0, checks: bool = True, time_limit: int = 60) -> Iterator[Session]:
    """Settings for the launches in a block, and a record of them. See `launch.Settings` for the arguments.

    Of nested sessions the innermost sets, and all record.
    """
    opened = Session(Settings(order, seed, checks, time_limit))
    _sessions.append(opened)
    try:
        yield opened
    finally:
        _sessions.remove(opened)


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    compile_options: dict[str, Any] | None = None,
) -> Callable[..., list[mx.array]]:
    """A kernel that runs on the CPU, called as one of mx.fast.metal_kernel.

    Its inputs are evaluated at once, so it cannot be traced by mx.compile or differentiated. A launch that breaks a
    rule raises KernelFault; source that does not compile raises CompileError at the first call. `compile_options`
    chooses Metal's mathematics and changes nothing here.
    """
    if not output_names:
        raise ValueError("[metal_kernel] Must specify at least one output.")
    known: dict[Signature, dict[bool, Any]] = {}

    def call(
        *,
        inputs: Sequence[mx.array | float],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Template | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        for what, given, wanted in (
            ("inputs", inputs, input_names),
            ("output_shapes", output_shapes, output_names),
            ("output_dtypes", output_dtypes, output_names),
        ):
            if len(given) != len(wanted):
                raise ValueError(f"[metal_kernel] {what} has {len(given)} entries; {name} takes {len(wanted)}")
        settings = _sessions[-1].settings if _sessions else Settings()
        taken = [arrays.as_input(value, ensure_row_contiguous) for value in inputs]
        written = signature(
            name,
            [(label, one.type, one.shape, one.size) for label, one in zip(input_names, taken, strict=True)],
            [(label, arrays.metal_type(dtype)) for label, dtype in zip(output_names, output_dtypes, strict=True)],
            source,
            header,
            template or (),
            atomic_outputs,
        )
        if verbose:
            print(f"Generated source code for `{name}`:\n```\n{written.text}\n```")
        libraries = known.setdefault(written, {})
        if settings.checks not in libraries:
            libraries[settings.checks] = compiler.kernel_library(written, name, settings.checks)
        buffers = []
        for label, one in zip(input_names, taken, strict=True):
            buffers += _input_buffers(label, one, source)
        outputs = [
            Buffer(label, memory, memory.nbytes // max(1, math.prod(shape)), True, init_value is not None)
            for label, shape, memory in (
                (label, shape, arrays.new_output(tuple(shape), dtype, init_value))
                for label, shape, dtype in zip(output_names, output_shapes, output_dtypes, strict=True)
            )
        ]
        report = launch(libraries[settings.checks], name, [*buffers, *outputs], grid, threadgroup, settings)
        for opened in _sessions:
            opened.reports.append(report)
        if report.errors:
            raise KernelFault(report)
        return [
            arrays.as_array(buffer.memory, tuple(shape), dtype)
            for buffer, shape, dtype in zip(outputs, output_shapes, output_dtypes, strict=True)
        ]

    return call


def _input_buffers(name: str, taken: arrays.Input, source: str) -> Iterator[Buffer]:
    yield Buffer(name, taken.memory, taken.itemsize)
    values = {
        "shape": np.array(taken.shape, np.int32),
        "strides": np.array(taken.strides, np.int64),
        "ndim": np.array([len(taken.shape)], np.int32),
    }
    for extra in extras_named(name, source) if taken.shape else ():
        yield Buffer(f"{name}_{extra}", values[extra].view(np.uint8), values[extra].itemsize, shown=False)
