"""The vision tower and the pixels against transformers running beside it, on other seeds, sizes and files.

Skipped without torch and transformers. The same comparisons from stored references: `test_vision.py`,
`test_vision_images.py`.
"""

import io
import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
import vision_cases as cases
from optional import optional, transformers_with_gemma4
from PIL import Image

from mlx_gemma4 import loading
from mlx_gemma4.media.images import TOKEN_BUDGETS, load_image, target_size
from mlx_gemma4.models.vision import encode_images

torch = optional("torch")
transformers = transformers_with_gemma4()

sys.path.insert(0, str(Path(__file__).parent / "fixtures"))
import make_vision  # noqa: E402
from transformers.models.gemma4.image_processing_pil_gemma4 import (  # noqa: E402
    Gemma4ImageProcessorPil,
    get_aspect_ratio_preserving_size,
)

transformers.logging.set_verbosity_error()
LIMIT = 1e-4


@pytest.mark.parametrize("case", cases.CASES)
@pytest.mark.parametrize("seed", [11, 12])
def test_a_padded_batch_of_theirs_is_a_packed_one_of_ours(case, seed):
    """They pad to the largest; the features are the same without."""
    theirs, (tower, projector) = make_vision.build(case, seed), cases.build(case, seed)
    grids = [(6, 9), (3, 3), (12, 6), (9, 9)]
    pixels = [cases.patches(r, c, seed) for r, c in grids]
    positions = [cases.grid(r, c) for r, c in grids]
    most = max(map(len, pixels))
    padded = np.stack([np.pad(p, ((0, most - len(p)), (0, 0))) for p in pixels])
    where = np.stack([np.pad(p, ((0, most - len(p)), (0, 0)), constant_values=-1) for p in positions])
    features, embeddings = make_vision.run(*theirs, padded, where)
    ours = tower(mx.array(np.concatenate(pixels)), np.concatenate(positions), [len(p) for p in pixels])
    assert cases.relative(ours, features) <= LIMIT
    assert cases.relative(projector(ours), embeddings) <= LIMIT


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_checkpoint_from_pictures_to_embeddings(family, tmp_path):
    """Their processor and `get_image_features`, our `load_image` and `encode_images`, one folder."""
    folder = tiny.make_tiny(tmp_path / family, family, seed=9, towers=True)
    raw = json.loads((folder / "config.json").read_text())
    raw["vision_config"]["rope_parameters"]["rope_type"] = "axial"
    config = transformers.Gemma4Config.from_dict(raw)
    theirs = transformers.Gemma4ForConditionalGeneration.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model = loading.load_model(folder, dtype="float32", towers=True)
    sources = [cases.picture(h, w) for h, w in ((48, 48), (90, 400), (500, 300), (20, 31))]
    found = encode_images(model, [load_image(s, 70) for s in sources])
    inputs = Gemma4ImageProcessorPil()([Image.fromarray(s) for s in sources], max_soft_tokens=70, return_tensors="pt")
    with torch.no_grad():
        expected = theirs.model.get_image_features(
            inputs["pixel_values"].float(), inputs["image_position_ids"]
        ).pooler_output
    for ours, reference in zip(found, expected, strict=True):
        assert cases.relative(ours, reference.numpy()) <= LIMIT


@pytest.mark.parametrize("tokens", TOKEN_BUDGETS)
def test_every_size(tokens):
    rng = np.random.default_rng(tokens)
    for height, width in np.exp(rng.uniform(0, np.log(20_000), (400, 2))).astype(int).tolist():
        assert target_size(height, width, tokens) == get_aspect_ratio_preserving_size(height, width, 16, 9 * tokens, 3)


@pytest.mark.parametrize("tokens", TOKEN_BUDGETS)
@pytest.mark.parametrize(("height", "width"), [(37, 90), (801, 640), (5, 300)])
def test_every_pixel(tokens, height, width):
    levels, positions = make_vision.processed(height, width, tokens)
    ours = load_image(cases.picture(height, width), tokens)
    assert np.array_equal(ours.patches, levels) and np.array_equal(ours.positions, positions)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *[("RGB", k) for k in ("png", "jpeg", "webp", "gif", "bmp", "tiff")],
        *[(m, "png") for m in ("RGBA", "LA", "L", "P", "1")],
        *[("CMYK", k) for k in ("jpeg", "tiff")],
        ("RGBA", "webp"),
    ],
)
def test_files_of_every_kind(mode, kind, tmp_path):
    """Their way from a file: PIL's picture, turned upright, into the processor."""
    source = Image.fromarray(cases.picture(90, 130)).convert("RGBA" if "A" in mode else "RGB")
    if "A" in mode:
        source.putalpha(Image.fromarray(cases.picture(90, 130)[:, :, 0]))
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / f"picture.{kind}"
    source.convert(mode).save(path, kind, **({"exif": exif} if kind not in ("gif", "bmp") else {}))
    theirs = transformers.image_utils.PIL.ImageOps.exif_transpose(Image.open(io.BytesIO(path.read_bytes())))
    found = Gemma4ImageProcessorPil()([theirs], max_soft_tokens=70, return_tensors="np")
    ours = load_image(path, 70)
    expected = np.rint(np.asarray(found["pixel_values"])[0, : len(ours.patches)] * 255)
    assert np.array_equal(ours.patches, expected)
    assert ours.tokens == int(np.asarray(found["num_soft_tokens_per_image"])[0])
