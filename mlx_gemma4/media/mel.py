"""Log-mel features of sound, exactly as transformers computes them for Gemma 4.

Owns: the framing, the spectrum, the mel filters and how many soft tokens a number of samples becomes. Leaves decoding
and cutting into windows to `audio.py` beside this file, and the network to `models/audio.py`.

Source: transformers `feature_extraction_gemma4.py: Gemma4AudioFeatureExtractor`, `audio_utils.py: mel_filter_bank`.
Types are those of the source, operation by operation, so that the numbers are, too: frames and spectrum in float32,
filters and logarithm in float64, the result in float32.
"""

import math
from functools import cache
from typing import Any

import numpy as np

from ..config_audio import MEL_BINS
from ..errors import ConfigError

SAMPLE_RATE = 16_000
FRAME = 320  # samples of a frame, 20 ms
HOP = 160  # from frame to frame, 10 ms
FFT = 512
TOP_HZ = 8000.0
FLOOR = 1e-3  # added before the logarithm
# A frame counts if it and one sample more (transformers reserves it for pre-emphasis) are sound. Frame 0 starts half a
# frame before the sound, so the shortest sound that has a frame is:
SHORTEST = FRAME // 2 + 1

FRAMES_PER_TOKEN = 4  # two convolutions of stride 2
SAMPLES_PER_TOKEN = FRAMES_PER_TOKEN * HOP  # 40 ms

# `feature_extractor` in processor_config.json, as published; what is computed here.
_PUBLISHED = {
    "dither": 0.0,
    "feature_size": MEL_BINS,
    "fft_length": FFT,
    "fft_overdrive": False,
    "frame_length": FRAME,
    "hop_length": HOP,
    "input_scale_factor": 1.0,
    "max_frequency": TOP_HZ,
    "mel_floor": FLOOR,
    "min_frequency": 0.0,
    "padding_value": 0.0,
    "per_bin_mean": None,
    "per_bin_stddev": None,
    "preemphasis": 0.0,
    "sampling_rate": SAMPLE_RATE,
}


def check_feature_extractor(raw: dict[str, Any]) -> None:
    """Raises ConfigError if `raw`, processor_config.json's `feature_extractor`, asks for other features than these."""
    for name, value in _PUBLISHED.items():
        if raw.get(name, value) != value:
            raise ConfigError(
                f"processor_config.json sets the feature extractor's {name} to {raw[name]!r}; "
                f"this package computes {value!r}, as every published Gemma 4"
            )


def frame_count(samples: int) -> int:
    """Frames that lie wholly in a sound of so many samples at 16 kHz."""
    return max(0, (samples - SHORTEST) // HOP + 1)


def token_count(samples: int) -> int:
    """Soft tokens of a sound of so many samples: one per 40 ms, 25 per second.

    Source: transformers `processing_gemma4.py: Gemma4Processor._compute_audio_num_tokens`.
    """
    return math.ceil(frame_count(samples) / FRAMES_PER_TOKEN)


def log_mel(samples: np.ndarray) -> np.ndarray:
    """Mono sound at 16 kHz, float [n] in [-1, 1] -> log-mel features, float32 [frame_count(n), 128].

    Only whole frames: what transformers marks valid in `input_features_mask`, without what it pads.
    """
    frames = frame_count(len(samples))
    if not frames:
        return np.zeros((0, MEL_BINS), np.float32)
    padded = np.concatenate([np.zeros(FRAME // 2, np.float32), samples.astype(np.float32)])
    framed = np.lib.stride_tricks.sliding_window_view(padded, FRAME)[::HOP][:frames]
    # numpy computes this in float32 since 2.0, as it does for transformers.
    spectrum = np.abs(np.fft.rfft(framed * _window(), n=FFT, axis=-1))
    return np.log(spectrum @ _filters() + FLOOR).astype(np.float32)


@cache
def _window() -> np.ndarray:
    """A periodic Hann window, float32 [320]."""
    return np.hanning(FRAME + 1)[:-1].astype(np.float32)


@cache
def _filters() -> np.ndarray:
    """Triangles between neighbours of 130 points, evenly spaced in HTK mel: float64 [257, 128]."""
    top = 2595.0 * np.log10(1.0 + TOP_HZ / 700.0)
    corners = 700.0 * (np.power(10, np.linspace(0.0, top, MEL_BINS + 2) / 2595.0) - 1.0)
    bins = np.linspace(0, SAMPLE_RATE // 2, FFT // 2 + 1)
    slopes = corners[None] - bins[:, None]
    widths = np.diff(corners)
    falling, rising = -slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]
    return np.maximum(np.zeros(1), np.minimum(falling, rising))
