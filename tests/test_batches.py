"""Rows of a batch: each says what it would say alone, keeps its own rules, and ends on its own."""

import json
import re

import jsonschema
import mlx.core as mx
import numpy as np
import pytest
from schemas import SCHEMAS
from tiny import FAMILIES, make_tiny

from mlx_gemma4 import batch_steps, generate_batch, load, stream_batch
from mlx_gemma4.batches import BatchAnswer
from mlx_gemma4.errors import ContextError, Gemma4Error, UsageError
from mlx_gemma4.events import Text
from mlx_gemma4.generation import generate_step
from mlx_gemma4.guides import TurnGuide
from mlx_gemma4.media.prompt import Prompt, Run
from mlx_gemma4.sampling import Sampling

CLOSE = 101  # <channel|>
ids = np.random.default_rng(0).integers(120, 400, 4000).tolist()
# Around the tiny window of 8, and far beyond it.
LENGTHS = (5, 1, 40, 8, 23, 9, 33)
PROMPTS = [[2, *ids[100 * i : 100 * i + n - 1]] for i, n in enumerate(LENGTHS)]
LIMITS = [14, 3, 6, 1, 20, 9, 11]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    made = {}

    def get(family="e2b", **options):
        key = (family, *options.items())
        if key not in made:
            context = options.pop("context", 4096)
            folder = make_tiny(tmp_path_factory.mktemp("tiny"), family, max_position_embeddings=context)
            made[key] = load(folder, dtype="float32", **options)
        model, tokenizer = made[key]
        tokenizer.eos_token_ids = set()
        return model, tokenizer

    return get


class Spy:
    """A model that notes the shape of every call, where its cache then stands, and the last logits."""

    def __init__(self, model):
        self.text_config, self.make_cache, self._model = model.text_config, model.make_cache, model
        self.calls: list[tuple[int, int, int]] = []
        self.logits: list[mx.array] = []

    def __call__(self, tokens, cache):
        logits = self._model(tokens, cache=cache)
        self.calls.append((*tokens.shape, cache[0].offset))
        self.logits.append(logits[:, -1])
        return logits


def alone(model, prompt, most, sampling=None, guide=None):
    """The tokens of one prompt by `generate_step`; <|tool_response> ends every turn."""
    sampling = sampling or Sampling(temperature=0.0)
    out = []
    steps = generate_step(
        mx.array(prompt),
        model,
        max_tokens=most,
        sampler=sampling.sampler(),
        logits_processors=sampling.logits_processors(),
        guide=guide,
    )
    for token, _ in steps:
        out.append(token)
        if token in (1, 50, 106) and (token == 50 or guide is not None):
            break
    return out


def tokens_of(answers):
    return [list(a.tokens) for a in answers]


# The same as alone


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("rows", "step"), [(7, 2048), (3, 10)])
def test_greedy_rows_say_what_they_say_alone(loaded, family, rows, step):
    model, tokenizer = loaded(family)
    expected = [alone(model, prompt, most) for prompt, most in zip(PROMPTS, LIMITS, strict=True)]
    spy = Spy(model)
    answers = generate_batch(spy, tokenizer, PROMPTS, max_tokens=LIMITS, batch_size=rows, prefill_step_size=step)
    assert tokens_of(answers) == expected
    assert [a.row for a in answers] == list(range(7))
    assert [a.reason for a in answers] == ["stop" if e[-1] == 50 else "length" for e in expected]
    assert [a.prompt_tokens for a in answers] == list(LENGTHS)
    assert max(b for b, _, _ in spy.calls) == rows
    assert max(b * length for b, length, _ in spy.calls) <= step


