"""Messages with media: which spellings are understood, what the prompt becomes, and what is refused."""

import base64
import io
import wave

import numpy as np
import pytest
from PIL import Image
from tiny import SPECIAL, VOCAB, tiny_config, write_tokenizer

from mlx_gemma4.errors import UsageError
from mlx_gemma4.media.content import for_template, items_of, load_content, text_of, with_media
from mlx_gemma4.media.images import MediaError, ProcessedImage
from mlx_gemma4.media.items import Item, MediaSettings, audio_item, auto_budget, image_item, load_items
from mlx_gemma4.media.prompt import Marks, expand
from mlx_gemma4.media.store import FeatureStore
from mlx_gemma4.tokenizer import Tokenizer

IMAGE, BOI, EOI = (SPECIAL[t] for t in ("<|image|>", "<|image>", "<image|>"))
AUDIO, BOA, EOA = (SPECIAL[t] for t in ("<|audio|>", "<|audio>", "<audio|>"))
MARKS = Marks.from_config(tiny_config("e2b", towers=True))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, VOCAB)
    return Tokenizer.from_folder(folder)


def picture(width=96, height=96, seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


def png(image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def tone(seconds=1.0, rate=16_000) -> np.ndarray:
    return (0.5 * np.sin(np.arange(int(seconds * rate)) * 2 * np.pi * 440 / rate)).astype(np.float32)


def wav(samples, rate=16_000) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as f:
        f.setnchannels(1)
        f.setsampwidth(2)
        f.setframerate(rate)
        f.writeframes((samples * 32767).astype("<i2").tobytes())
    return out.getvalue()


def load(content, **settings):
    media = MediaSettings(**settings)
    return load_content(content, lambda kind, s: load_items(kind, s, media, image_tokens=70, hears=True))


# Content


def test_every_spelling_of_a_part_is_understood(tmp_path):
    file = tmp_path / "a picture.png"
    picture().save(file)
    url = "data:image/png;base64," + base64.b64encode(png(picture())).decode()
    sound = {"data": base64.b64encode(wav(tone())).decode(), "format": "wav"}
    content = load(
        [
            {"type": "text", "text": "look:"},
            {"type": "image", "image": str(file)},
            {"type": "image", "image": file.as_uri()},
            {"type": "image", "image": np.asarray(picture())},
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "image_url", "image_url": url},
            {"type": "audio", "audio": wav(tone())},
            {"type": "audio", "audio": tone(), "rate": 16_000},
            {"type": "input_audio", "input_audio": sound},
        ]
    )
    assert [p["type"] for p in content] == ["text", *["image"] * 5, *["audio"] * 3]
    items = items_of([{"role": "user", "content": content}])
    # The same pixels and samples, wherever they came from (16-bit files round the sound).
    assert len({item.keys for item in items[:5]}) == 1
    assert items[5].keys == items[7].keys
    assert items[0].name == "a picture.png" and text_of(content).startswith("look: [a picture.png] [a picture.png]")
    shown = for_template([{"role": "user", "content": content}], [])[0]["content"]
    assert shown == [{"type": "text", "text": "look:"}, *[{"type": "image"}] * 5, *[{"type": "audio"}] * 3]


@pytest.mark.parametrize(
    "part, what",
    [
        ("text", "dictionary"),
        ({"text": "x"}, "dictionary"),
        ({"type": "image"}, "lacks"),
        ({"type": "text", "text": 3}, "not text"),
        ({"type": "smell", "smell": 1}, "'smell' is not known"),
        ({"type": "image_url", "image_url": {}}, "lacks"),
        ({"type": "input_audio", "input_audio": {"data": "?!"}}, "base64"),
    ],
)
def test_parts_that_are_none_are_refused_in_one_line(part, what):
    with pytest.raises((UsageError, MediaError), match=what) as e:
        load([part])
    assert "\n" not in str(e.value)


def test_media_given_apart_stand_in_front():
    assert with_media("hi", [], [], []) == "hi"
    found = with_media("hi", ["a"], ["b"], ["c"])
    assert [p["type"] for p in found] == ["image", "video", "audio", "text"]


def test_a_mark_in_what_the_model_said_is_taken_apart():
    said = [{"role": "assistant", "content": "write <|image|>"}, {"role": "user", "content": "<|image|>"}]
    assert [m["content"] for m in for_template(said, ["<|image|>"])] == ["write < |image|>", "<|image|>"]


def test_an_item_is_used_as_it_is_and_only_as_what_it_is():
    item = image_item(picture())
    assert load([{"type": "image", "image": item}])[0]["image"] is item
    with pytest.raises(UsageError, match="given as 'audio'"):
        load([{"type": "audio", "audio": item}])


# Budgets


@pytest.mark.parametrize(
    "size, budget", [((10, 10), 70), ((384, 384), 70), ((390, 390), 140), ((900, 500), 280), ((5000, 4000), 1120)]
)
def test_auto_takes_the_smallest_budget_that_keeps_all_pixels(size, budget):
    assert auto_budget(*size) == budget
    assert image_item(picture(*size) if budget < 1120 else picture(2500, 2000), "auto").tokens <= budget


def test_settings_refuse_other_budgets():
    for settings in ({"image_tokens": 100}, {"video_tokens": 71}):
        with pytest.raises(UsageError, match="allowed: 70, 140, 280, 560, 1120"):
            MediaSettings(**settings)


def test_settings_go_before_the_models_budget():
    assert load([{"type": "image", "image": picture()}])[0]["image"].tokens <= 70
    more = load([{"type": "image", "image": picture()}], image_tokens=280)[0]["image"]
    assert 140 < more.tokens <= 280


# Prompts


def test_placeholders_become_runs(tokenizer):
    first, second, sound = image_item(picture(96, 48), 70), image_item(picture(48, 48, 1), 70), audio_item(wav(tone()))
    prompt = expand("a <|image|><|image|> b <|audio|>c", [first, second, sound], tokenizer, MARKS)
    plain = tokenizer.encode("a ", False), tokenizer.encode(" b ", False), tokenizer.encode("c", False)
    images = [[BOI, *[IMAGE] * item.tokens, EOI] for item in (first, second)]
    assert prompt.ids == [*plain[0], *images[0], *images[1], *plain[1], BOA, *[AUDIO] * sound.tokens, EOA, *plain[2]]
    assert [run.stop - run.start for run in prompt.runs] == [first.tokens, second.tokens, sound.tokens] and sound.tokens
    for run in prompt.runs:
        assert set(prompt.ids[run.start : run.stop]) == {AUDIO if run is prompt.runs[2] else IMAGE}
    assert first.cost == first.tokens + 2


def test_keys_tell_pictures_apart_and_equal_ones_not(tokenizer):
    def keys(*seeds):
        items = [image_item(picture(seed=seed), 70) for seed in seeds]
        return expand("x<|image|>" * len(seeds), items, tokenizer, MARKS).keys

    assert keys(1, 2) == keys(1, 2) != keys(1, 3)
    same = next(i for i, (a, b) in enumerate(zip(keys(1, 2), keys(1, 3), strict=True)) if a != b)
    assert same > len(keys(1)) and all(k < VOCAB for k in keys(1, 2))


def test_a_picture_at_another_budget_has_another_key():
    assert image_item(picture(), 70).keys != image_item(picture(), 140).keys


def test_a_video_has_a_stamp_and_a_run_for_each_frame(tokenizer):
    frames = tuple(image_item(picture(seed=i), 70).parts[0] for i in range(3))
    video = Item("video", "clip", frames, ("00:00", "00:01", "01:07"))
    ids = expand("<|video|>", [video], tokenizer, MARKS).ids
    n = frames[0].tokens
    run = [BOI, *[SPECIAL["<|video|>"]] * n, EOI]
    stamps = [tokenizer.encode(text, False) for text in ("00:00 ", " 00:01 ", " 01:07 ")]
    assert ids == [*stamps[0], *run, *stamps[1], *run, *stamps[2], *run]


@pytest.mark.parametrize(
    "text, kinds, what",
    [
        ("<|image|><|image|>", ["image"], "may not contain that mark as text"),
        ("no mark", ["image"], "left out 1 picture"),
        ("<|audio|><|image|>", ["image", "audio"], "another order"),
        ("<|audio|>", [], "may not contain"),
    ],
)
def test_placeholders_and_items_must_agree(tokenizer, text, kinds, what):
    made = {"image": lambda: image_item(picture(), 70), "audio": lambda: audio_item(wav(tone()))}
    with pytest.raises(UsageError, match=what):
        expand(text, [made[kind]() for kind in kinds], tokenizer, MARKS)


def test_long_sounds_become_windows_with_marks_of_their_own(tokenizer):
    sound = audio_item((tone(31), 16_000)[0], 16_000)
    ids = expand("<|audio|>", [sound], tokenizer, MARKS).ids
    assert len(sound.parts) == 2 and ids.count(BOA) == ids.count(EOA) == 2 and ids.count(AUDIO) == sound.tokens
    assert "2 windows" in sound.notes[0]


# The store


def test_the_store_forgets_what_was_used_longest_ago():
    import mlx.core as mx

    store = FeatureStore(max_bytes=3 * 400)
    for key in (1, 2, 3):
        store.put(key, mx.zeros((10, 10)))
    assert store.get(1) is not None
    store.put(4, mx.zeros((10, 10)))
    assert store.get(2) is None and store.get(1) is not None and store.nbytes == 1200 and len(store) == 3
    store.put(5, mx.zeros((20, 20)))  # larger than the budget
    assert store.get(5) is None and len(store) == 3
    store.clear()
    assert store.nbytes == 0


def test_processed_pictures_are_what_parts_are():
    part = image_item(picture(), 70).parts[0]
    assert isinstance(part, ProcessedImage) and part.tokens == image_item(picture(), 70).tokens
