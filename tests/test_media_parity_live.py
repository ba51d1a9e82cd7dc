"""Whole models with pictures, sound and video against transformers running beside them: the costly cases, prompts by
lot, and prompts from real files through the published templates.

Skipped without torch and transformers. The same comparisons from stored references: `test_media_parity.py`.
"""

import dataclasses
import importlib.util
import sys
import wave
from pathlib import Path

import media_cases as cases
import mlx.core as mx
import numpy as np
import pytest
import tiny
import tiny_26b
from media_cases import CASES, FAMILIES, HEARING, Case, Movie, Picture, Sound
from optional import optional, transformers_with_gemma4
from parity import worst
from PIL import Image

from mlx_gemma4 import loading
from mlx_gemma4.media.items import MediaSettings
from mlx_gemma4.media.video import load_video
from mlx_gemma4.models.merging import Media, encode
from mlx_gemma4.senses import Senses, media_prompt
from mlx_gemma4.tokenizer import Tokenizer

torch = optional("torch")
transformers = transformers_with_gemma4()

sys.path.insert(0, str(Path(__file__).parent / "fixtures"))
import make_media  # noqa: E402

transformers.logging.set_verbosity_error()
LIMIT = 1e-3


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
    return make_media.processor(folder)


def in_chunks(model, ids: list[int], media: Media | None, chunk: int) -> np.ndarray:
    """Logits [L, V], chunks as the prefill cuts them."""
    cache, parts, begin = model.make_cache(), [], 0
    while begin < len(ids):
        end = min(begin + chunk, len(ids))
        end = end if media is None else media.step_end(begin, end)
        soft = None if media is None else media.soft(begin, end)
        parts.append(model(mx.array([ids[begin:end]]), cache=cache, media=soft)[0])
        mx.eval(parts[-1], [c.state for c in cache])
        begin = end
    return np.array(mx.concatenate(parts))


def compare(family: str, case: Case, tokenizer, processor, chunk: int) -> float:
    """Largest distance of all our logits from theirs; the prompts are equal."""
    prompt, model = cases.prompt(case, tokenizer), cases.build(family, case.window)
    given = make_media.inputs(processor, case)
    assert prompt.ids == given["input_ids"][0].tolist()
    media = encode(model, prompt.runs) if prompt.runs else None
    return worst(
        in_chunks(model, prompt.ids, media, chunk), make_media.logits(make_media.build(family, case.window), given)[0]
    )


@pytest.mark.parametrize(("family", "name"), [(f, n) for f in FAMILIES for n in cases.names(f, stored=False)])
def test_costly_cases(family, name, tokenizer, processor):
    error = compare(family, CASES[name], tokenizer, processor, 500)
    print(f"\n{family} {name}: {error:.1e}", end="")
    assert error <= LIMIT


def drawn(family: str, seed: int) -> Case:
    """A prompt of parts by lot."""
    rng = np.random.default_rng([seed, FAMILIES.index(family)])
    parts: list[cases.Part] = []
    for i in range(int(rng.integers(2, 6))):
        kind = rng.choice(["text", "image", "image", "video", "audio"])
        if kind == "text" or (kind == "audio" and family not in HEARING):
            parts.append(cases._prose(int(rng.integers(1, 80)), seed + i))
        elif kind == "image":
            height, width = np.exp(rng.uniform(np.log(20), np.log(500), 2)).astype(int).tolist()
            parts.append(Picture(height, width, 100 * seed + i))
        elif kind == "audio":
            parts.append(Sound(int(rng.integers(400, 60_000)), seed + i))
        else:
            size = np.exp(rng.uniform(np.log(30), np.log(400), 2)).astype(int).tolist()
            parts.append(Movie(int(rng.integers(1, 4)), *size, seed=seed + i, every=float(rng.choice([0.5, 1, 20]))))
    return Case((*parts, "?"), window=int(rng.choice([5, 24, 90, 300])), budget=int(rng.choice([70, 140])))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", [51, 52, 53])