@pytest.mark.parametrize("family", ["e2b", "26b-a4b"])
def test_logits_are_those_without_a_batch(loaded, family):
    """Rows that came together and one that joined: every logit of every step against a call over all of its row."""
    model, tokenizer = loaded(family)
    order = [2, 6, 4]  # the order they are read in; the last two are together first
    spy = Spy(model)
    answers = generate_batch(spy, tokenizer, [PROMPTS[i] for i in order], max_tokens=[12, 3, 9], batch_size=2)
    worst, at = 0.0, [0, 0, 0]
    decoded = [x for x, (_, length, _) in zip(spy.logits, spy.calls, strict=True) if length == 1]
    whole = [model(mx.array([[*PROMPTS[i], *a.tokens]]))[0] for i, a in zip(order, answers, strict=True)]
    # Who is in the batch at each of these calls: two first, the second of them gives its place to the third.
    for x in decoded:
        for row in x:
            gaps = [
                mx.abs(w[len(PROMPTS[i]) - 1 + n] - row).max().item() if n <= len(a.tokens) else 99
                for w, i, n, a in zip(whole, order, at, answers, strict=True)
            ]
            who = int(np.argmin(gaps))
            at[who] += 1
            worst = max(worst, gaps[who])
    # One more where a stop token was known too late.
    assert [n - (a.reason == "stop") for n, a in zip(at, answers, strict=True)] == [len(a.tokens) for a in answers]
    assert worst < 1e-4


def test_sampled_rows_follow_their_own_seeds_and_settings(loaded):
    model, tokenizer = loaded()
    settings = [
        Sampling(temperature=1.2, top_k=0, top_p=1.0, seed=3),
        Sampling(temperature=0.0, repetition_penalty=1.5),
        Sampling(seed=4, suppress_tokens=(300,), max_tokens=5),
        None,
    ]
    prompts = PROMPTS[:4]
    answers = generate_batch(model, tokenizer, prompts, max_tokens=9, sampling=settings, batch_size=3)
    assert tokens_of(answers) == [
        alone(model, p, 5 if s and s.max_tokens == 5 else 9, s) for p, s in zip(prompts, settings, strict=True)
    ]


def test_one_seed_for_all_gives_each_row_its_own(loaded):
    model, tokenizer = loaded()
    sampling = Sampling(temperature=1.5, top_k=0, top_p=1.0, seed=7)
    answers = generate_batch(model, tokenizer, [PROMPTS[0]] * 3, max_tokens=8, sampling=sampling)
    one = Sampling(temperature=1.5, top_k=0, top_p=1.0, seed=8)
    assert len({a.tokens for a in answers}) == 3
    assert list(answers[1].tokens) == alone(model, PROMPTS[0], 8, one)


def test_a_table_on_disk(loaded):
    model, tokenizer = loaded("e2b", ple="disk")
    assert model.disk_table is not None
    answers = generate_batch(model, tokenizer, PROMPTS, max_tokens=LIMITS, batch_size=3)
    memory = loaded()[0]
    assert tokens_of(answers) == [alone(memory, p, n) for p, n in zip(PROMPTS, LIMITS, strict=True)]


@pytest.mark.parametrize("family", ["e2b", "31b"])
def test_compressed_caches(loaded, family):
    """Rows of one length say what they say alone; of others, their logits are as near to the exact ones as alone."""
    model, tokenizer = loaded(family, kv_bits=4)
    exact, _ = loaded(family)
    same = [[2, *ids[i : i + 149]] for i in (0, 150, 300)]
    answers = generate_batch(model, tokenizer, same, max_tokens=[8, 2, 8], batch_size=2)
    first = generate_batch(model, tokenizer, same[:2], max_tokens=[8, 2])
    assert tokens_of(first) == [alone(model, p, n) for p, n in zip(same[:2], (8, 2), strict=True)]
    assert tokens_of(answers)[:2] == tokens_of(first)

    def error(found, prompt):
        return mx.abs(found - exact(mx.array([prompt]))[0, -1]).mean().item()

    mixed = [[2, *ids[i : i + n - 1]] for i, n in ((0, 230), (500, 151), (1000, 200))]
    errors = []
    for prompt in mixed:
        cache = model.make_cache()
        model(mx.array([prompt[:-1]]), cache=cache)
        errors.append(error(model(mx.array([prompt[-1:]]), cache=cache)[0, -1], prompt))
    spy = Spy(model)
    list(stream_batch(spy, tokenizer, mixed, max_tokens=1))
    together = [error(row, mixed[i]) for row, i in zip(spy.logits[-1], (0, 2, 1), strict=True)]
    spy = Spy(model)
    list(stream_batch(spy, tokenizer, mixed, max_tokens=[5, 3, 2], batch_size=2))
    read = next(i for i, call in enumerate(spy.calls) if call[:2] == (1, 150))  # the row that joined
    joined = error(spy.logits[read + 1][0], mixed[1])
    assert max(*together, joined) < 2 * max(errors)


