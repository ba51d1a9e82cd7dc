"""Sound against transformers and mlx-vlm running beside it: features, towers of other shapes, and where mlx-vlm errs.

Measured on a CPU (x86, MLX 0.32.4, transformers 5.23, mlx-vlm 0.7.10), largest difference to transformers over the
root mean square of what is compared:

    what a clip becomes in the text stream          ours        mlx-vlm
    one clip of 1 s                                 2.4e-06     2.7e-06
    1 s beside 3 s, the clip of 1 s                 2.4e-06     2.7e-06
    1 s beside 3 s, the clip of 3 s                 3.9e-06     3.5e+00     the first clip's padding stands there

Each part is skipped where its peer is missing. The same with stored references: `test_audio_tower.py`.
"""

import json
import sys
from pathlib import Path

import audio_cases as cases
import mlx.core as mx
import numpy as np
import pytest
import tiny
from optional import optional, transformers_with_gemma4

from mlx_gemma4 import loading
from mlx_gemma4.config import Gemma4Config
from mlx_gemma4.media.audio import Sound, clips_of
from mlx_gemma4.media.mel import log_mel, token_count
from mlx_gemma4.models.audio import encode_clips

torch = optional("torch")
transformers = transformers_with_gemma4()
from transformers.models.gemma4 import feature_extraction_gemma4, modeling_gemma4  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent / "fixtures"))
import make_audio  # noqa: E402

transformers.logging.set_verbosity_error()

CLOSE = 1e-4
ONE, THREE = 16_000, 48_000


