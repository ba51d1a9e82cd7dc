"""Log-mel features and token counts against transformers' own, kept in `fixtures/audio/mel.npz`."""

import audio_cases as cases
import numpy as np
import pytest

from mlx_gemma4.errors import ConfigError
from mlx_gemma4.media import mel

REFERENCE = np.load(cases.FOLDER / "mel.npz")


@pytest.mark.parametrize("seed", range(len(cases.SAMPLES)))
def test_features(seed):
    samples = cases.SAMPLES[seed]
    found = mel.log_mel(cases.sound(samples, seed))
    assert found.dtype == np.float32 and found.shape == (REFERENCE[f"{samples}/frames"], 128)
    difference = np.abs(found[cases.kept(len(found))] - REFERENCE[f"{samples}/mel"]).max()
    # Equal to the last bit on the machine that made the references; other libraries may round sums differently.
    assert difference <= 2e-5


def test_silence_is_the_floor():
    assert np.allclose(mel.log_mel(np.zeros(1000, np.float32)), np.log(1e-3))


COUNTS = [(0, 0, 0), (160, 0, 0), (161, 1, 1), (320, 1, 1), (321, 2, 1), (3_200, 19, 5), (16_000, 99, 25)]
COUNTS += [(16_160, 100, 25), (16_161, 101, 26), (478_400, 2_989, 748), (480_000, 2_999, 750)]


@pytest.mark.parametrize(("samples", "frames", "tokens"), COUNTS)
def test_counts(samples, frames, tokens):
    """As the reference's `_compute_audio_num_tokens`, and as many frames as there are."""
    assert mel.frame_count(samples) == frames == len(mel.log_mel(np.zeros(samples, np.float32)))
    assert mel.token_count(samples) == tokens


def test_float64_sound_is_rounded_as_the_reference_does():
    """Its feature extractor pads to float32 first."""
    x = cases.sound(5_000)
    assert np.array_equal(mel.log_mel(x.astype(np.float64)), mel.log_mel(x))


def test_another_feature_extractor_is_refused():
    published = {"feature_size": 128, "sampling_rate": 16_000, "dither": 0.0, "return_attention_mask": True}
    mel.check_feature_extractor(published)
    with pytest.raises(ConfigError, match=r"preemphasis to 0\.97"):
        mel.check_feature_extractor(published | {"preemphasis": 0.97})


def test_a_checkpoint_with_other_features_is_refused(tmp_path):
    from tiny import make_tiny

    from mlx_gemma4.errors import ConfigError
    from mlx_gemma4.loading import load_model

    folder = make_tiny(tmp_path / "m", "e2b", towers=True, tokenizer=False)
    for text, what in (('{"feature_extractor": {"preemphasis": 0.97}}', "preemphasis"), ("{", "not valid JSON")):
        (folder / "processor_config.json").write_text(text)
        load_model(folder)
        with pytest.raises(ConfigError, match=what):
            load_model(folder, towers=True)