# Ends


def test_each_row_ends_by_itself_and_leaves(loaded):
    model, tokenizer = loaded()
    expected = [alone(model, p, 30) for p in PROMPTS[:3]]
    stop = expected[1][6]
    tokenizer.eos_token_ids = {stop}
    ends = [e.index(stop) + 1 if stop in e else 30 for e in expected]
    spy = Spy(model)
    answers = generate_batch(spy, tokenizer, PROMPTS[:3], max_tokens=30)
    assert tokens_of(answers) == [e[:n] for e, n in zip(expected, ends, strict=True)]
    assert [a.reason for a in answers] == ["stop" if n < 30 else "length" for n in ends] and "stop" in str(answers)
    # A row that stops is computed once more, since the next token is under way before this one is known.
    assert sum(b for b, length, _ in spy.calls[1:]) == sum(ends) + sum(n < 30 for n in ends)


def test_texts_come_as_they_are_said_and_make_the_answer(loaded):
    model, tokenizer = loaded()
    events = list(stream_batch(model, tokenizer, PROMPTS[:4], max_tokens=25))
    for row in range(4):
        own = [event for n, event in events if n == row]
        assert isinstance(own[-1], BatchAnswer) and own[-1].row == row and own[-1].kind == "done"
        assert "".join(e.text for e in own if isinstance(e, Text)) == own[-1].text
        assert not any(isinstance(e, BatchAnswer) for e in own[:-1])
    first_done = next(i for i, (_, e) in enumerate(events) if isinstance(e, BatchAnswer))
    assert len({n for n, _ in events[:first_done]}) == 4  # side by side, not one after the other


def test_the_context_ends_rows_where_it_ends_them_alone(loaded):
    model, tokenizer = loaded("e4b", context=42)
    answers = generate_batch(model, tokenizer, PROMPTS, max_tokens=-1, batch_size=2)
    assert [len(a.tokens) for a in answers] == [42 - n + 1 for n in LENGTHS]
    assert tokens_of(answers) == [alone(model, p, -1) for p in PROMPTS]
    with pytest.raises(ContextError, match=r"prompt 1: .*43 tokens"):
        generate_batch(model, tokenizer, [[7], [7] * 43])


def test_memory_does_not_grow_with_the_number_of_prompts(loaded, monkeypatch):
    model, tokenizer = loaded("31b")
    monkeypatch.setattr(batch_steps, "LEAST", 24)
    prompts = [[2, *ids[i : i + 5 + i % 6]] for i in range(40)]
    spy = Spy(model)
    answers = generate_batch(spy, tokenizer, prompts, max_tokens=[4 + i % 3 for i in range(40)], batch_size=4)
    assert tokens_of(answers) == [alone(model, p, 4 + i % 3) for i, p in enumerate(prompts)]
    assert max(b for b, _, _ in spy.calls) == 4
    assert 11 < max(offset for _, _, offset in spy.calls) <= 24 + 6
    # Rows took the places of others: fewer calls than whole batches one after the other would need.
    assert sum(b for b, length, _ in spy.calls if length == 1) / sum(length == 1 for _, length, _ in spy.calls) > 2.5


def test_cancelling_and_progress(loaded):
    model, tokenizer = loaded()
    calls = []
    generate_batch(
        model,
        tokenizer,
        PROMPTS,
        max_tokens=4,
        batch_size=3,
        prefill_step_size=30,
        prompt_progress_callback=lambda *c: calls.append(c),
    )
    assert calls[0] == (0, sum(LENGTHS)) and calls[-1] == (sum(LENGTHS), sum(LENGTHS)) and calls == sorted(calls)
    answers = generate_batch(
        model, tokenizer, PROMPTS, max_tokens=4, batch_size=3, prompt_progress_callback=lambda done, _: done < 100
    )
    by_reason = {r: {a.row for a in answers if a.reason == r} for r in ("length", "cancelled")}
    assert by_reason["cancelled"] and len(answers) == 7 and 2 not in by_reason["cancelled"]
    for last in (0, sum(LENGTHS)):  # before the first chunk, after the last
        answers = generate_batch(model, tokenizer, PROMPTS, prompt_progress_callback=lambda done, _, n=last: done < n)
        assert [(a.row, a.reason, a.tokens) for a in answers] == [(i, "cancelled", ()) for i in range(7)]
    steps = stream_batch(model, tokenizer, PROMPTS, max_tokens=50)
    next(steps)
    steps.close()


