"""Conversations about pictures and sounds: what is computed once, what comes back after an error, what is refused."""

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from test_media_prompt import picture, png, tone, wav
from tiny import make_tiny

from mlx_gemma4 import Chat, generate, load
from mlx_gemma4.errors import ContextError, UsageError
from mlx_gemma4.generation import generate_step
from mlx_gemma4.media.items import MediaSettings
from mlx_gemma4.media.sources import MediaError
from mlx_gemma4.models import vision
from mlx_gemma4.sampling import Sampling
from mlx_gemma4.senses import Senses, media_prompt

TEMPLATES = {"e2b": "E2B-E4B", "26b-a4b": "12B-26B-31B"}
FEW = Sampling(temperature=0.0, max_tokens=6)


@pytest.fixture(scope="module", params=["e2b", "26b-a4b"])
def loaded(tmp_path_factory, request):
    return load_tiny(tmp_path_factory.mktemp(request.param), request.param)


def load_tiny(folder, family, towers=True, **overrides):
    make_tiny(folder, family, towers=True, **overrides)
    source = Path(__file__).parent / "fixtures" / "chat_template" / f"chat_template.{TEMPLATES[family]}.jinja"
    shutil.copy(source, folder / "chat_template.jinja")
    return load(folder, towers=towers, dtype="float32")


@pytest.fixture
def passes(monkeypatch):
    """How many pictures went through the tower."""
    counted = []
    encode = vision.encode_images
    monkeypatch.setattr(vision, "encode_images", lambda m, images: counted.extend(images) or encode(m, images))
    return counted


def cold(loaded, chat, thinking=False):
    """Logprobs after the chat's last question, computed afresh in one step per 10,000 tokens."""
    model, tokenizer = loaded
    senses = Senses(model, tokenizer)
    prompt = senses.prompt(chat.messages[:-1], thinking)
    media = senses.encode(prompt)
    return next(generate_step(mx.array(prompt.ids), model, media=media, prefill_step_size=10_000))


def warm(loaded, chat):
    """The same as the chat computes it, from what its memory holds."""
    model, _ = loaded
    prompt = chat.senses.prompt(chat.messages[:-1])
    cached = chat._memory.reuse(prompt.keys)
    media = chat.senses.encode(prompt, cached)
    tokens = mx.array(prompt.ids[cached:])
    return cached, next(generate_step(tokens, model, media=media, prompt_cache=chat._memory.cache))


def test_later_turns_read_the_picture_from_the_cache(loaded, passes):
    chat = Chat(*loaded, sampling=FEW, prefill_step_size=7)
    chat.send("What is this?", images=[picture()])
    assert len(passes) == 1
    chat.send("And what colour?")
    assert len(passes) == 1 and chat.stats.cached_tokens > 60
    prompt = chat.senses.prompt(chat.messages[:-1])
    assert chat.stats.prompt_tokens == len(prompt)
    chat._memory.forget()
    chat.send("Once more?")  # read again, but not encoded again
    assert len(passes) == 1 and chat.stats.cached_tokens == 0


def test_what_is_reused_gives_the_logits_of_a_cold_prompt(loaded):
    chat = Chat(*loaded, sampling=FEW, prefill_step_size=5)
    chat.send([{"type": "text", "text": "one"}, {"type": "image", "image": picture(200, 96)}])
    chat.send("two", images=[picture(96, 96, 1)])
    chat.send("three")
    token, logprobs = cold(loaded, chat)
    cached, (again, found) = warm(loaded, chat)
    assert cached > 100 and again == token
    assert mx.abs(found - logprobs).max().item() < 1e-4


def test_another_picture_of_the_same_size_is_not_taken_for_the_first(loaded):
    answers, first = [], Chat(*loaded, sampling=FEW)
    for seed in (0, 5):
        first.messages.clear()
        first.send("What is this?", images=[picture(seed=seed)])
        answers.append(first.stats.cached_tokens)
        fresh = Chat(*loaded, sampling=FEW)
        assert fresh.send("What is this?", images=[picture(seed=seed)]) == first.messages[-1]["content"]
    assert answers[1] < 10  # up to the picture


def test_a_source_that_cannot_be_read_leaves_the_conversation_as_it_was(loaded, tmp_path):
    chat = Chat(*loaded, sampling=FEW)
    chat.send("hello")
    before = list(chat.messages)
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    bad = [
        b"not a picture",
        str(empty),
        str(tmp_path / "none.png"),
        png(picture())[:60],
        "http://example.invalid/x.png",
    ]
    for source in bad:
        with pytest.raises(MediaError) as e:
            chat.send("What is this?", images=[source])
        assert "\n" not in str(e.value) and chat.messages == before
    with pytest.raises(UsageError, match="may not contain that mark"):
        chat.send("what is <|image|>?")
    assert chat.messages == before
    chat.send("still there?")
    assert len(chat.messages) == 4


def test_too_many_pictures_for_the_context_are_refused(tmp_path):
    chat = Chat(*load_tiny(tmp_path, "e2b", max_position_embeddings=256), sampling=FEW)
    with pytest.raises(ContextError, match="context holds 256"):
        chat.send("compare", images=[picture(seed=i) for i in range(5)])
    assert chat.messages == []
    assert chat.send("one", images=[picture()]) == chat.messages[1]["content"]


def test_a_model_without_the_sense_says_so(loaded, tmp_path):
    model, tokenizer = loaded
    chat = Chat(model, tokenizer, sampling=FEW)
    if chat.senses.hears:
        chat.send("listen", audio=[wav(tone())])
        assert chat.stats.prompt_tokens > 25
    else:
        with pytest.raises(UsageError, match="does not hear: E2B and E4B do"):
            chat.send("listen", audio=[wav(tone())])
        assert chat.messages == []
    blind = Chat(*load_tiny(tmp_path, "e2b", towers=False))
    with pytest.raises(UsageError, match="loaded without its towers"):
        blind.send("look", images=[picture()])


def test_generate_takes_a_prompt_with_media(loaded):
    model, tokenizer = loaded
    parts = [{"type": "image", "image": np.asarray(picture())}, {"type": "text", "text": "What is this?"}]
    messages = [{"role": "user", "content": parts}]
    prompt = media_prompt(model, tokenizer, messages, settings=MediaSettings(image_tokens=140))
    assert 70 < prompt.runs[0].part.tokens <= 140
    said = generate(model, tokenizer, prompt, max_tokens=5)
    assert said == generate(model, tokenizer, prompt, max_tokens=5, prefill_step_size=3)


def test_compressed_caches_take_pictures(tmp_path):
    loaded = load_tiny(tmp_path, "26b-a4b", head_dim=64, global_head_dim=128, sliding_window=192)
    exact, coded = (Chat(*loaded, sampling=FEW, **kv) for kv in ({}, {"kv_bits": 4, "kv_bits_sliding": 4}))
    for chat in (exact, coded):
        chat.send("compare", images=[picture(seed=i) for i in range(4)])
        chat.messages[-1]["content"] = "the same"
        chat.send("again", images=[picture(seed=9)])
    assert any("4 bits" in line for line in coded.cache_status)
    assert coded.stats.prompt_tokens == exact.stats.prompt_tokens > 300
    assert coded.cache_bytes < 0.7 * exact.cache_bytes
    (_, (_, a)), (_, (_, b)) = warm(loaded, exact), warm(loaded, coded)
    assert mx.sum(mx.exp(a) * (a - b)).item() < 0.2  # near, not equal: random weights at 4 bits
