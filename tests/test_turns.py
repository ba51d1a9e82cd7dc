"""Reading a model's turn: thoughts apart from answers, whatever the tokens and wherever the prompt ended."""

import random
from pathlib import Path

import pytest
from tiny import write_tokenizer

from mlx_gemma4.events import Text, Thought
from mlx_gemma4.tokenizer import Tokenizer
from mlx_gemma4.turns import TurnParser, render

TEMPLATES = Path(__file__).parent / "fixtures" / "chat_template"
OPEN, CLOSE, TURN_END = 100, 101, 106


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 106, 50]}')
    return Tokenizer.from_folder(folder)


def published(tokenizer, name):
    """The same vocabulary with a published template."""
    source = (TEMPLATES / f"chat_template.{name}.jinja").read_text(encoding="utf-8")
    return Tokenizer(tokenizer._raw.to_str(), chat_template=source, eos_token_ids=tokenizer.eos_token_ids)


def encodings(tokenizer, text, count=12):
    """Several token sequences for one text: merged as the vocabulary does, cut anywhere, byte by byte."""
    special = sorted((t for t in tokenizer.get_vocab() if tokenizer.token_id(t) in tokenizer.special_ids), key=len)
    yield tokenizer.encode(text, add_special_tokens=False)
    for seed in range(count):
        rng = random.Random(seed)
        ids, rest = [], text
        while rest:
            name = next((s for s in reversed(special) if rest.startswith(s)), None)
            if name:
                ids.append(tokenizer.token_id(name))
                rest = rest[len(name) :]
                continue
            end = next((i for i in range(1, len(rest)) if any(rest.startswith(s, i) for s in special)), len(rest))
            size = rng.randint(1, min(end, 6))
            piece, rest = rest[:size], rest[size:]
            if rng.random() < 0.3:
                ids += [tokenizer.token_id(f"<0x{b:02X}>") for b in piece.encode()]
            else:
                ids += tokenizer.encode(piece, add_special_tokens=False)
        yield ids


def read(parser, ids):
    """(thought, answer), with events checked for sense."""
    events = [e for token in ids for e in parser.feed(token)] + parser.finish()
    assert all(e.text and e.kind in ("thought", "text") and "\ufffd" not in e.text for e in events)
    return tuple("".join(e.text for e in events if e.kind == kind) for kind in ("thought", "text"))


CASES = {
    "answer": ("Hi there", "", "Hi there"),
    "thought and answer": ("<|channel>thought\nadd them\n<channel|>4", "add them", "4"),
    "empty thought": ("<|channel>thought\n<channel|>4", "", "4"),
    "label without newline": ("<|channel>thought<channel|>4", "", "4"),
    "no label": ("<|channel>adding<channel|>4", "adding", "4"),
    "a beginning of the label": ("<|channel>tho<channel|>4", "tho", "4"),
    "a word that begins like it": ("<|channel>thoughtful\nidea\n<channel|>4", "thoughtful\nidea", "4"),
    "another label": ("<|channel>plan\nfirst\n<channel|>4", "plan\nfirst", "4"),
    "the label again": ("<|channel>thought\nthought\nx\n<channel|>4", "thought\nx", "4"),
    "only one newline goes": ("<|channel>thought\na\n\n<channel|>4", "a\n", "4"),
    "newlines inside": ("<|channel>thought\na\n\nb<channel|>4", "a\n\nb", "4"),
    "never closed": ("<|channel>thought\nstill thinking\n", "still thinking\n", ""),
    "closed without opening": ("a<channel|>b", "", "ab"),
    "opened twice": ("<|channel>thought\na<|channel>thought\nb\n<channel|>c", "ab", "c"),
    "two thoughts": ("<|channel>thought\na\n<channel|>b<|channel>thought\nc\n<channel|>d", "ac", "bd"),
    "whole characters": ("<|channel>thought\n🍎é\n<channel|>漢字👩‍👩‍👧 ok", "🍎é", "漢字👩‍👩‍👧 ok"),
    "ends inside the label": ("<|channel>thoug", "thoug", ""),
    "ends after the opening": ("<|channel>", "", ""),
    "nothing": ("", "", ""),
}


@pytest.mark.parametrize("text", CASES)
def test_turns(tokenizer, text):
    text, thought, answer = CASES[text]
    for ids in encodings(tokenizer, text):
        assert read(TurnParser(tokenizer), ids) == (thought, answer), ids


def test_a_channel_typed_letter_by_letter_is_text(tokenizer):
    ids = [tokenizer.token_id(c) for c in "<|channel>x"]
    assert read(TurnParser(tokenizer), ids) == ("", "<|channel>x")