def test_prompts_by_lot(family, seed, tokenizer, processor):
    case = drawn(family, seed)
    for chunk in (10_000, 37):
        error = compare(family, case, tokenizer, processor, chunk)
        assert error <= LIMIT, (chunk, case)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_of_theirs_and_one_of_ours(family, tokenizer, processor):
    """Their generate() on a padded batch, ours one by one; a choice they make by a hair ends the comparison."""
    rows = cases.BATCHES["batch"]
    given = {k: v for k, v in make_media.inputs(processor, *rows).items() if k != "position_ids"}
    with torch.no_grad():
        out = make_media.build(family, 8).generate(
            **given, max_new_tokens=8, output_logits=True, return_dict_in_generate=True
        )
    leads = torch.stack(out.logits).topk(2, dim=-1).values
    model = cases.build(family, 8)
    for b, row in enumerate(rows):
        prompt = cases.prompt(row, tokenizer)
        media = encode(model, prompt.runs) if prompt.runs else None
        cache, logits = model.make_cache(), None
        logits = model(
            mx.array([prompt.ids]), cache=cache, media=None if media is None else media.soft(0, len(prompt.ids))
        )
        for i in range(8):
            assert worst(np.array(logits[0, -1]), out.logits[i][b].numpy()) <= LIMIT, (b, i)
            if (leads[i, b, 0] - leads[i, b, 1]).item() < 2 * LIMIT:
                break
            token = int(out.sequences[b, given["input_ids"].shape[1] + i])
            assert token == int(mx.argmax(logits[0, -1]).item())
            logits = model(mx.array([[token]]), cache=cache)


