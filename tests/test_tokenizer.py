"""Ids and text: special tokens, <bos>, where settings come from, and streaming that is exact and never halves."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from tiny import CHAT_TEMPLATE, write_tokenizer
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from mlx_gemma4.detokenizer import DecoderDetokenizer, StreamingDetokenizer
from mlx_gemma4.errors import TokenizerError
from mlx_gemma4.tokenizer import PUBLISHED_DEFAULTS, Tokenizer

BOS, EOS, TURN_END = 2, 1, 106
TEXTS = [
    "hello user",
    "naïve café — “quoted”",
    "一二三 漢字かな交じり文",
    "🍎🍏👩‍👩‍👧‍👦🏳️‍🌈 flags",
    "e\u0301 combining a\u0308o\u0308 \u202e rtl",
    "tabs\tand\r\nnewlines\n\n\n",
    "▁ is not a space",
    "<0x41> typed out",
    " leading and trailing  ",
    "",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_folder(folder)


def write(folder, name, value):
    (folder / name).write_text(json.dumps(value))


@pytest.fixture
def copy(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return tmp_path


# Ids and text


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_round_trip(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    # "▁" is how the vocabulary writes a space, so a typed one comes back as a space; and so does Gemma's.
    assert tokenizer.decode(ids) == text.replace("▁", " ")


def test_bos_comes_once(tokenizer):
    plain = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello") == [BOS, *plain]
    assert tokenizer.encode("<bos>hello") == [BOS, *plain]
    assert tokenizer.encode("<bos>hello", add_special_tokens=False) == [BOS, *plain]
    assert tokenizer.encode("") == [BOS]


def test_bos_is_added_when_the_file_has_no_post_processor(tokenizer, copy):
    data = json.loads((copy / "tokenizer.json").read_text())
    data["post_processor"] = None
    write(copy, "tokenizer.json", data)
    assert Tokenizer.from_folder(copy).encode("hello") == tokenizer.encode("hello")


def test_bos_is_left_out_when_the_settings_say_so(tokenizer, copy):
    write(copy, "tokenizer_config.json", {"bos_token": "<bos>", "add_bos_token": False})
    assert Tokenizer.from_folder(copy).encode("hello") == tokenizer.encode("hello", add_special_tokens=False)


def test_special_tokens(tokenizer):
    ids = tokenizer.encode("<|turn>user\nhi<turn|>", add_special_tokens=False)
    assert ids[0] == 105 and ids[-1] == TURN_END
    assert tokenizer.decode(ids) == "<|turn>user\nhi<turn|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nhi"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (BOS, EOS, 0)
    assert tokenizer.token_id("<|channel>") == 100 and tokenizer.token_id("no such token") is None
    assert tokenizer.convert_tokens_to_ids(["<bos>", "nope"]) == [BOS, None]
    assert tokenizer.convert_ids_to_tokens(105) == "<|turn>"
    assert len(tokenizer) == tokenizer.vocab_size == len(tokenizer.get_vocab()) == 512


def test_ids_outside_the_vocabulary_leave_no_text(tokenizer):
    ids = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.decode([*ids, 100_000]) == "hello"


def test_stored_truncation_does_not_cut_prompts(tokenizer, copy):
    data = json.loads((copy / "tokenizer.json").read_text())
    data["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    write(copy, "tokenizer.json", data)
    assert Tokenizer.from_folder(copy).encode("hello " * 9) == tokenizer.encode("hello " * 9)


# Where settings come from


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [1, 106, 50]}, {"eos_token_id": 1}, {1, 106, 50}),
        ({"eos_token_id": 1}, {"eos_token_id": [1, 106]}, {1}),
        ({}, {"eos_token_id": [1, 106]}, {1, 106}),
        (None, {"text_config": {"eos_token_id": 7}}, {7}),
        (None, None, {EOS}),
    ],
    ids=["generation_config", "a-number", "config", "text_config", "tokenizer"],
)
def test_stop_ids(copy, generation, config, expected):
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        if value is not None:
            write(copy, name, value)
    assert Tokenizer.from_folder(copy).eos_token_ids == expected


def test_generation_defaults(copy):
    assert Tokenizer.from_folder(copy).generation_defaults == PUBLISHED_DEFAULTS
    write(copy, "generation_config.json", {"do_sample": True, "temperature": 0.7, "pad_token_id": 0, "top_k": None})
    assert Tokenizer.from_folder(copy).generation_defaults == {"do_sample": True, "temperature": 0.7}


def test_template_places(copy):
    def found():
        return Tokenizer.from_folder(copy).chat_template

    assert found() == CHAT_TEMPLATE
    (copy / "chat_template.jinja").unlink()
    assert found() is None
    write(copy, "chat_template.json", {"chat_template": "C"})
    assert found() == "C"
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    write(copy, "tokenizer_config.json", {"chat_template": named})
    assert found() == "D"
    write(copy, "tokenizer_config.json", {"chat_template": "S"})
    assert found() == "S"
    write(copy, "tokenizer_config.json", {"chat_template": named[:1]})
    with pytest.raises(TokenizerError, match="tool_use"):
        found()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", "{", "tokenizer.json cannot be read"),
        ("tokenizer.json", "{}", "tokenizer.json cannot be read"),
        ("tokenizer_config.json", "{oops", "tokenizer_config.json is not valid JSON"),
        ("generation_config.json", "[]", "generation_config.json holds no JSON object"),
        ("chat_template.jinja", b"\xff\xfe\xff", "chat_template.jinja cannot be read"),
    ],
)
def test_bad_files_are_named(copy, name, content, says):
    if content is None:
        (copy / name).unlink()
    elif isinstance(content, bytes):
        (copy / name).write_bytes(content)
    else:
        (copy / name).write_text(content)
    with pytest.raises(TokenizerError, match=says) as e:
        Tokenizer.from_folder(copy)
    assert "\n" not in str(e.value)


# Conversations


def test_apply_chat_template(tokenizer):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=True)
    assert text == ("<bos><|turn>system\n<|think|>\nbe brief<turn|>\n<|turn>user\nhello<turn|>\n<|turn>model\n")
    ids = tokenizer.apply_chat_template(messages, enable_thinking=True)
    assert ids == tokenizer.encode(text, add_special_tokens=False) and ids.count(BOS) == 1
    closed = tokenizer.apply_chat_template(messages, add_generation_prompt=False, tokenize=False)
    assert closed.endswith("hello<turn|>\n") and "<|think|>" not in closed


def test_a_conversation_that_ends_with_an_answer_opens_no_turn(tokenizer):
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "user"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text.endswith("<|turn>model\nuser<turn|>\n")
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert asked == text + "<|turn>model\n"


def test_base_models_say_what_to_do(copy):
    (copy / "chat_template.jinja").unlink()
    tokenizer = Tokenizer.from_folder(copy)
    assert not tokenizer.has_chat_template
    with pytest.raises(TokenizerError, match=r"-it model or `gemma4 generate --raw`"):
        tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])


# Streaming


def stream(detokenizer, ids):
    """All segments; checks on the way that `text` is their sum."""
    segments = []
    for token in ids:
        detokenizer.add_token(token)
        segments.append(detokenizer.last_segment)
        assert detokenizer.last_segment == ""
    detokenizer.finalize()
    segments.append(detokenizer.last_segment)
    assert detokenizer.text == "".join(segments)
    assert detokenizer.offset == len(detokenizer.text)
    assert detokenizer.tokens == list(ids)
    return segments


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_the_text_and_never_half_a_character(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    segments = stream(tokenizer.detokenizer, ids)
    assert "".join(segments) == tokenizer.decode(ids)
    assert "\ufffd" not in "".join(segments)


def test_random_unicode(tokenizer):
    rng = random.Random(1)
    ranges = [(32, 126), (0xA0, 0x24F), (0x300, 0x36F), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (9, 13)]
    for _ in range(200):
        text = "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 40)))
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert "".join(stream(tokenizer.detokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("skip", [False, True])
def test_random_ids(tokenizer, skip):
    """Broken bytes, special tokens and unknown ids included; every prefix of the stream is a prefix of the text."""
    rng = random.Random(2)
    broken = 0
    for _ in range(300):
        ids = [rng.choice([rng.randrange(520), rng.randrange(108, 364)]) for _ in range(rng.randint(1, 30))]
        whole = tokenizer.decode(ids, skip_special_tokens=skip)
        broken += "\ufffd" in whole
        said = ""
        for segment in stream(tokenizer.make_detokenizer(skip), ids):
            said += segment
            assert whole.startswith(said)
        assert said == whole
    assert broken > 50


def test_characters_wait_for_their_last_byte(tokenizer):
    ids = tokenizer.encode("a🍎b", add_special_tokens=False)
    assert len(ids) == 6
    assert stream(tokenizer.detokenizer, ids) == ["a", "", "", "", "", "🍎b", ""]


def test_detokenizer_is_fresh_and_can_be_reset(tokenizer):
    detokenizer = tokenizer.detokenizer
    ids = tokenizer.encode("hello é", add_special_tokens=False)
    for token in ids[:-1]:
        detokenizer.add_token(token)
    assert tokenizer.detokenizer.text == ""
    detokenizer.reset()
    assert "".join(stream(detokenizer, ids)) == "hello é"


def test_work_per_token_does_not_grow(tokenizer):
    """Pieces are looked up once each: nothing is decoded again, whatever came before."""

    class Counting:
        calls = 0

        def id_to_token(self, token):
            self.calls += 1
            return raw.id_to_token(token)

    raw = tokenizer._raw
    counting = Counting()
    detokenizer = StreamingDetokenizer(counting)
    ids = tokenizer.encode("hello user, naïve 🍎 model\n" * 40, add_special_tokens=False)
    assert "".join(stream(detokenizer, ids)) == tokenizer.decode(ids)
    assert counting.calls == len(ids)


def test_other_decoders_stream_exactly_too(tmp_path):
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(["hello user"], trainer)
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert isinstance(tokenizer.detokenizer, DecoderDetokenizer)
    assert tokenizer.bos_token_id is None
    for text in TEXTS:
        ids = tokenizer.encode(text)
        segments = stream(tokenizer.detokenizer, ids)
        assert "".join(segments) == tokenizer.decode(ids) == text


# The published tokenizer (32 MB, not in the repository)

REAL = os.environ.get("GEMMA4_TOKENIZER")
VECTORS = json.loads((Path(__file__).parent / "fixtures" / "tokenizer_vectors.json").read_text(encoding="utf-8"))


@pytest.mark.skipif(not REAL, reason="set GEMMA4_TOKENIZER to the folder of a published checkpoint")
def test_published_tokenizer():
    """Ids as llama.cpp's test vectors have them (models/ggml-vocab-gemma-4.gguf.inp/.out, MIT)."""
    tokenizer = Tokenizer.from_folder(REAL)
    for case in VECTORS:
        assert tokenizer.encode(case["text"], add_special_tokens=False) == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["text"]
