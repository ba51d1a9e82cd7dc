"""Other people's kernels in the runner: MLX's own entry points replaced, and their modules loaded anew.

A package makes its kernels when it is imported, and asks then whether there is Metal; so a copy of the module is loaded
while the answer is ours.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import mlx.core as mx

from .kernel import metal_kernel

_Values = list[tuple[ModuleType, str, Any]]
_theirs: _Values = []  # what `in_place_of_mlx` has replaced


def _set(values: _Values) -> None:
    for module, name, value in values:
        setattr(module, name, value)


@contextmanager
def in_place_of_mlx() -> Iterator[None]:
    """In the block MLX has Metal, a GPU is the default device, and mx.fast.metal_kernel is ours.

    Functions under mx.compile run uncompiled, because the runner evaluates at once.
    """
    ours: _Values = [
        (mx.fast, "metal_kernel", metal_kernel),
        (mx.metal, "is_available", lambda: True),
        (mx, "default_device", lambda: mx.Device(mx.gpu, 0)),
    ]
    _theirs[:] = [(module, name, getattr(module, name)) for module, name, _ in ours]
    _set(ours)
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()
        _set(_theirs)
        _theirs.clear()


def fresh(name: str) -> Any:
    """Inside `in_place_of_mlx`: a copy of the module `name`, run anew; the imported one stays as it is."""
    ours: _Values = [(module, label, getattr(module, label)) for module, label, _ in _theirs]
    _set(_theirs)
    try:
        # The module, and what it imports, for everybody else: without our Metal.
        origin = importlib.import_module(name).__file__
    finally:
        _set(ours)
    # Under a name of its own in the same package, so that its relative imports work.
    spec = importlib.util.spec_from_file_location(f"{name}_in_metal_cpu", str(origin))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module
