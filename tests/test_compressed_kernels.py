"""Compressed caches over the Metal kernels, every launch of a step together. Alone, each has tests of its own."""

import pytest
from compressed import KINDS, Layer

from mlx_gemma4.kernels import backend


@pytest.mark.parametrize("kind", KINDS)
def test_answers_with_every_kernel(kind, metal, monkeypatch):
    """Coding, decode and a prefilled chunk of ragged rows answer as attention over what the codes stand for."""
    monkeypatch.setattr(backend, "_ran", {})
    layer = Layer(kind, 1, [0, 20], mode="trellis")
    for length in (130, 1, 12):
        layer.append(length)
    assert layer.coded == 64
    ran = backend.status()
    wanted = {"turboquant_encode", "turboquant_attention", "merge_partials"}
    assert {name for name in ran if ran[name] == "metal"} >= wanted