# Forms and thoughts


REGEX = "[0-9]{4} (yes|no)"
MIX = [SCHEMAS["flat"], None, {"type": "regex", "regex": REGEX}, SCHEMAS["shapes"], SCHEMAS["enum unicode"], None]


@pytest.mark.parametrize("size", [2, 6])
def test_rows_keep_their_own_forms_and_thoughts(loaded, size):
    from mlx_gemma4.structured import grammar_for

    model, tokenizer = loaded()
    tokenizer.eos_token_ids = {1, 106}
    label = tokenizer.encode("<|channel>thought\n", add_special_tokens=False)
    prompts = [[*p, *label] if i % 2 else p for i, p in enumerate(PROMPTS[:6])]
    thinking = [10 if i % 2 else False for i in range(6)]
    most = [80, 60, 30, 130, 60, 40]
    # Without a form nothing keeps a random model from stopping, or calling, in the middle of its thought.
    unsaid = [(1, 48, 50, 106) if form is None else () for form in MIX]
    sampling = [Sampling(temperature=1.0, seed=i, suppress_tokens=unsaid[i]) for i in range(6)]
    answers = generate_batch(
        model,
        tokenizer,
        prompts,
        max_tokens=most,
        sampling=sampling,
        thinking=thinking,
        response_formats=MIX,
        batch_size=size,
    )
    for i, (answer, form) in enumerate(zip(answers, MIX, strict=True)):
        guide = None
        if form is not None or i % 2:
            grammar = None if form is None else grammar_for(tokenizer, form)
            guide = TurnGuide(tokenizer, prompts[i], bool(i % 2), 10 if i % 2 else None, grammar)
        assert list(answer.tokens) == alone(model, prompts[i], most[i], sampling[i], guide)
        assert len(answer.tokens) <= most[i] and answer.error is None
        if i % 2:
            assert 0 < answer.thought_tokens <= 10 + 8 and answer.thought and answer.tokens.index(CLOSE) <= 10 + 8
        if form is not None and "regex" in form:
            assert re.fullmatch(REGEX, answer.text)
        elif form is not None:
            jsonschema.validate(json.loads(answer.text), form)


def test_a_form_streams_and_one_is_for_all(loaded):
    model, tokenizer = loaded()
    tokenizer.eos_token_ids = {1, 106}
    events = list(stream_batch(model, tokenizer, PROMPTS[:5], response_formats=SCHEMAS["array bounded"], max_tokens=40))
    answers = [e for _, e in events if isinstance(e, BatchAnswer)]
    for answer in answers:
        jsonschema.validate(json.loads(answer.text), SCHEMAS["array bounded"])
        assert sum(n == answer.row and isinstance(e, Text) for n, e in events) > 1
    assert len(answers) == 5