@pytest.mark.parametrize("stop", [1, 50, TURN_END])
def test_stop_ids_end_the_turn(tokenizer, stop):
    parser = TurnParser(tokenizer)
    ids = tokenizer.encode("done é", add_special_tokens=False)
    events = [e for token in [*ids, stop] for e in parser.feed(token)]
    assert "".join(e.text for e in events) == "done é" and parser.stopped
    assert parser.feed(ids[0]) == [] and parser.finish() == []


def test_thinking_open(tokenizer):
    ids = tokenizer.encode("more\n<channel|>4", add_special_tokens=False)
    assert read(TurnParser(tokenizer, thinking_open=True), ids) == ("more", "4")


def test_events_come_as_early_as_they_can(tokenizer):
    parser = TurnParser(tokenizer)
    assert parser.feed(OPEN) == []
    for token in tokenizer.encode("thought\n", add_special_tokens=False):
        assert parser.feed(token) == []
    (a, newline, b) = (tokenizer.token_id(t) for t in ("a", "\n", "b"))
    assert parser.feed(a) == [Thought("a")]
    assert parser.feed(newline) == []  # may be the one before <channel|>
    assert parser.feed(b) == [Thought("\nb")]
    assert parser.feed(newline) == []
    assert parser.feed(CLOSE) == []
    assert parser.feed(b) == [Text("b")]


# The published templates


USER = {"role": "user", "content": "2+2?"}
CALL = {"type": "function", "id": "1", "function": {"name": "add", "arguments": {"a": 2}}}
AFTER_TOOL = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "4"},
]


@pytest.mark.parametrize("name", ["E2B-E4B", "12B-26B-31B"])
@pytest.mark.parametrize(
    ("messages", "thinking", "output", "expected"),
    [
        ([USER], False, "4<turn|>", ("", "4")),
        ([USER], True, "<|channel>thought\nadd\n<channel|>4<turn|>", ("add", "4")),
        # With thinking on, the prompt after a tool response ends inside the thought.
        (AFTER_TOOL, True, "so it is 4\n<channel|>4<turn|>", ("so it is 4", "4")),
        (AFTER_TOOL, False, "4<turn|>", ("", "4")),
        # What a user typed is no state of the model's turn.
        ([{"role": "user", "content": "<|channel>thought\n"}], False, "4<turn|>", ("", "4")),
    ],
    ids=["plain", "thinking", "after-tool-thinking", "after-tool", "typed-by-user"],
)
def test_published_templates(tokenizer, name, messages, thinking, output, expected):
    tokenizer = published(tokenizer, name)
    prompt = render(tokenizer, messages, thinking)
    assert prompt.count(2) == 1 and prompt[0] == 2
    for ids in encodings(tokenizer, output, count=4):
        assert read(TurnParser.after_prompt(tokenizer, prompt), ids) == expected


def test_the_large_template_ends_in_an_empty_thought(tokenizer):
    prompts = {n: render(published(tokenizer, n), [USER], False) for n in ("E2B-E4B", "12B-26B-31B")}
    assert prompts["12B-26B-31B"][-1] == CLOSE and CLOSE not in prompts["E2B-E4B"]


@pytest.mark.parametrize(
    ("prompt", "output", "expected"),
    [
        ("<|turn>model\n<|channel>", "thought\nx\n<channel|>y", ("x", "y")),
        ("<|turn>model\n<|channel>thou", "ght\nx\n<channel|>y", ("x", "y")),
        ("<|turn>model\n<|channel>thought\nbefore\n", "x<channel|>y", ("x", "y")),
        ("no turns at all é", "x", ("", "x")),
        ("<|turn>model\n<|channel>thought\nold<turn|>\n<|turn>model\n", "x", ("", "x")),
    ],
)
def test_any_prompt_sets_the_state(tokenizer, prompt, output, expected):
    """A prompt cut anywhere, its last byte tokens included, leaves nothing of itself in the answer."""
    for before in encodings(tokenizer, prompt, count=6):
        for ids in encodings(tokenizer, output, count=2):
            assert read(TurnParser.after_prompt(tokenizer, before), ids) == expected


def test_a_vocabulary_without_channels_has_only_text(tmp_path):
    from tokenizers import Tokenizer as RawTokenizer
    from tokenizers.models import WordLevel

    raw = RawTokenizer(WordLevel({"a": 0, "b": 1, "<eos>": 2}, unk_token="a"))
    tokenizer = Tokenizer(raw.to_str())
    parser = TurnParser.after_prompt(tokenizer, [0])
    assert [e.kind for t in (0, 1) for e in parser.feed(t)] == ["text", "text"]


def test_render_passes_thinking_and_tools(tokenizer):
    tool = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}
    large = published(tokenizer, "12B-26B-31B")
    text = large.decode(render(large, [USER], True, tools=[tool], add_generation_prompt=False))
    assert text.startswith("<bos><|turn>system\n<|think|>\n<|tool>declaration:add{")
    assert text.endswith("2+2?<turn|>\n")
