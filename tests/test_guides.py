"""Thinking budgets: how long a thought may be, how it is closed, and that what follows is read as the answer."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from scripted import ScriptedModel
from tiny import make_tiny, write_tokenizer

from mlx_gemma4 import Chat, load
from mlx_gemma4.errors import UsageError
from mlx_gemma4.events import Text, Thought, ToolCall
from mlx_gemma4.generation import generate_step
from mlx_gemma4.guides import GRACE, LEVELS, TurnGuide, mask_rows, thinking_budget
from mlx_gemma4.sampling import Sampling, make_sampler
from mlx_gemma4.tokenizer import Tokenizer
from mlx_gemma4.turns import TurnParser

TEMPLATES = Path(__file__).parent / "fixtures" / "chat_template"
OPEN, CLOSE, NEWLINE, STOP, CALL = 100, 101, 107, 106, 48
LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks.",
        "parameters": {"type": "object", "properties": {"what": {"type": "string"}}},
    },
}
CALLED = [
    {"role": "user", "content": "x"},
    {
        "role": "assistant",
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "look", "arguments": {"what": "a"}}}],
    },
    {"role": "tool", "tool_call_id": "c", "content": "b"},
]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return (folder / "tokenizer.json").read_text()


@pytest.fixture(params=["E2B-E4B", "12B-26B-31B"])
def tokenizer(vocabulary, request):
    source = (TEMPLATES / f"chat_template.{request.param}.jinja").read_text(encoding="utf-8")
    return Tokenizer(vocabulary, chat_template=source, eos_token_ids=[1, 106, 50])


@pytest.fixture(scope="module", params=["e2b", "26b-a4b"])
def random_model(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp(request.param)
    make_tiny(folder, request.param, layer_types=["sliding_attention", "full_attention"], num_kv_shared_layers=0)
    return load(str(folder), dtype="float32")[0]


def said(events, kind=Text):
    return "".join(e.text for e in events if isinstance(e, kind))


# What may be asked for


@pytest.mark.parametrize(
    ("thinking", "means"),
    [
        (False, (False, None)),
        ("off", (False, None)),
        (0, (False, None)),
        ("0", (False, None)),
        (True, (True, None)),
        ("on", (True, None)),
        *((level, (True, tokens)) for level, tokens in LEVELS.items()),
        (12, (True, 12)),
        ("12", (True, 12)),
        (1, (True, 1)),
    ],
)
def test_what_thinking_means(thinking, means):
    assert thinking_budget(thinking) == means


@pytest.mark.parametrize("thinking", ["much", -1, "-1", 1.5, float("nan"), float("inf"), None, [], "1.5"])
def test_other_thinking_is_refused_in_a_line(thinking):
    with pytest.raises(UsageError, match="off, on, low, medium, high or a number of tokens") as e:
        thinking_budget(thinking)
    assert "\n" not in str(e.value)


# Thoughts of a model that never stops thinking


def think(model, tokenizer, prompt, budget, sampler=None, opens=True, most=60, always=()):
    """(events, tokens): thoughts are opened where `opens`, never closed, and hold the tokens `always` in turn."""
    parser, ahead = (TurnParser.after_prompt(tokenizer, prompt) for _ in range(2))
    guide = TurnGuide(tokenizer, prompt, True, budget)
    events, tokens = [], []

    def bias(seen, logits):
        said = seen.tolist()[len(prompt) :]
        if said:
            ahead.feed(said[-1])
        logits = logits.at[:, mx.array([CLOSE, 1, 50, 106, CALL])].add(-1000.0)
        if opens and ahead.state == "text" and len(said) < most // 2:
            logits = logits.at[:, OPEN].add(1000.0)
        if always and ahead.state in ("label", "thought"):
            logits = logits.at[:, always[len(said) % len(always)]].add(2000.0)
        return logits

    steps = generate_step(
        mx.array(prompt), model, max_tokens=most, sampler=sampler, logits_processors=[bias], guide=guide
    )
    for token, _ in steps:
        tokens.append(token)
        events += parser.feed(token)
    return events + parser.finish(), tokens


def thoughts(tokens, opened):
    """Lengths of the thoughts, <channel|> included; opened: the prompt opened the first one."""
    lengths, begin = [], -1 if opened else None
    for i, token in enumerate(tokens):
        if token == OPEN:
            begin = i
        elif token == CLOSE and begin is not None:
            lengths.append(i - begin)
            begin = None
    return lengths, begin is not None


@pytest.mark.parametrize("budget", [1, 5, 16, 30])
@pytest.mark.parametrize("seed", [None, 0])
def test_a_thought_keeps_to_its_budget_and_the_answer_follows(random_model, tokenizer, budget, seed):
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], enable_thinking=True)
    sampler = None if seed is None else make_sampler(1.0, seed=seed)
    events, tokens = think(random_model, tokenizer, prompt, budget, sampler)
    lengths, unfinished = thoughts(tokens, opened=False)
    assert sum(lengths) <= budget + 8 and not unfinished
    at = tokens.index(CLOSE)
    assert tokens[at - 1] == NEWLINE  # as the template closes it
    assert said(events) and "<channel" not in said(events)


def test_the_prompt_may_open_the_thought(random_model, tokenizer):
    prompt = tokenizer.apply_chat_template(CALLED, tools=[LOOK], enable_thinking=True)
    opened = TurnParser.after_prompt(tokenizer, prompt).state == "thought"
    assert opened  # both templates do after a tool's result
    events, tokens = think(random_model, tokenizer, prompt, 10, opens=False)
    lengths, unfinished = thoughts(tokens, opened=True)
    assert 10 <= lengths[0] <= 18 and len(lengths) == 1 and not unfinished
    assert said(events, Thought) and said(events)


def test_several_thoughts_share_the_budget(tokenizer):
    reply = "".join(f"<|channel>thought\n{'word ' * 3}{i}\n<channel|>said {i}. " for i in range(6))
    model = ScriptedModel(tokenizer, [reply])
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], enable_thinking=True)
    guide = TurnGuide(tokenizer, prompt, True, 60)
    tokens = [t for t, _ in generate_step(mx.array(prompt), model, max_tokens=150, guide=guide)]
    lengths, unfinished = thoughts(tokens, opened=False)
    assert len(lengths) > 1 and sum(lengths) <= 68 and not unfinished
    assert not guide.mask()[OPEN]  # and then none may be opened


def test_a_thought_of_its_own_length_is_left_alone(tokenizer):
    reply = "<|channel>thought\nthe user asks\n<channel|>the model"
    chat = Chat(ScriptedModel(tokenizer, [reply]), tokenizer, sampling=Sampling(temperature=0.0), thinking=500)
    events = list(chat.stream("x"))
    assert said(events, Thought) == "the user asks" and said(events) == "the model"


@pytest.mark.parametrize("text", ["é", "漢", "🍎"])
@pytest.mark.parametrize("budget", [9, 11, 12])
def test_a_thought_is_not_closed_inside_a_character(random_model, tokenizer, text, budget):
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], enable_thinking=True)
    spelled = [tokenizer.token_id(f"<0x{b:02X}>") for b in text.encode()]
    label = tokenizer.encode("thought\n", add_special_tokens=False)
    events, tokens = think(random_model, tokenizer, [*prompt, OPEN, *label], budget, opens=False, always=spelled)
    thought = said(events, Thought)
    assert set(thought) == {text} and tokens.index(CLOSE) + 1 <= budget + 8
    assert "\ufffd" not in tokenizer.decode(tokens[: tokens.index(CLOSE)])


def test_the_end_of_a_sentence_is_waited_for_a_moment(tokenizer):
    label = tokenizer.encode("<|channel>thought\n", add_special_tokens=False)
    words = tokenizer.encode("abcdefgh", add_special_tokens=False)
    dot = tokenizer.token_id(".")
    for before, expected in ((8, [NEWLINE, CLOSE]), (2, None)):
        guide = TurnGuide(tokenizer, [2, *label], True, 3)
        for token in words[:before]:
            if guide.forced() is None:
                guide.advance(token)
        assert (guide.forced() is not None) == (expected is not None)
    guide = TurnGuide(tokenizer, [2, *label], True, 3)
    for token in [*words[:3], dot]:
        guide.advance(token)
    assert guide.forced() == NEWLINE  # one past the budget, and a sentence has ended
    guide.advance(NEWLINE)
    assert guide.forced() == CLOSE
    guide.advance(CLOSE)
    assert guide.forced() is None


def test_a_line_that_has_ended_is_not_ended_twice(tokenizer):
    label = tokenizer.encode("<|channel>thought\n", add_special_tokens=False)
    guide = TurnGuide(tokenizer, [2, *label], True, 2)
    for token in [*tokenizer.encode("a", add_special_tokens=False), NEWLINE]:
        guide.advance(token)
    assert guide.forced() == CLOSE


def test_a_call_inside_a_thought_is_not_broken(tokenizer):
    reply = '<|channel>thought\nlet me<|tool_call>call:look{what:<|"|>a long text here<|"|>}<tool_call|>'
    chat = Chat(ScriptedModel(tokenizer, [reply]), tokenizer, sampling=Sampling(temperature=0.0), tools=[LOOK])
    events = list(chat.stream("x", thinking=15))
    [call] = [e for e in events if isinstance(e, ToolCall)]
    assert call.arguments == {"what": "a long text here"}


def test_a_tokenizer_without_the_marks_has_no_budget_to_keep(vocabulary):
    tokenizer = Tokenizer(vocabulary.replace("channel", "kanal"), eos_token_ids=[1])
    guide = TurnGuide(tokenizer, [2, 107], True, 3)
    for token in range(200, 220):
        assert guide.forced() is None and guide.mask() is None
        guide.advance(token)


def test_rows_with_and_without_rules(tokenizer):
    label = tokenizer.encode("<|channel>thought\n", add_special_tokens=False)
    closing = TurnGuide(tokenizer, [2, *label], True, 1)
    for _ in range(GRACE + 1):
        closing.advance(300)
    rows = mask_rows([None, closing, TurnGuide(tokenizer, [2], False)], 600)
    assert rows[0].all() and rows[2].all() and np.flatnonzero(rows[1]).tolist() == [NEWLINE]


# The built-in model


@pytest.mark.parametrize("budget", [4, 16, 64])
def test_the_built_in_model_answers_within_a_budget(budget):
    chat = Chat(*load("demo"), sampling=Sampling(temperature=0.0, max_tokens=300))
    events = list(chat.stream("What is 12 + 30?", thinking=budget))
    assert said(events) and "<" not in said(events)
    assert chat.stats.thought_tokens <= budget + 8 + 1  # with <|channel>
