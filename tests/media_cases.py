"""Prompts with pictures, sound and video that any machine makes alike, for tiny models of all four families.

Owns the cases of `fixtures/media/`, what is drawn and played in them, and the models' configurations and weights from a
seed. What is in the fixtures and how they were made: `fixtures/make_media.py`. Used by `test_media_parity*.py` and
`test_media_peers.py`.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import audio_cases
import mlx.core as mx
import numpy as np
import recipe
import tiny

from mlx_gemma4.config import Gemma4Config
from mlx_gemma4.media.audio import clips_of, read_sound
from mlx_gemma4.media.items import Item, audio_item, image_item
from mlx_gemma4.media.prompt import Marks, Prompt, expand
from mlx_gemma4.media.video import load_video
from mlx_gemma4.models.gemma4 import Model
from mlx_gemma4.tokenizer import Tokenizer

FOLDER = Path(__file__).parent / "fixtures" / "media"
FAMILIES = ("e2b", "e4b", "26b-a4b", "31b")
HEARING = ("e2b", "e4b")
# The large sizes' sliding layers see a whole picture at once.
LOOKING_AHEAD = ("26b-a4b", "31b")
RATE = audio_cases.RATE
SEED, QK_NORM = 7, 0.5
# Of the logits, these columns are kept.
VOCABULARY = np.arange(0, tiny.VOCAB, 5)
GREEDY = 12

USER, MODEL = "<bos><|turn>user\n", "<turn|>\n<|turn>model\n"


@dataclass(frozen=True)
class Picture:
    height: int
    width: int
    seed: int = 0

    def draw(self) -> np.ndarray:
        """uint8 [H, W, 3]: two ramps, stripes, and 8 x 8 coloured tiles that no other seed has."""
        y, x = np.arange(self.height, dtype=np.uint32)[:, None], np.arange(self.width, dtype=np.uint32)[None]
        tiles = recipe.uniform("tiles", (8, 8, 3), self.seed)
        rows, columns = (y[:, 0] * 8 // self.height).astype(int), (x[0] * 8 // self.width).astype(int)
        out = (tiles * 160).astype(np.uint8)[rows][:, columns]
        out[..., 0] += (x * 90 // self.width).astype(np.uint8)
        out[..., 1] += (y * 90 // self.height).astype(np.uint8)
        out[..., 2] += ((x * 7 + y * 13 + self.seed) % 91).astype(np.uint8)
        return out


@dataclass(frozen=True)
class Sound:
    samples: int
    seed: int = 0

    def play(self) -> np.ndarray:
        """float32 [samples], `RATE` times a second."""
        return audio_cases.sound(self.samples, self.seed)


@dataclass(frozen=True)
class Movie:
    frames: int
    height: int = 384  # 64 tokens, and of a size that needs no scaling
    width: int = 384
    seed: int = 0
    every: float = 1.0  # seconds from frame to frame

    def draw(self) -> list[np.ndarray]:
        return [Picture(self.height, self.width, 1000 * self.seed + i).draw() for i in range(self.frames)]

    @property
    def seconds(self) -> list[float]:
        return [i * self.every for i in range(self.frames)]


Part = str | Picture | Sound | Movie


@dataclass(frozen=True)
class Case:
    parts: tuple[Part, ...]
    families: tuple[str, ...] = FAMILIES
    window: int = 8
    budget: int = 70
    greedy: bool = False
    # The families whose reference is stored. The others' are compared live: these cases take a second each.
    stored: tuple[str, ...] = FAMILIES

    def of(self, kind: type) -> list[Any]:
        return [part for part in self.parts if isinstance(part, kind)]

    @property
    def text(self) -> str:
        """The rendered template, media as placeholders."""
        marks = {Picture: "<|image|>", Sound: "<|audio|>", Movie: "<|video|>"}
        return USER + "".join(p if isinstance(p, str) else marks[type(p)] for p in self.parts) + MODEL


def _prose(length: int, seed: int = 0) -> str:
    """Text of about as many tokens: words of the tiny vocabulary's letters."""
    letters = recipe.tokens(length, 29, seed)[0]
    return "".join(" " if i > 25 else chr(ord("a") + i) for i in letters)