def their_features(sounds: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    batch = feature_extraction_gemma4.Gemma4AudioFeatureExtractor()(sounds, return_tensors="np")
    return batch["input_features"], batch["input_features_mask"]


@pytest.mark.parametrize("samples", [161, 320, 321, 3_200, 9_001, 16_000, 160_000, 478_400, 480_000])
@pytest.mark.parametrize("kind", ["sound", "noise", "loud"])
def test_features_are_theirs_to_the_last_bit(samples, kind):
    rng = np.random.default_rng(samples)
    x = cases.sound(samples, 3)
    if kind != "sound":
        x = ((0.1 if kind == "noise" else 1.0) * rng.standard_normal(samples)).astype(np.float32)
    mel, mask = their_features([x])
    assert np.array_equal(log_mel(x), mel[0][mask[0]])
    assert token_count(samples) == mask[0][::2][::2].sum()


def test_features_in_a_batch_are_theirs():
    sounds = [cases.sound(n, n) for n in (ONE, THREE, 5_000)]
    mel, mask = their_features(sounds)
    for x, theirs, valid in zip(sounds, mel, mask, strict=True):
        assert np.abs(log_mel(x) - theirs[valid]).max() <= 1e-6


def drawn(seed: int) -> dict:
    """audio_config with shapes by lot."""
    rng = np.random.default_rng(seed)
    heads, chunk = int(rng.choice([1, 2, 4])), int(rng.integers(2, 20))
    return cases.CASES["published"] | {
        "hidden_size": 16 * heads * int(rng.integers(1, 3)),
        "num_attention_heads": heads,
        "num_hidden_layers": int(rng.integers(1, 4)),
        "subsampling_conv_channels": [128, int(rng.integers(2, 9))],
        "attention_chunk_size": chunk,
        "attention_context_left": chunk + 1,
        "attention_logit_cap": float(rng.choice([1.0, 5.0, 50.0])),
        "conv_kernel_size": int(rng.integers(2, 8)),
        "residual_weight": float(rng.choice([0.3, 0.5, 1.0])),
        "gradient_clipping": float(rng.choice([1.0, 2.5, 1e10])),
        "output_proj_dims": int(rng.choice([8, 40])),
        "use_clipped_linears": bool(rng.integers(2)),
    }


@pytest.mark.parametrize("seed", range(6))
def test_other_shapes(seed, monkeypatch):
    monkeypatch.setitem(cases.CASES, "drawn", drawn(seed))
    sounds = [cases.sound(n, seed) for n in (ONE, 161, 21_333, 7_000)]
    mel, mask = their_features(sounds)
    models = make_audio.build("drawn", seed)
    theirs, exact = make_audio.run(*models, mel, mask), make_audio.exactly(*models, mel, mask)
    tower, projector = cases.build("drawn", seed)
    features, valid = tower(mx.array(mel), mx.array(mask))
    ours = [np.array(x) for x in (features, projector(features))]
    valid = np.array(valid)
    for row in range(len(sounds)):
        for found, wanted, truth in zip(ours, theirs[row], exact[row], strict=True):
            # Some of these towers amplify rounding: no further from float64 than theirs in float32 may be.
            noise = cases.relative(wanted, truth)
            assert cases.relative(found[row][valid[row]], truth) <= max(CLOSE, 1.5 * noise)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tiny.make_tiny(tmp_path_factory.mktemp("hears"), "e2b", towers=True)


@pytest.fixture(scope="module")
def theirs(checkpoint):
    """transformers' whole model of the checkpoint."""
    return transformers.Gemma4ForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.no_grad()
def their_clips(model, mel: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    out = model.model.get_audio_features(torch.from_numpy(mel), torch.from_numpy(mask), return_dict=True)
    return [x[m].numpy() for x, m in zip(out.pooler_output, out.attention_mask, strict=True)]


@pytest.mark.parametrize("samples", [[3_200], [ONE], [160_000], [478_400], [ONE, THREE], [THREE, ONE, 9_001, ONE]])
def test_a_loaded_checkpoint(checkpoint, theirs, samples):
    """From samples to the text stream, all through our own code and all through theirs."""
    sounds = [cases.sound(n, i) for i, n in enumerate(samples)]
    model = loading.load_model(checkpoint, towers=True)
    ours = encode_clips(model, [clip for x in sounds for clip in clips_of(Sound(x))])
    for found, wanted in zip(ours, their_clips(theirs, *their_features(sounds)), strict=True):
        assert cases.relative(np.array(found), wanted) <= CLOSE


def vlm_clips(checkpoint: Path, mel: np.ndarray, mask: np.ndarray, tokens: list[int]) -> list[np.ndarray]:
    """What mlx-vlm puts where the placeholders of each clip stand."""
    from mlx_vlm.utils import load_model

    model, raw = load_model(checkpoint), json.loads((checkpoint / "config.json").read_text())
    audio, begin, end = raw["audio_token_id"], raw["boa_token_id"], raw["eoa_token_id"]
    ids = [2]
    for count in tokens:
        ids += [begin, *[audio] * count, end]
    call = {"input_features": mx.array(mel), "input_features_mask": mx.array(mask)}
    embedded = np.array(model.get_input_embeddings(mx.array([ids]), **call).inputs_embeds[0])
    return np.split(embedded[np.array(ids) == audio], np.cumsum(tokens)[:-1])


@pytest.mark.parametrize("samples", [[ONE], [ONE, THREE]], ids=["one", "two"])
def test_mlx_vlm_misaligns_unequal_clips(checkpoint, theirs, samples):
    """Its encoder pads the shorter clip, drops the mask, and fills the second clip's places from the padding on."""
    optional("mlx_vlm")
    sounds = [cases.sound(n, i) for i, n in enumerate(samples)]
    mel, mask = their_features(sounds)
    truth = their_clips(theirs, mel, mask)
    clips = [clip for x in sounds for clip in clips_of(Sound(x))]
    ours = [np.array(x) for x in encode_clips(loading.load_model(checkpoint, towers=True), clips)]
    peer = vlm_clips(checkpoint, mel, mask, [clip.tokens for clip in clips])
    for n, t, a, b in zip(samples, truth, ours, peer, strict=True):
        print(
            f"\n{n} of {samples} samples: ours {cases.relative(a, t):.1e}, mlx-vlm {cases.relative(b, t):.1e}", end=""
        )
        assert cases.relative(a, t) <= CLOSE
    # Its error or ours: the day it is mended, say so here and in the table above.
    assert cases.relative(peer[0], truth[0]) <= CLOSE
    if len(samples) > 1:
        assert cases.relative(peer[1], truth[1]) > 1
        padding = clips[1].tokens - clips[0].tokens
        assert cases.relative(peer[1][padding:], truth[1][: len(peer[1]) - padding]) <= CLOSE


def test_our_configuration_is_the_checkpoint_s(checkpoint):
    """transformers reads the same numbers out of the same file."""
    raw = json.loads((checkpoint / "config.json").read_text())
    config = transformers.Gemma4Config.from_dict(raw).audio_config
    parsed = Gemma4Config.from_dict(raw).audio
    for name, value in parsed.items():
        assert getattr(config, name) == value, name
    assert hasattr(modeling_gemma4, "Gemma4AudioModel")
