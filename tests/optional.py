"""Modules that not every installation has, and what installs them.

Owns the words of the skips. Leaves modules that this package depends on to plain imports: without them a test fails.
"""

from types import ModuleType

import pytest


def missing(module: str, extra: str) -> str:
    """Why a test does not run, and until when."""
    return f"{module} is not installed: pip install 'mlx-gemma4[{extra}]'"


def optional(module: str, extra: str = "dev") -> ModuleType:
    """The module; skips, a test or a whole file, where it is missing."""
    return pytest.importorskip(module, reason=missing(module, extra))


def transformers_with_gemma4() -> ModuleType:
    """transformers, if it has the classes that are the truth here."""
    found = optional("transformers")
    if not hasattr(found, "Gemma4Config"):
        pytest.skip("this transformers has no Gemma 4: pip install 'mlx-gemma4[dev]'", allow_module_level=True)
    return found