_SMALL = Picture(120, 160, 1)
CASES: dict[str, Case] = {
    # A window of 8: every picture is longer.
    "image": Case((Picture(240, 320, 32), "what is it?"), greedy=True),
    "tall": Case((Picture(700, 60, 3), "and this?")),
    "wide": Case(("a line: ", Picture(50, 900, 4), "?")),
    "tiny": Case((Picture(5, 7, 5), "too small?")),
    "huge": Case((Picture(3000, 4000, 6), "too large?"), window=48),
    "budget-140": Case((Picture(300, 400, 7), "more?"), budget=140),
    "budget-280": Case((Picture(300, 400, 7), "more?"), budget=280, stored=("e2b", "31b")),
    "budget-560": Case((Picture(300, 400, 7), "more?"), window=100, budget=560, stored=("26b-a4b",)),
    "budget-1120": Case((Picture(300, 400, 7), "more?"), window=100, budget=1120, stored=("31b",)),
    "three-sizes": Case(
        ("one ", Picture(200, 300, 8), "two", Picture(640, 100, 9), " three ", Picture(48, 144, 10), "which?"),
        budget=140,
        greedy=True,
    ),
    "adjacent": Case((Picture(120, 160, 11), Picture(160, 120, 12), "the same?"), window=100),
    "late": Case(
        (_prose(1_550, 30), Picture(240, 320, 43), "and at last?"), window=64, greedy=True, stored=("e2b", "26b-a4b")
    ),
    # 60 tokens before the window's end, then a picture of 63 or so.
    "across-window": Case((_prose(45, 1), Picture(300, 260, 44), _prose(40, 2)), window=100, greedy=True),
    "within-window": Case((_prose(9, 3), Picture(300, 260, 15), _prose(20, 4)), window=512),
    "audio-0.2": Case((Sound(3_200, 1), "heard?"), HEARING),
    "audio-1": Case((Sound(16_000, 2), "heard?"), HEARING, greedy=True),
    "audio-10": Case(("say: ", Sound(160_000, 3), "?"), HEARING, window=64),
    "audio-29.9": Case((Sound(478_400, 4), "?"), HEARING, window=64, stored=("e2b",)),
    "audio-31": Case((Sound(496_000, 5), "?"), HEARING, window=64, stored=("e4b",)),
    "two-clips": Case(("a ", Sound(48_000, 6), "b ", Sound(11_200, 7), "longer?"), HEARING, greedy=True),
    "short-clip-first": Case((Sound(11_200, 7), "then ", Sound(48_000, 6), "longer?"), HEARING),
    "image-audio": Case((Picture(120, 160, 16), "sounds like ", Sound(20_801, 8), "?"), HEARING, greedy=True),
    "video-12": Case((Movie(12, seed=1), "what moves?"), window=100, greedy=True, stored=("e4b", "31b")),
    # Thin frames of 35 tokens.
    "video-60": Case((Movie(60, 20, 360, seed=2, every=1.5), "moves?"), window=100, stored=("26b-a4b",)),
    "video-scaled": Case(("a clip: ", Movie(3, 90, 160, seed=3, every=0.5), "?")),
    "all": Case(
        (Picture(120, 160, 17), Movie(2, seed=4), "and ", Sound(9_000, 9), "?", Sound(25_000, 10), Picture(50, 90, 18)),
        HEARING,
        window=32,
    ),
    "image-video": Case((Picture(120, 160, 17), Movie(2, seed=4), Picture(50, 90, 18), "?"), window=32, greedy=True),
}
# Rows of one batch, padded on the left; windows and budgets are equal.
BATCHES: dict[str, tuple[Case, ...]] = {
    "batch": (
        Case(("no picture",)),
        Case((Picture(240, 320, 2), "what is it?")),
        Case(("which of ", Picture(90, 48, 19), "and", Picture(120, 160, 20), _prose(60, 5))),
    ),
    "batch-audio": (
        Case((Sound(16_000, 2), "heard?"), HEARING),
        Case((Picture(48, 48, 21), "sounds like ", Sound(30_000, 11), "?"), HEARING),
        Case(("just text, and of some length",), HEARING),
    ),
}