# ------------------------------------------------------------------ real files, published templates


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One that sees and hears, with the small template, and one that sees, with the large one."""
    root = tmp_path_factory.mktemp("checkpoints")
    small = tiny.make_tiny(root / "e2b", "e2b", towers=True)
    template = tiny_26b.TEMPLATE.parent / "chat_template.E2B-E4B.jinja"
    (small / "chat_template.jinja").write_text(template.read_text(encoding="utf-8"), encoding="utf-8")
    found = {"e2b": small, "26b-a4b": tiny_26b.make_26b(root / "26b")}
    return {family: (path, *loading.load(path, dtype="float32", towers=True)) for family, path in found.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A PNG, a JPEG held upside down, a thin GIF and a WAV."""
    root = tmp_path_factory.mktemp("files")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(Picture(333, 250, 1).draw()).save(root / "a.png")
    Image.fromarray(Picture(480, 640, 2).draw()).save(root / "b.jpg", exif=exif)
    Image.fromarray(Picture(20, 700, 3).draw()).save(root / "c.gif")
    with wave.open(str(root / "d.wav"), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(cases.RATE)
        out.writeframes((Sound(23_456, 4).play() * 32767).astype("<i2").tobytes())
    return {path.suffix[1:]: path for path in root.iterdir()}


def opened(path: Path) -> Image.Image | np.ndarray:
    """A file as transformers' own loaders read it: upright RGB, samples in [-1, 1)."""
    if path.suffix != ".wav":
        return transformers.image_utils.load_image(str(path))
    with wave.open(str(path)) as sound:
        return np.frombuffer(sound.readframes(sound.getnframes()), "<i2").astype(np.float32) / 32768


TALKS = {
    "one": [("user", ["png", "What is it?"])],
    "late": [("user", ["Look: ", "jpg", " and ", "png", "  which? "])],
    "two turns": [("user", ["gif", "A line?"]), ("model", ["It is."]), ("user", ["jpg", "png"])],
    "system": [("system", ["Be brief. "]), ("user", ["jpg"])],
    "sound": [("user", ["wav", "Who speaks?"])],
    "both": [("user", ["png", "wav"]), ("model", ["Yes."]), ("user", ["again", "wav"])],
}


def messages(talk: str, files: dict[str, Path]) -> list[dict]:
    kinds = {"png": "image", "jpg": "image", "gif": "image", "wav": "audio"}
    out = []
    for role, parts in TALKS[talk]:
        content = [
            {"type": kinds[p], kinds[p]: str(files[p])} if p in kinds else {"type": "text", "text": p} for p in parts
        ]
        out.append({"role": role, "content": content})
    return out


@pytest.mark.parametrize(
    ("family", "talk"), [(f, t) for f in ("e2b", "26b-a4b") for t in TALKS if f == "e2b" or t not in ("sound", "both")]
)
def test_conversations_with_files(family, talk, checkpoints, files):
    """Ids, and logits of the whole model: their template rendering, loaders, processor and classes against ours."""
    folder, model, tokenizer = checkpoints[family]
    process = make_media.processor(folder)
    said = messages(talk, files)
    for thinking in (False, True):
        text = process.apply_chat_template(
            said, tokenize=False, add_generation_prompt=True, enable_thinking=thinking, return_dict=False
        )
        media = [p[p["type"]] for m in said for p in m["content"] if p["type"] != "text"]
        loaded = [opened(Path(path)) for path in media]
        images = [x for x in loaded if isinstance(x, Image.Image)]
        sounds = [x for x in loaded if isinstance(x, np.ndarray)]
        given = process(
            text=[text if isinstance(text, str) else text[0]],
            images=[images] if images else None,
            audio=sounds or None,
            images_kwargs={"max_soft_tokens": 70},
            add_special_tokens=False,
            return_tensors="pt",
        )
        prompt = media_prompt(model, tokenizer, said, thinking=thinking, settings=MediaSettings(image_tokens=70))
        assert prompt.ids == given["input_ids"][0].tolist()
    features = Senses(model, tokenizer).encode(prompt)
    found = np.array(model(mx.array([prompt.ids]), media=features.soft(0, len(prompt)))[0])
    raw = loading.json.loads((folder / "config.json").read_text())
    raw["vision_config"]["rope_parameters"]["rope_type"] = "axial"
    theirs = transformers.Gemma4ForConditionalGeneration.from_pretrained(
        folder, config=transformers.Gemma4Config.from_dict(raw), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    given = {k: v for k, v in given.items() if isinstance(v, torch.Tensor) and not k.startswith("num_soft")}
    assert worst(found, make_media.logits(theirs, given)[0]) <= LIMIT


@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="transformers' video processor: pip install torchvision"
)
@pytest.mark.parametrize(("frames", "every"), [(12, 1.0), (5, 0.4), (40, 2.0)])
def test_their_own_video_processor(frames, every, processor, tokenizer, folder):
    """Frames that need no scaling: the same pixels, choice of frames and prompt."""
    from transformers.models.gemma4.video_processing_gemma4 import Gemma4VideoProcessor

    movie, taken = Movie(frames, seed=6, every=every), min(frames, 32)
    full = make_media.Processor(
        feature_extractor=processor.feature_extractor,
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        video_processor=Gemma4VideoProcessor(num_frames=taken),
    )
    metadata = transformers.video_utils.VideoMetadata(total_num_frames=frames, fps=1 / every)
    case = Case((movie, "what?"))
    given = full(
        text=[case.text],
        videos=[np.stack(movie.draw())],
        videos_kwargs={"video_metadata": [metadata], "do_sample_frames": True},
        add_special_tokens=False,
        return_tensors="pt",
    )
    ours = load_video(movie.draw(), rate=1 / every)
    pixels = np.rint(given["pixel_values_videos"].numpy()[:, : 64 * 9] * 255)
    assert np.array_equal(pixels, np.stack([frame.patches for frame in ours.frames]))
    item = dataclasses.replace(cases.item(movie, 70), parts=ours.frames, stamps=ours.stamps)
    marks = cases.Marks.from_config(cases.config("e2b", 8))
    assert cases.expand(case.text, [item], tokenizer, marks).ids == given["input_ids"][0].tolist()
