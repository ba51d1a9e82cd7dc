"""mlx-vlm on the same weights, prompts and media in the same process: our error is never above its.

Twice: with the pixels and features of transformers given to its graph, and with those of its own processors, which is
what its users get. What it gets wrong, with numbers: `docs/media-parity.md`; `pytest -s` prints this machine's table.
"""

import functools
from typing import Any

import media_cases as cases
import mlx.core as mx
import numpy as np
import pytest
import tiny
from media_cases import CASES, FAMILIES, LOOKING_AHEAD, Case, Movie, Picture, Sound
from optional import optional
from parity import divergence, worst
from PIL import Image

from mlx_gemma4.media.prompt import Prompt
from mlx_gemma4.models.merging import encode
from mlx_gemma4.tokenizer import Tokenizer

optional("mlx_vlm")
optional("transformers")

# Long ones say nothing more here.
NAMES = ("image", "tall", "wide", "tiny", "huge", "budget-140", "three-sizes", "adjacent", "across-window")
NAMES += ("within-window", "audio-0.2", "audio-1", "audio-10", "audio-31", "two-clips", "short-clip-first")
NAMES += ("image-audio", "video-scaled", "image-video", "all")
EVERY = [(family, name) for family in FAMILIES for name in cases.names(family) if name in NAMES]
# Its graph does not leave out what a clip is padded with: all that follows a clip that is not the longest is misplaced.
MISPLACED = ("short-clip-first", "all")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def processor(folder):
    """mlx-vlm's own, its image processor in Pillow and numpy."""
    from mlx_vlm.models.gemma4 import audio_feature_extractor, processing_gemma4
    from transformers import PreTrainedTokenizerFast

    special = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
    special |= {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
    plain = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    file = str(folder / "tokenizer.json")
    tokens = PreTrainedTokenizerFast(tokenizer_file=file, **plain, extra_special_tokens=special)
    return processing_gemma4.Gemma4Processor(
        tokenizer=tokens, feature_extractor=audio_feature_extractor.Gemma4AudioFeatureExtractor()
    )


@functools.lru_cache(maxsize=6)
def peer(family: str, window: int) -> Any:
    """mlx-vlm's model with our weights."""
    from mlx_vlm.models.gemma4 import config, gemma4

    raw = cases.config(family, window)
    outer = config.ModelConfig.from_dict(raw)
    outer.text_config = config.TextConfig.from_dict(raw["text_config"])
    outer.vision_config = config.VisionConfig.from_dict(raw["vision_config"])
    outer.audio_config = config.AudioConfig.from_dict(raw["audio_config"]) if raw["audio_config"] else None
    model = gemma4.Model(outer)
    # It builds no keys of its own for layers that share theirs.
    shared = raw["text_config"]["num_hidden_layers"] - raw["text_config"]["num_kv_shared_layers"]
    unread = tuple(
        f"language_model.model.layers.{i}.self_attn.{name}"
        for i in range(shared, raw["text_config"]["num_hidden_layers"])
        for name in ("k_proj", "v_proj", "k_norm")
    )
    found = model.sanitize({name: mx.array(value) for name, value in cases.weights(family).items()})
    model.load_weights([(n, v) for n, v in found.items() if not n.startswith(unread)], strict=True)
    mx.eval(model.parameters())
    return model


def given(prompt: Prompt, case: Case) -> dict[str, Any]:
    """The media of a prompt as transformers' processors make them: padded pixels with positions, padded features."""
    out: dict[str, Any] = {}
    for mark, pixels, positions in (
        ("image", "pixel_values", "image_position_ids"),
        ("video", "pixel_values_videos", "video_position_ids"),
    ):
        kinds = [item.kind for item in items(case) for _ in item.parts]
        parts = [run.part for run, kind in zip(prompt.runs, kinds, strict=True) if kind == mark]
        if parts:
            most = max(len(p.patches) for p in parts)
            rows = [np.pad(p.patches / np.float32(255), ((0, most - len(p.patches)), (0, 0))) for p in parts]
            out[pixels] = mx.array(np.stack(rows).astype(np.float32))
            where = [np.pad(p.positions, ((0, most - len(p.positions)), (0, 0)), constant_values=-1) for p in parts]
            out[positions] = mx.array(np.stack(where))
    clips = [run.part for run in prompt.runs if not run.is_picture]
    if clips:
        most = max(len(clip.mel) for clip in clips)
        rows = [np.pad(clip.mel, ((0, most - len(clip.mel)), (0, 0))) for clip in clips]
        out["input_features"] = mx.array(np.stack(rows))
        lengths = np.array([len(clip.mel) for clip in clips])
        out["input_features_mask"] = mx.array(np.arange(most) < lengths[:, None])
    return out


def items(case: Case) -> list[Any]:
    return [cases.item(part, case.budget) for part in case.parts if not isinstance(part, str)]


def types(ids: np.ndarray) -> mx.array:
    """mm_token_type_ids, as transformers and mlx-vlm name them."""
    marks = {tiny.SPECIAL["<|image|>"]: 1, tiny.SPECIAL["<|video|>"]: 2, tiny.SPECIAL["<|audio|>"]: 3}
    return mx.array(np.vectorize(lambda i: marks.get(i, 0))(ids))


def their_logits(family: str, window: int, ids: np.ndarray, media: dict[str, Any]) -> np.ndarray:
    """[L, V]"""
    model = peer(family, window)
    call = {"mm_token_type_ids": types(ids[None])} if family in LOOKING_AHEAD else {}
    return np.array(model(mx.array(ids[None]), cache=model.make_cache(), **media, **call).logits[0])


@functools.cache
def reference(family: str) -> dict[str, np.ndarray]:
    with np.load(cases.FOLDER / f"{family}.npz") as file:
        return dict(file)


def error(family: str, name: str, logits: np.ndarray) -> float:
    found = reference(family)
    return worst(logits[found[f"{name}/positions"]][:, cases.VOCABULARY], found[f"{name}/logits"])


_ours: dict[tuple[str, str], np.ndarray] = {}


def our_logits(family: str, name: str, tokenizer: Tokenizer) -> np.ndarray:
    if (family, name) not in _ours:
        prompt, model = cases.prompt(CASES[name], tokenizer), cases.build(family, CASES[name].window)
        soft = encode(model, prompt.runs).soft(0, len(prompt))
        _ours[family, name] = np.array(model(mx.array([prompt.ids]), media=soft)[0])
    return _ours[family, name]


def show(label: str, ours: float, theirs: float | str) -> None:
    print(f"\n{label:44} ours {ours:.1e}  theirs {theirs if isinstance(theirs, str) else f'{theirs:.1e}'}", end="")


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_its_graph(family, name, tokenizer):
    prompt = cases.prompt(CASES[name], tokenizer)
    theirs = their_logits(family, CASES[name].window, np.array(prompt.ids), given(prompt, CASES[name]))
    mine = our_logits(family, name, tokenizer)
    errors, noise = [error(family, name, found) for found in (mine, theirs)], reference(family)[f"{name}/noise"]
    far = divergence(mine, theirs)
    same = (mine.argmax(-1) == theirs.argmax(-1)).mean()
    show(f"{family} {name} (KL {far.mean():.1e}, same choice {same:.2f})", *errors)
    assert errors[0] <= errors[1] + 2 * noise
    # What the docs say about it. When one of these fails, it has been mended.
    wrong = (family in LOOKING_AHEAD and any(run.is_picture for run in prompt.runs)) or name in MISPLACED
    assert (errors[1] > 0.1) == wrong


def own(processor: Any, case: Case) -> tuple[np.ndarray, dict[str, Any]]:
    """(ids [L], media) of mlx-vlm's own processors."""
    media: dict[str, Any] = {}
    if pictures := case.of(Picture):
        media["images"] = [Image.fromarray(p.draw()) for p in pictures]
        media["images_kwargs"] = {"max_soft_tokens": case.budget}
    if sounds := case.of(Sound):
        media["audio"] = [sound.play() for sound in sounds]
    if movies := case.of(Movie):
        media["videos"] = [np.stack(movie.draw()).transpose(0, 3, 1, 2) for movie in movies]
        media["fps"] = [1 / movie.every for movie in movies]
    found = dict(processor(text=[case.text], **media, add_special_tokens=False))
    ids = np.array(found.pop("input_ids"))[0]
    for name in ("attention_mask", "mm_token_type_ids", "num_frames_per_video"):
        found.pop(name, None)
    return ids, found


@pytest.mark.parametrize(("family", "name"), [(f, n) for f, n in EVERY if f in ("e4b", "31b")])
def test_its_processors(family, name, tokenizer, processor):
    """What a user of it gets: its own ids, pixels and features."""
    ids, media = own(processor, CASES[name])
    expected = reference(family)[f"{name}/ids"]
    mine = error(family, name, our_logits(family, name, tokenizer))
    if not np.array_equal(ids, expected):
        show(f"{family} {name}, its processors", mine, f"{len(ids)} tokens for {len(expected)}")
        return
    theirs = their_logits(family, CASES[name].window, ids, media)
    theirs = error(family, name, theirs)
    show(f"{family} {name}, its processors", mine, theirs)
    assert mine <= theirs + 2 * reference(family)[f"{name}/noise"]


@pytest.mark.parametrize("part", [Picture(240, 320, 2), Picture(700, 60, 3), Picture(50, 900, 4), Picture(5, 7, 5)])
def test_its_pixels(part, processor):
    """Ours are transformers' bit for bit (`test_vision_images.py`)."""
    _, media = own(processor, Case((part, "?")))
    ours = cases.item(part, 70).parts[0].patches.reshape(-1, 16, 16, 3)
    theirs = np.rint(np.array(media["pixel_values"])[0] * 255).transpose(1, 2, 0)
    rows, columns = theirs.shape[0] // 16, theirs.shape[1] // 16
    theirs = theirs.reshape(rows, 16, columns, 16, 3).swapaxes(1, 2).reshape(-1, 16, 16, 3)
    far = np.abs(theirs - ours)
    print(f"\n{part}: {(far > 0).mean():.1%} differ, {far.max():.0f} of 255 at most", end="")


@pytest.mark.parametrize("samples", [3_200, 16_000, 20_801, 160_000])
def test_its_features(samples, processor):
    """Ours are transformers' (`test_audio_mel.py`)."""
    part = Sound(samples, 1)
    ids, media = own(processor, Case((part, "?")))
    ours = cases.item(part, 70).parts[0]
    theirs = np.array(media["input_features"])[0][: len(ours.mel)]
    far, tokens = np.abs(theirs - ours.mel).max(), int((ids == tiny.SPECIAL["<|audio|>"]).sum())
    print(f"\n{samples} samples: features differ by {far:.1e}, {tokens} tokens for {ours.tokens}", end="")


def test_the_budget_of_pictures_cannot_be_set(processor):
    """Its command line has --processor-kwargs, and drops what the processor's signature does not name."""
    from mlx_vlm.utils import process_inputs

    picture = Image.fromarray(Picture(240, 320, 2).draw())
    call = {"prompts": ["<|image|>"], "images": [picture]}
    given = [process_inputs(processor, **call, **more) for more in ({}, {"max_soft_tokens": 70})]
    counts = [np.array(found["input_ids"]).shape[1] for found in given]
    print(f"\nwithout and with max_soft_tokens=70: {counts} tokens", end="")
    assert counts[0] == counts[1] > 200


def test_a_sound_over_30_seconds_is_cut(processor):
    """Transformers' own processor does the same; ours is heard in windows, and the user is told."""
    _, media = own(processor, Case((Sound(496_000, 5), "?")))
    assert np.array(media["input_features"]).shape[:2] == (1, 2999)  # 750 tokens
    assert sum(part.tokens for part in cases.item(Sound(496_000, 5), 70).parts) > 775