def names(family: str, stored: bool = True) -> list[str]:
    """The cases of a family whose references are stored, or those that are compared live only."""
    return [n for n, case in CASES.items() if family in case.families and (family in case.stored) == stored]


def batches(family: str) -> list[str]:
    return [name for name, rows in BATCHES.items() if family in rows[0].families]


# ------------------------------------------------------------------ models


def config(family: str, window: int) -> dict[str, Any]:
    """config.json of a tiny model with towers of one layer, every width another."""
    out = tiny.tiny_config(family, towers=True, sliding_window=window)
    out["vision_config"] |= {"hidden_size": 32, "intermediate_size": 80, "num_attention_heads": 1}
    out["vision_config"] |= {"num_key_value_heads": 1, "head_dim": 32}
    if out["audio_config"]:
        out["audio_config"] |= {"hidden_size": 48, "num_attention_heads": 3, "output_proj_dims": 40}
    return out


@functools.cache
def weights(family: str) -> dict[str, np.ndarray]:
    """float32 by the names of the Hub, every value a bfloat16; bounds that do clip, and each of them another."""
    raw = config(family, 8)
    out = recipe.weights(raw, SEED, QK_NORM)
    for name, shape in tiny.tower_shapes(raw).items():
        if name.endswith(("_min", "_max")):
            size = 0.2 if ".down_proj." in name else 1.0
            x = size * (0.8 + recipe.uniform(name, shape, SEED)) * (-1 if name.endswith("_min") else 1)
        elif name.endswith("position_embedding_table"):
            x = 0.5 * recipe.normal(name, shape, SEED)
        elif name.endswith("std_scale"):
            x = 0.05 + 0.1 * recipe.uniform(name, shape, SEED)
        elif name.endswith(("std_bias", "per_dim_scale", "output_proj.bias")):
            x = recipe.normal(name, shape, SEED)
        elif "norm" in name:
            x = 1 + 0.2 * recipe.normal(name, shape, SEED)
        else:
            x = recipe.normal(name, shape, SEED) / np.sqrt(np.prod(shape[1:]))
        out[name] = recipe.to_bfloat16(np.asarray(x)).reshape(shape)
    return out


@functools.lru_cache(maxsize=8)
def build(family: str, window: int) -> Model:
    """Our model, with its towers, in float32. Shared: do not change it."""
    model = Model(Gemma4Config.from_dict(config(family, window)), towers=True)
    found = model.sanitize({name: mx.array(value) for name, value in weights(family).items()})
    model.load_weights(list(found.items()), strict=True)
    model.eval()
    mx.eval(model.parameters(), model.private_arrays())
    return model


# ------------------------------------------------------------------ prompts


@functools.cache
def item(part: Picture | Sound | Movie, budget: int) -> Item:
    """What our library makes of a part, its file already decoded."""
    if isinstance(part, Picture):
        return image_item(part.draw(), budget)
    if isinstance(part, Sound):
        return audio_item(part.play(), RATE)
    video = load_video(part.draw(), rate=1 / part.every, max_frames=part.frames)
    return Item("video", video.name, video.frames, video.stamps)


def prompt(case: Case, tokenizer: Tokenizer) -> Prompt:
    """Our prompt: ids, and where what stands."""
    items = [item(part, case.budget) for part in case.parts if not isinstance(part, str)]
    return expand(case.text, items, tokenizer, Marks.from_config(config("e2b", case.window)))


def windows(part: Sound) -> list[np.ndarray]:
    """The pieces in which our library has a long sound heard; the reference cuts off what is over 30 s."""
    sound = read_sound(part.play(), rate=RATE)
    return [sound.samples[round(c.start * RATE) : round(c.stop * RATE)] for c in clips_of(sound)]
