"""Converted checkpoints see and hear in mlx-vlm what they see and hear here: one picture, one clip, every family.

Logits for E2B and E4B. For 26B-A4B and 31B, whose pictures mlx-vlm reads from left to right, the pictures' embeddings.
"""

import media_cases as cases
import mlx.core as mx
import numpy as np
import pytest
import tiny
from optional import optional

from mlx_gemma4.conversions.convert import convert
from mlx_gemma4.loading import load_model
from mlx_gemma4.media.prompt import Prompt
from mlx_gemma4.models.merging import encode
from mlx_gemma4.tokenizer import Tokenizer

# mlx-vlm rounds in other places; these models' logits are in the tens.
CLOSE = 1e-4


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """source(family) -> a tiny checkpoint with towers, made once."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = tiny.make_tiny(tmp_path_factory.mktemp("hf") / family, family, seed=5, towers=True)
        return made[family]

    return get


def prompt_of(name: str, folder) -> Prompt:
    return cases.prompt(cases.CASES[name], Tokenizer.from_folder(folder))


def given(prompt: Prompt) -> dict[str, mx.array]:
    """One picture or clip, as mlx-vlm's graph takes it."""
    (run,) = prompt.runs
    if run.is_picture:
        pixels = mx.array(run.part.patches[None] / np.float32(255))
        return {"pixel_values": pixels, "image_position_ids": mx.array(run.part.positions[None])}
    return {
        "input_features": mx.array(run.part.mel[None]),
        "input_features_mask": mx.ones((1, len(run.part.mel)), mx.bool_),
    }


def furthest(a: mx.array, b: mx.array) -> float:
    """Relative to the largest of `b`."""
    return (mx.max(mx.abs(a - b)) / mx.max(mx.abs(b))).item()


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("family", list(tiny.FAMILIES))
@pytest.mark.filterwarnings("ignore")
def test_mlx_vlm_sees_and_hears_the_same(source, tmp_path, family, bits):
    peer = optional("mlx_vlm.utils")
    convert(source(family), tmp_path / "mlx", bits)
    theirs = peer.load_model(tmp_path / "mlx")
    ours = load_model(tmp_path / "mlx", dtype="float32", towers=True)
    for name in ("image", "audio-1") if family in cases.HEARING else ("image",):
        prompt = prompt_of(name, source(family))
        soft, media = encode(ours, prompt.runs).soft(0, len(prompt)), given(prompt)
        if name == "image":
            seen = theirs.embed_vision(theirs.vision_tower(media["pixel_values"], media["image_position_ids"]))
            assert furthest(seen.reshape(soft.features.shape), soft.features) <= CLOSE
        if family in cases.LOOKING_AHEAD:
            continue
        ids = mx.array([prompt.ids])
        found = ours(ids, media=soft)
        assert furthest(theirs(ids, cache=theirs.make_cache(), **media).logits, found) <= CLOSE, name
        # What it is given matters: not a comparison of text with text.
        assert furthest(ours(ids), found) > 0.05
