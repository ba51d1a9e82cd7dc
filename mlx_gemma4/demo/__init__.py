"""The small model that ships inside the package.

Owns: where its folder lies. How it was made is in `training/` (in the repository only) and in `model/README.md`.
"""

from pathlib import Path


def path() -> Path:
    """The folder of the built-in model: config.json, weights, tokenizer, chat template, model card."""
    return Path(__file__).resolve().parent / "model"
