"""Sound from one sample rate to another.

Owns: one function, a windowed-sinc filter evaluated where the new samples lie. Here rather than a dependency: the
libraries that do this well are under the LGPL or bring a scientific stack, and decoders interpolate linearly.
"""

import math

import numpy as np

# Up to ROLLOFF of the lower of both Nyquist frequencies less a twentieth passes; 100 dB below are reached at that
# frequency itself. CROSSINGS: zeros of the sinc on each side; BETA: Kaiser's formula for 100 dB.
ROLLOFF, CROSSINGS, BETA = 0.956, 72, 10.06
BLOCK = 1 << 18  # output samples of one matrix product


def resample(samples: np.ndarray, rate: int, target: int) -> np.ndarray:
    """float32 [n] at `rate` -> float32 [ceil(n * target / rate)] at `target`, no delay, no change of level."""
    if rate == target or not len(samples):
        return samples
    common = math.gcd(rate, target)
    up, down = target // common, rate // common
    cutoff = ROLLOFF * min(1.0, target / rate)  # of the input's Nyquist frequency
    half = math.ceil(CROSSINGS / cutoff)
    total = -(-len(samples) * up // down)
    padded = np.pad(samples.astype(np.float32), (half, half + 1))
    seen = np.lib.stride_tricks.sliding_window_view(padded, 2 * half)
    taps = np.arange(1 - half, half + 1)
    out = np.empty(total, np.float32)
    for phase in range(min(up, total)):
        # Outputs phase, phase + up, ... lie at the same fraction of an input sample behind inputs `first`, + down, ...
        first, fraction = divmod(phase * down, up)
        distance = taps - fraction / up
        window = np.i0(BETA * np.sqrt(np.maximum(0.0, 1 - (distance / half) ** 2)))
        kernel = np.sinc(cutoff * distance) * window
        kernel = (kernel / kernel.sum()).astype(np.float32)
        count = len(range(phase, total, up))
        rows = seen[first + 1 :: down][:count]
        for start in range(0, count, BLOCK):
            out[phase + start * up : phase + (start + BLOCK) * up : up] = rows[start : start + BLOCK] @ kernel
    return out
