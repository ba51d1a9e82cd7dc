"""Which way an operation runs: our Metal kernel, or its reference in plain MLX operations. One switch for all.

Owns the choice, the building of kernels from `metal/`, and the record of what ran. Leaves shapes and arguments to the
launchers beside this file.

    GEMMA4_KERNELS=auto        Metal where MLX has it, the reference elsewhere (the default)
    GEMMA4_KERNELS=reference   plain MLX operations everywhere
    GEMMA4_KERNELS=metal       Metal, or an error where there is none
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_gemma4.errors import UsageError

METAL, REFERENCE = "metal", "reference"
MODES = ("auto", METAL, REFERENCE)
SOURCES = Path(__file__).parent / "metal"

Factory = Callable[..., Any]  # the signature of mx.fast.metal_kernel


@dataclass
class _Switch:
    mode: str | None = None  # None: the environment decides
    factory: Factory | None = None  # None: mx.fast.metal_kernel


_switch = _Switch()
_ran: dict[str, str] = {}


def mode() -> str:
    """The switch as it stands. Raises UsageError for a value it does not know."""
    chosen = _switch.mode or os.environ.get("GEMMA4_KERNELS") or "auto"
    if chosen not in MODES:
        raise UsageError(f"GEMMA4_KERNELS={chosen} is not one of {', '.join(MODES)}")
    return chosen


def use_metal(operation: str, refusal: str | None = None) -> bool:
    """Whether `operation` is to launch its Metal kernel now; the answer is recorded for `status`.

    `refusal` says in a few words what about these arguments the kernel cannot take, None if it can.
    """
    chosen = mode()
    able = _switch.factory is not None or mx.metal.is_available()
    if chosen == METAL and not able:
        raise UsageError("GEMMA4_KERNELS=metal, but this machine has no Metal; use auto or reference")
    metal = able and chosen != REFERENCE
    if metal and refusal is not None:
        _ran[operation] = f"{REFERENCE} ({refusal})"
        return False
    _ran[operation] = METAL if metal else REFERENCE
    return metal


def status() -> dict[str, str]:
    """Operation -> "metal", "reference" or "reference (why)": which way each last ran in this process."""
    return dict(_ran)


@contextmanager
def forced(mode: str, factory: Factory | None = None) -> Iterator[None]:
    """Sets the switch for a block; tests pass a `factory` that runs Metal source on another machine."""
    before = _switch.mode, _switch.factory
    _switch.mode, _switch.factory = mode, factory
    try:
        yield
    finally:
        _switch.mode, _switch.factory = before


def metal_kernel(
    source: str, inputs: Sequence[str], outputs: Sequence[str], includes: Sequence[str] = (), **options: Any
) -> Any:
    """The kernel whose body is `metal/{source}.metal`, after the headers `metal/include/{name}.h`; built once.

    inputs, outputs and options (`ensure_row_contiguous`, `atomic_outputs`) as in mx.fast.metal_kernel. MLX writes the
    signature, so a source file is the body of one kernel, with the names of `inputs` and `outputs` in scope.
    """
    factory = _switch.factory or mx.fast.metal_kernel
    return _build(factory, source, tuple(inputs), tuple(outputs), tuple(includes), tuple(sorted(options.items())))


@cache
def _build(
    factory: Factory,
    source: str,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    includes: tuple[str, ...],
    options: tuple[tuple[str, Any], ...],
) -> Any:
    return factory(
        name=f"gemma4_{source}",
        input_names=list(inputs),
        output_names=list(outputs),
        source=(SOURCES / f"{source}.metal").read_text(),
        header="\n".join((SOURCES / "include" / f"{name}.h").read_text() for name in includes),
        **dict(options),
    )
