"""Beeps and tones, with what can be heard in them.

Owns: the drawing of a sound at 16 kHz and the labels of soft tokens that the audio tower is taught first. Leaves
questions to `hearing.py`. High is above 900 Hz, low below 450 Hz; nothing lies between.
"""

import math
import random
from dataclasses import dataclass

import numpy as np

RATE = 16_000
LOW, HIGH = (110.0, 420.0), (950.0, 3800.0)
TOKEN = 640  # samples of a soft token


@dataclass(frozen=True)
class Note:
    """One beep or tone: where it is heard (samples), and its pitch. glide: "rises", "falls" or None."""

    start: int
    stop: int
    high: bool
    glide: str | None = None


@dataclass(frozen=True)
class Sound:
    """float32 samples at 16 kHz and the notes in them. long: one tone rather than beeps."""

    samples: np.ndarray
    notes: tuple[Note, ...]
    long: bool


def _pitch(rng: random.Random, high: bool) -> float:
    low, top = HIGH if high else LOW
    return math.exp(rng.uniform(math.log(low), math.log(top)))


def _wave(rng: random.Random, first: float, last: float, length: int, timbre: int) -> np.ndarray:
    """A note between two pitches with soft edges."""
    pitch = np.exp(np.linspace(math.log(first), math.log(last), length))
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    wave = np.sin(phase)
    if timbre == 1:
        wave = wave + 0.3 * np.sin(2 * phase) + 0.15 * np.sin(3 * phase)
    elif timbre == 2:
        wave = wave + np.where(3 * max(first, last) < 7800, np.sin(3 * phase) / 3, 0)
    edge = min(length // 4, int(RATE * rng.choice((0.003, 0.008, 0.02))))
    ramp = np.ones(length)
    ramp[:edge] = np.linspace(0, 1, edge)
    ramp[length - edge :] = np.linspace(1, 0, edge)
    return wave * ramp


def draw(rng: random.Random, longest: float = 5.0, beeps: bool = False) -> Sound:
    """A sound of 0.3 to `longest` seconds. beeps: no long tone."""
    lead, timbre = rng.uniform(0.0, 0.35), rng.choice((0, 0, 1, 2))
    notes: list[Note] = []
    pieces: list[tuple[int, np.ndarray]] = []
    long = not beeps and rng.random() < 0.4
    if long:
        length, high = rng.uniform(0.9, longest - lead - 0.1), rng.random() < 0.5
        glide = rng.choice((None, "rises", "falls"))
        first = last = _pitch(rng, high)
        if glide:
            low, top = rng.uniform(130, 700), 0.0
            top = min(3900.0, low * rng.uniform(2.0, 5.0))
            first, last = (low, top) if glide == "rises" else (top, low)
        at, n = int(lead * RATE), int(length * RATE)
        notes.append(Note(at, at + n, high, glide))
        pieces.append((at, _wave(rng, first, last, n, timbre)))
        end = lead + length
    else:
        count = rng.choices((1, 2, 3, 4, 5, 6), (18, 20, 20, 18, 13, 11))[0]
        beep, gap = rng.uniform(0.09, 0.4), rng.uniform(0.1, 0.45)
        fit = (longest - lead) / (count * (beep + gap))
        beep, gap = (max(0.08, beep * fit), max(0.09, gap * fit)) if fit < 1 else (beep, gap)
        mixed, high = rng.random() < 0.3, rng.random() < 0.5
        same, end = (_pitch(rng, False), _pitch(rng, True)), lead
        for _ in range(count):
            up = rng.random() < 0.5 if mixed else high
            n, at = int(beep * rng.uniform(0.85, 1.15) * RATE), int(end * RATE)
            notes.append(Note(at, at + n, up))
            pieces.append((at, _wave(rng, same[up], same[up], n, timbre)))
            end += n / RATE + gap * rng.uniform(0.85, 1.15)
        end -= gap * 0.8
    total = int(RATE * max(0.3, end + rng.uniform(0.02, 0.4)))
    total = max(total, notes[-1].stop)
    samples = np.zeros(total)
    for at, wave in pieces:
        samples[at : at + len(wave)] += wave
    samples *= rng.choice((0.8, 0.5, 0.3, 0.15, 0.06)) / max(1.0, np.abs(samples).max())
    if rng.random() < 0.4:
        noise = np.random.default_rng(rng.randrange(1 << 30)).normal(0, 1, total)
        samples += noise * np.abs(samples).max() * rng.choice((0.003, 0.01, 0.03))
    return Sound(samples.astype(np.float32), tuple(notes), long)


# What each soft token is asked for while the tower is taught alone: name -> number of classes.
LABELS = {"heard": 2, "onset": 2, "end": 2, "high": 3, "glide": 4, "ordinal": 7, "length": 4}


def labels(sound: Sound, tokens: int) -> dict[str, np.ndarray]:
    """Classes of each soft token [tokens]. A token hears up to its own end."""
    out = {name: np.zeros(tokens, np.int64) for name in LABELS}
    for number, note in enumerate(sound.notes, 1):
        first, last = min(tokens - 1, note.start // TOKEN), min(tokens - 1, (note.stop - 1) // TOKEN)
        out["heard"][first : last + 1] = 1
        out["onset"][first] = 1
        out["end"][last] = 1
        out["ordinal"][first:] = number
        if note.glide is None:
            out["high"][first : last + 1] = 2 if note.high else 1
        out["length"][first : last + 1] = np.minimum(3, (np.arange(first, last + 1) - first) // 8)
        if sound.long:
            out["glide"][first : last + 1] = {None: 1, "rises": 2, "falls": 3}[note.glide]
            out["glide"][first : min(first + 6, last)] = -100  # not yet to be told
        else:
            out["glide"][first : last + 1] = -100
    return out
