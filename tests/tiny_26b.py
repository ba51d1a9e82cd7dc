"""A tiny checkpoint of the 26B kind that sees: experts, layers whose keys are their values, a vision tower.

Owns the folder that `make_26b` writes: everything a published one has, from the config to the processor's, so that
`load`, `Chat`, the command line and transformers' own processor can use it. Weights are random; shapes and the
tokenizer are those of `tiny.py`, the template is the published one.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import tiny

TEMPLATE = Path(__file__).parent / "fixtures" / "chat_template" / "chat_template.12B-26B-31B.jinja"
FAMILY = "26b-a4b"

# As the Hub's processor_config.json of all four sizes, with 70 tokens for a picture: a tiny model need not see much.
_RESCALE = {"do_rescale": True, "rescale_factor": 1 / 255, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
_PATCHES = {"patch_size": 16, "pooling_kernel_size": 3, "max_soft_tokens": 70, "resample": 3, "do_resize": True}
PROCESSOR: dict[str, Any] = {
    "audio_ms_per_token": 40,
    "audio_seq_length": 750,
    "feature_extractor": {
        "feature_extractor_type": "Gemma4AudioFeatureExtractor",
        "feature_size": 128,
        "sampling_rate": 16_000,
        "padding_side": "right",
        "padding_value": 0.0,
        "frame_length": 320,
        "hop_length": 160,
        "fft_length": 512,
        "mel_floor": 0.001,
        "return_attention_mask": True,
    },
    "image_processor": {
        "image_processor_type": "Gemma4ImageProcessor",
        "do_convert_rgb": True,
        "do_normalize": False,
        **_RESCALE,
        **_PATCHES,
    },
    "image_seq_length": 70,
    "processor_class": "Gemma4Processor",
    "video_processor": {
        "video_processor_type": "Gemma4VideoProcessor",
        "do_sample_frames": True,
        "num_frames": 32,
        "do_convert_rgb": True,
        "do_normalize": True,
        **_RESCALE,
        **_PATCHES,
    },
}
_NAMES = {"image": "<|image|>", "boi": "<|image>", "eoi": "<image|>"}
_NAMES |= {"audio": "<|audio|>", "boa": "<|audio>", "eoa": "<audio|>"}


def make_26b(folder: str | Path, seed: int = 0, dtype: str = "float32", **overrides: Any) -> Path:
    """Writes the checkpoint and returns its folder; `overrides` go to text_config. Takes some 0.2 s.

    The window is 32 unless another is given: shorter than a picture of 70 tokens.
    """
    folder = tiny.make_tiny(folder, FAMILY, seed, dtype, towers=True, **{"sliding_window": 32, **overrides})
    shutil.copy(TEMPLATE, folder / "chat_template.jinja")
    (folder / "processor_config.json").write_text(json.dumps(PROCESSOR, indent=2))
    path = folder / "tokenizer_config.json"
    names = {f"{name}_token": token for name, token in _NAMES.items()}
    settings = json.loads(path.read_text()) | names | {"processor_class": "Gemma4Processor"}
    settings["extra_special_tokens"] = ["<|video|>"]
    path.write_text(json.dumps(settings, indent=2))
    return folder