def test_messages_with_tools_and_a_call(loaded):
    model, tokenizer = loaded()
    tokenizer.eos_token_ids = {1, 106}

    def look(what: int):
        """Looks."""

    messages = [{"role": "user", "content": "the model"}]
    answers = generate_batch(
        model,
        tokenizer,
        [messages, [*messages, {"role": "assistant", "content": "x"}, *messages]],
        tools=[look],
        response_formats={"type": "tool_call"},
        max_tokens=600,
        sampling=Sampling(temperature=1.0, seed=2),
    )
    assert [a.prompt_tokens for a in answers] == [
        len(tokenizer.apply_chat_template(messages)),
        len(tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": "x"}, *messages])),
    ]
    for answer in answers:
        [call] = answer.calls
        assert call.name == "look" and isinstance(call.arguments["what"], int) and call.id == "call_0"
        assert answer.reason == "tool_calls" and answer.text == ""


def test_what_goes_wrong_in_a_row_is_its_own_error(loaded, monkeypatch):
    from mlx_gemma4.structured import GrammarGuide

    model, tokenizer = loaded()
    tokenizer.eos_token_ids = {1, 106}
    forms = [SCHEMAS["form"], None, {"type": "regex", "regex": "a{900}"}, SCHEMAS["types"]]
    mask, asked = GrammarGuide.mask, []

    def fails(guide):
        asked.append(guide._grammar) if "a{900}" in guide._grammar else None
        if len(asked) == 4 and guide._grammar == asked[0]:
            raise Gemma4Error("the response format became too complex: for this test")
        return mask(guide)

    monkeypatch.setattr(GrammarGuide, "mask", fails)
    answers = generate_batch(
        model, tokenizer, PROMPTS[:4], response_formats=forms, max_tokens=[20, 9, 3000, 40], batch_size=3
    )
    assert [a.reason == "error" for a in answers] == [True, False, True, False]
    [only] = generate_batch(model, tokenizer, PROMPTS[:1], response_formats=forms[0], max_tokens=20)
    assert only == answers[0]
    assert "raise max_tokens" in answers[0].error and answers[0].tokens == ()
    assert "became too complex" in answers[2].error and "\n" not in answers[2].error
    assert answers[2].text == "aaa" and len(answers[2].tokens) == 3
    assert list(answers[1].tokens) == alone(model, PROMPTS[1], 9)
    jsonschema.validate(json.loads(answers[3].text), SCHEMAS["types"])


def test_llguidance_comes_with_the_first_form_only(clean_python):
    code = (
        "import sys\nfrom mlx_gemma4 import generate_batch, load\n"
        "said = generate_batch(*load(), [[{'role': 'user', 'content': 'What is 2 + 3?'}]] * 2, max_tokens=8)\n"
        "print(said[0].text == said[1].text != '', 'llguidance' in sys.modules)"
    )
    assert clean_python(code).split() == ["True", "False"]


# Refusals


@pytest.mark.parametrize(
    ("prompts", "options", "says"),
    [
        ("one", {}, r"use \[prompt\]"),
        ([2, 3], {}, r"use \[prompt\]"),
        ([{"role": "user", "content": "x"}], {}, r"use \[prompt\]"),
        ([[2], []], {}, "prompt 1 must be text, messages or at least one token id"),
        ([[2], ["x"]], {}, "prompt 1 must be"),
        ([[{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]], {}, "prompt 0 has more than text"),
        ([Prompt([2, 500], (Run(1, None, -1),))], {}, "prompt 0 has pictures or sound"),
        ([[2]], {"batch_size": 0}, "batch_size"),
        ([[2]], {"prefill_step_size": 0}, "prefill_step_size"),
        ([[2]], {"max_tokens": 0}, "max_tokens"),
        ([[2], [2]], {"max_tokens": [1]}, "max_tokens has 1 entries for 2 prompts"),
        ([[2]], {"sampling": [None, None]}, "sampling has 2 entries for 1 prompts"),
        ([[2]], {"thinking": "much"}, "thinking is off, on"),
        ([[2], [2]], {"response_formats": [None, {"type": "regex", "regex": "["}]}, "prompt 1: .*cannot be used"),
        ([[2]], {"response_formats": "yaml"}, "prompt 0: a response format is"),
        ([[2]], {"response_formats": {"type": "tool_call"}}, "give it tools="),
    ],
)
def test_unusable_arguments(loaded, prompts, options, says):
    model, tokenizer = loaded()
    tokenizer.eos_token_ids = {1}
    spy = Spy(model)
    with pytest.raises(UsageError, match=says) as error:
        generate_batch(spy, tokenizer, prompts, **options)
    assert "\n" not in str(error.value) and spy.calls == []


def test_no_prompts_no_answers(loaded):
    assert generate_batch(*loaded(), []) == []


def test_logits_that_are_no_numbers(loaded):
    model, tokenizer = loaded()
    broken = Spy(model)
    broken._model = lambda tokens, cache: model(tokens, cache=cache) * mx.array(float("nan"))
    with pytest.raises(Gemma4Error, match="--check"):
        generate_batch(broken, tokenizer, PROMPTS)
