"""Family names: which repository each means, how forgiving they are, and what a wrong one is told."""

import dataclasses
import math

import pytest
import tiny

from mlx_gemma4 import catalog
from mlx_gemma4.errors import ModelNotFoundError


@pytest.mark.parametrize(
    ("typed", "repo"),
    [
        ("e2b", "google/gemma-4-E2B-it"),
        ("E4B", "google/gemma-4-E4B-it"),
        ("26b-a4b", "google/gemma-4-26B-A4B-it"),
        ("gemma-4-26b-a4b", "google/gemma-4-26B-A4B-it"),
        ("Gemma-4-26B-A4B-it", "google/gemma-4-26B-A4B-it"),
        ("26b", "google/gemma-4-26B-A4B-it"),
        ("31b", "google/gemma-4-31B-it"),
        ("e2b-base", "google/gemma-4-E2B"),
        ("26B-A4B-base", "google/gemma-4-26B-A4B"),
        ("gemma4-31b-pt", "google/gemma-4-31B"),
    ],
)
def test_names_lead_to_repositories(typed, repo):
    entry = catalog.find(typed)
    assert entry is not None and entry.repo == repo


@pytest.mark.parametrize("typed", ["", "e3b", "12b", "google/gemma-4-E2B-it", "e2b-chat", "gemma-3-4b"])
def test_other_names_are_not_guessed(typed):
    assert catalog.find(typed) is None


def test_entries_carry_the_published_figures():
    by_name = {e.name: e for e in catalog.entries()}
    assert list(by_name) == [*(n + s for s in ("", "-base") for n in ("e2b", "e4b", "26b-a4b", "31b"))]
    assert (by_name["e2b"].context, by_name["31b-base"].context) == (131072, 262144)
    assert "audio" in by_name["e4b"].modalities and "audio" not in by_name["26b-a4b"].modalities
    for e in by_name.values():
        # bfloat16 stores two bytes per weight; the published count leaves out at most the towers.
        assert 0.98 < e.download_bytes / 2e9 / e.parameters < 1.05
        assert e.active <= e.parameters


@pytest.mark.parametrize(("typed", "near"), [("e2", "e2b"), ("26b-a4", "26b-a4b"), ("31b-bse", "31b-base")])
def test_an_unknown_name_is_told_the_nearest_and_all(typed, near):
    error = catalog.unknown(typed)
    assert isinstance(error, ModelNotFoundError) and error.exit_code == 3
    assert f"did you mean {near!r}" in str(error)
    assert all(name in str(error) for name in catalog.names()) and "\n" not in str(error)


def test_a_name_like_nothing_gets_no_suggestion():
    assert "did you mean" not in str(catalog.unknown("llama"))


def test_the_12b_is_told_apart():
    assert "gemma4_unified" in str(catalog.unknown("gemma-4-12b-it"))


# Parameters of the text model as published for 26B-A4B and 31B; for the others the published count, less the
# towers (167.4 and 304.8 million), and with the k_proj, v_proj and k_norm that the files carry and no graph
# uses.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [("26b-a4b", 25_233_141_790), ("31b-base", 30_697_345_340), ("e2b", 4.632e9), ("e4b", 7.469e9)],
)
def test_published_shapes_add_up(name, parameters):
    config = catalog.published_config(name)
    raw = {**dataclasses.asdict(config.text), "enable_moe_block": config.text.num_experts > 0}
    unused = {
        n
        for n in tiny.text_shapes(raw)
        if n.startswith("layers.")
        and int(n.split(".")[1]) >= config.text.first_shared_layer
        and any(part in n for part in (".k_proj", ".v_proj", ".k_norm"))
    }
    total = sum(math.prod(shape) for n, shape in tiny.text_shapes(raw).items() if n not in unused)
    assert total == parameters if isinstance(parameters, int) else abs(total / parameters - 1) < 1e-3
    assert config.text.max_position_embeddings == catalog.find(name).context
