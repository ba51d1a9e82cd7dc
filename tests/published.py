"""The four published sizes as the tests know them: config.json and every tensor's name and shape.

Owns reading `fixtures/published/<size>/` (how it was made: `fixtures/make_published.py`).
"""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "fixtures" / "published"
SIZES = ("e2b", "e4b", "26b-a4b", "31b")


def config(size: str) -> dict[str, Any]:
    return json.loads((FOLDER / size / "config.json").read_text())


def tensors(size: str) -> dict[str, tuple[int, ...]]:
    """{name on the Hub: shape} of everything in the checkpoint, towers and unused tensors included."""
    out: dict[str, tuple[int, ...]] = {}
    for pattern, groups in json.loads((FOLDER / size / "weights.json").read_text()).items():
        for shape, layers in groups:
            names = [pattern.replace("{}", str(i)) for i in layers] or [pattern]
            out |= dict.fromkeys(names, tuple(shape))
    return out
