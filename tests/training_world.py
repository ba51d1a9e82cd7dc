"""The generators that trained the built-in model, imported for a while as their scripts import one another.

Owns finding them and putting `sys.modules` back. They are in the repository but not in the wheel.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from mlx_gemma4 import demo

TRAINING = Path(demo.__file__).parent / "training"


@contextmanager
def training_modules(*names: str) -> Iterator[dict[str, ModuleType]]:
    """These modules by name; other modules that have a name of theirs come back afterwards."""
    if not TRAINING.is_dir():
        pytest.skip("an installed package has no training folder; run the tests in a checkout")
    own = {path.stem for path in TRAINING.glob("*.py")}
    hidden = {name: sys.modules.pop(name) for name in own & set(sys.modules)}
    sys.path.insert(0, str(TRAINING))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(TRAINING))
        for name in own:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)
