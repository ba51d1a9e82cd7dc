"""Conversations: what the model reads each turn, what is computed again, and what interruptions leave behind."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from scripted import ScriptedModel
from tiny import make_tiny, write_tokenizer

from mlx_gemma4 import Chat, load
from mlx_gemma4.chat import Done, Text, Thought
from mlx_gemma4.errors import ContextError, TokenizerError, UsageError
from mlx_gemma4.sampling import Sampling
from mlx_gemma4.tokenizer import Tokenizer
from mlx_gemma4.turns import render

TEMPLATES = Path(__file__).parent / "fixtures" / "chat_template"
GREEDY = Sampling(temperature=0.0)
REPLIES = ["hello user", "the model", "x", "last one"]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return (folder / "tokenizer.json").read_text()


@pytest.fixture(params=["E2B-E4B", "12B-26B-31B"])
def tokenizer(vocabulary, request):
    source = (TEMPLATES / f"chat_template.{request.param}.jinja").read_text(encoding="utf-8")
    return Tokenizer(vocabulary, chat_template=source, eos_token_ids=[1, 106, 50])


def new_chat(tokenizer, replies=REPLIES, **options):
    context, window = options.pop("context", 100_000), options.pop("window", 8)
    model = ScriptedModel(tokenizer, replies, window, context)
    return Chat(model, tokenizer, sampling=options.pop("sampling", GREEDY), **options), model


def held(chat, model):
    """The ids every layer of the live cache holds; the chat's own account must agree."""
    first, second = model.caches[-1]
    assert first.ids == second.ids == chat._memory.ids
    return list(first.ids)


def prompt_of(chat, messages):
    system = [{"role": "system", "content": chat.system}] if chat.system else []
    return render(chat._tokenizer, [*system, *messages], chat.thinking)


def texts(events, kind=Text):
    return "".join(e.text for e in events if isinstance(e, kind))


# Turns


def test_events_and_history(tokenizer):
    chat, _ = new_chat(tokenizer, ["<|channel>thought\nadd\n<channel|>4 🍎"], thinking=True, system="be brief")
    events = list(chat.stream("2+2?"))
    assert texts(events, Thought) == "add" and texts(events) == "4 🍎"
    assert isinstance(events[-1], Done) and [e.kind for e in events].count("done") == 1
    assert chat.messages == [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4 🍎", "reasoning_content": "add"},
    ]
    assert chat.stats is events[-1].stats and events[-1].reason == chat.stats.finish_reason == "stop"


def test_send(tokenizer):
    chat, _ = new_chat(tokenizer)
    assert [chat.send(t) for t in ("a", "b")] == REPLIES[:2]
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2


@pytest.mark.parametrize("window", [8, None], ids=["ring", "trimmable"])
@pytest.mark.parametrize("thinking", [False, True])
def test_every_turn_reads_what_the_template_says(tokenizer, thinking, window):
    """Whatever was reused, the cache holds exactly the freshly rendered prompt and the answer."""
    thought = "<|channel>thought\nhm\n<channel|>" if thinking else ""
    chat, model = new_chat(tokenizer, [thought + r for r in REPLIES], thinking=thinking, system="s", window=window)
    for turn, text in enumerate(["one", "two", "three", "four"]):
        before = list(chat.messages)
        fed = len(model.fed)
        assert chat.send(text) == REPLIES[turn]
        prompt = prompt_of(chat, [*before, {"role": "user", "content": text}])
        answer = [*tokenizer.encode(thought + REPLIES[turn], add_special_tokens=False), 106]
        ids = held(chat, model)
        assert ids[: len(prompt)] == prompt
        assert ids[len(prompt) :] in (answer, answer[:-1])
        computed = sum(len(ids) for ids in model.fed[fed:])
        stats = chat.stats
        assert stats.prompt_tokens == len(prompt)
        assert computed == stats.prompt_tokens - stats.cached_tokens + len(ids) - len(prompt)
    assert len(model.caches) == 1


def test_a_turn_without_stripped_text_is_never_computed_again(vocabulary):
    """E2B/E4B without thoughts: the next prompt begins with everything the cache holds."""
    source = (TEMPLATES / "chat_template.E2B-E4B.jinja").read_text(encoding="utf-8")
    chat, model = new_chat(Tokenizer(vocabulary, chat_template=source, eos_token_ids=[106]))
    chat.send("one")
    before = held(chat, model)
    chat.send("two")
    assert chat.stats.cached_tokens == len(before)


def test_a_ring_goes_back_to_where_the_answer_began(tokenizer):
    """With thinking on the thought disappears from the prompt; all up to "<|turn>model" stays computed."""
    chat, _ = new_chat(tokenizer, ["<|channel>thought\nhm\n<channel|>yes"] * 3, thinking=True)
    boundaries = []
    for text in ("one", "two", "three"):
        fixed = render(tokenizer, [*chat.messages, {"role": "user", "content": text}], True, None, False)
        chat.send(text)
        boundaries.append(len(fixed) + len(tokenizer.encode("<|turn>model", add_special_tokens=False)))
        assert chat.stats.cached_tokens == (boundaries[-2] if len(boundaries) > 1 else 0)


def test_system_prompt_and_clear(tokenizer):
    chat, model = new_chat(tokenizer, system="first")
    chat.send("one")
    chat.set_system("second")
    chat.send("two")
    prompt = prompt_of(chat, [*chat.messages[:2], {"role": "user", "content": "two"}])
    assert held(chat, model)[: len(prompt)] == prompt
    chat.clear()
    assert chat.messages == [] and chat.stats is None and chat.context_used == chat.cache_bytes == 0
    assert chat.system == "second"
    assert chat.send("three") == REPLIES[0]
    assert chat.stats.cached_tokens == 0


def test_edited_history_is_read_as_edited(tokenizer):
    """The way back of a turn that was edited away must not be taken."""
    chat, model = new_chat(tokenizer)
    for text in ("one", "two"):
        chat.send(text)
    del chat.messages[2:]
    chat.messages[0]["content"] = "changed"
    chat.send("two")
    prompt = prompt_of(chat, [*chat.messages[:2], {"role": "user", "content": "two"}])
    assert held(chat, model)[: len(prompt)] == prompt


@pytest.mark.parametrize("window", [8, None], ids=["ring", "trimmable"])
def test_asking_again(tokenizer, window):
    chat, model = new_chat(tokenizer, window=window)
    chat.send("one")
    chat.messages.clear()
    assert chat.send("one") == REPLIES[0]
    fixed = render(tokenizer, [{"role": "user", "content": "one"}], False, None, False)
    assert chat.stats.cached_tokens >= len(fixed)
    assert len(model.caches) == 1


def test_settings_reach_the_model(tokenizer):
    chat, model = new_chat(tokenizer, sampling=Sampling(temperature=0.0, max_tokens=3), kv_bits=16)
    done = list(chat.stream("one"))[-1]
    assert done.reason == "length" and done.stats.generation_tokens == 3
    assert model.kv_bits == 16
    first = tokenizer.encode("hello user", add_special_tokens=False)[0]
    chat.sampling = Sampling(temperature=0.0, max_tokens=3, suppress_tokens=(first,))
    chat.clear()
    list(chat.stream("one"))
    assert first not in held(chat, model)[chat.stats.prompt_tokens :]


def test_defaults_come_from_the_checkpoint(tokenizer):
    tokenizer.generation_defaults = {"do_sample": True, "temperature": 0.25, "top_k": 7}
    chat = Chat(ScriptedModel(tokenizer, REPLIES), tokenizer)
    assert (chat.sampling.temperature, chat.sampling.top_k) == (0.25, 7)


def test_repetition_penalty_sees_the_whole_conversation(tokenizer):
    """What is in the cache counts as much as what was computed now."""
    seen = []

    class Spy(Sampling):
        def logits_processors(self):
            return [lambda tokens, logits: seen.append(tokens.tolist()) or logits]

    chat, model = new_chat(tokenizer, sampling=Spy(temperature=0.0))
    for text in ("one", "two"):
        seen.clear()
        chat.send(text)
        assert seen[0] == held(chat, model)[: chat.stats.prompt_tokens]


def test_an_empty_answer_is_an_answer(tokenizer):
    chat, _ = new_chat(tokenizer, ["", "b"])
    assert chat.send("one") == ""
    assert [m["content"] for m in chat.messages] == ["one", ""]
    assert chat.send("two") == "b"


# Figures


def test_stats(tokenizer):
    chat, model = new_chat(tokenizer, context=500)
    done = list(chat.stream("one"))[-1]
    s = done.stats
    answer = len(tokenizer.encode(REPLIES[0], add_special_tokens=False)) + 1
    assert s.cached_tokens == 0 and s.generation_tokens == answer and s.context_limit == 500
    assert s.context_used == chat.context_used == len(held(chat, model))
    assert s.prompt_tps > 0 and s.generation_tps > 0 and s.peak_memory >= 0
    assert chat.cache_status == ["2 x recorder, empty: 0 bytes"]


def test_progress_counts_what_has_to_be_computed(tokenizer):
    chat, model = new_chat(tokenizer, prefill_step_size=4)
    for text in ("one", "the model reads this"):
        calls = []
        list(chat.stream(text, progress=lambda done, total: calls.append((done, total))))  # noqa: B023
        total = chat.stats.prompt_tokens - chat.stats.cached_tokens
        assert calls[0] == (0, total) and calls[-1] == (total, total)
        assert calls == sorted(calls) and len(set(calls)) >= total // 4
    assert max(len(ids) for ids in model.fed) == 4


# Interruptions


def test_cancel_keeps_what_was_said(tokenizer):
    chat, model = new_chat(tokenizer, ["hello user", "fine"])
    events = []
    for event in chat.stream("one"):
        events.append(event)
        if texts(events) == "hel":
            chat.cancel()
    assert texts(events) == "hel" and events[-1].reason == "cancelled"
    assert chat.messages[-1] == {"role": "assistant", "content": "hel"}
    assert chat.context_used == len(held(chat, model))
    assert chat.send("two") == "fine"
    prompt = prompt_of(chat, chat.messages[:3])
    assert held(chat, model)[: len(prompt)] == prompt


def test_closing_the_iterator_is_a_cancel(tokenizer):
    chat, model = new_chat(tokenizer)
    events = chat.stream("one")
    first = next(events)
    events.close()
    assert chat.messages[-1] == {"role": "assistant", "content": first.text}
    assert chat.send("two") == REPLIES[1]
    held(chat, model)


def test_cancel_inside_a_thought_keeps_it_out_of_the_answer(tokenizer):
    chat, _ = new_chat(tokenizer, ["<|channel>thought\nab\n<channel|>c", "d"], thinking=True)
    for event in chat.stream("one"):
        if isinstance(event, Thought):
            chat.cancel()
    assert chat.messages[-1]["content"] == "" and chat.messages[-1]["reasoning_content"] == "a"
    assert chat.send("two") == "d"


def test_cancel_from_another_thread(tokenizer):
    chat, model = new_chat(tokenizer, ["x" * 5000])
    model.before = lambda call: call == 40 and threading.Thread(target=chat.cancel).start()
    done = list(chat.stream("one"))[-1]
    assert done.reason == "cancelled" and 0 < len(chat.messages[-1]["content"]) < 5000


@pytest.mark.parametrize("how", ["progress", "cancel"])
def test_cancelling_the_prompt_takes_the_question_back(tokenizer, how):
    chat, model = new_chat(tokenizer, prefill_step_size=4)
    chat.send("one")
    messages, question = list(chat.messages), "the model reads this question"

    def progress(done, total):
        if done >= 8:
            chat.cancel()
            return None if how == "cancel" else False

    events = list(chat.stream(question, progress=progress))
    assert [e.kind for e in events] == ["done"] and events[0].reason == "cancelled"
    assert chat.messages == messages
    before = held(chat, model)
    assert chat.context_used == len(before)
    assert chat.send(question) == REPLIES[1]
    assert chat.stats.cached_tokens == len(before)  # what was computed before the cancel counts


def test_a_cancel_between_turns_does_not_reach_the_next(tokenizer):
    chat, _ = new_chat(tokenizer)
    chat.cancel()
    assert chat.send("one") == REPLIES[0]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", ["prompt", "answer"])
def test_errors_keep_the_conversation(tokenizer, error, at):
    chat, model = new_chat(tokenizer, prefill_step_size=4)
    chat.send("one")
    messages, calls = list(chat.messages), len(model.fed)
    long = "the model reads this question"
    events = []

    def fail(call):
        if call == calls + 2 if at == "prompt" else len(events) == 2:
            model.caches[-1][0].append([7])  # torn: one layer is ahead
            raise error("device lost")

    model.before = fail
    with pytest.raises(error):
        for event in chat.stream(long):
            events.append(event)
    model.before = lambda call: None
    said = [{"role": "user", "content": long}, {"role": "assistant", "content": texts(events)}]
    assert chat.messages == messages + (said if at == "answer" else [])
    assert bool(texts(events)) == (at == "answer")
    chat.send("three")
    prompt = prompt_of(chat, chat.messages[:-1])
    assert held(chat, model)[: len(prompt)] == prompt


def test_a_conversation_that_no_longer_fits(tokenizer):
    chat, model = new_chat(tokenizer, context=60)
    chat.send("one")
    messages, fed = list(chat.messages), len(model.fed)
    with pytest.raises(ContextError, match="60"):
        chat.send("y" * 100)
    assert chat.messages == messages and len(model.fed) == fed
    chat.clear()
    assert chat.send("two") == REPLIES[0]


def test_answers_end_with_the_context(tokenizer):
    chat, _ = new_chat(tokenizer, ["x" * 500], context=60)
    done = list(chat.stream("one"))[-1]
    assert done.reason == "length" and done.stats.context_used == 60
    assert done.stats.generation_tokens == 60 - done.stats.prompt_tokens + 1


def test_one_turn_at_a_time(tokenizer):
    chat, _ = new_chat(tokenizer)
    events = chat.stream("one")
    next(events)
    for other in (lambda: chat.send("two"), chat.clear):
        with pytest.raises(UsageError, match="still answering"):
            other()
    list(events)
    assert chat.send("two") == REPLIES[1]


def test_base_models_cannot_chat(vocabulary):
    tokenizer = Tokenizer(vocabulary)
    chat = Chat(ScriptedModel(tokenizer, REPLIES), tokenizer)
    with pytest.raises(TokenizerError, match="-it model"):
        chat.send("one")
    assert chat.messages == []


# The real graph


@pytest.fixture(scope="module", params=["e2b", "26b-a4b"])
def real(request, tmp_path_factory):
    folder = make_tiny(tmp_path_factory.mktemp("tiny"), request.param)
    large = request.param == "26b-a4b"
    source = TEMPLATES / f"chat_template.{'12B-26B-31B' if large else 'E2B-E4B'}.jinja"
    (folder / "chat_template.jinja").write_text(source.read_text(encoding="utf-8"))
    return load(folder, dtype="float32")


@pytest.mark.parametrize("thinking", [False, True])
def test_reuse_never_changes_an_answer(real, thinking):
    """Four turns, each against a chat that computes the same conversation from nothing."""
    settings = Sampling(temperature=0.0, max_tokens=12)
    chat = Chat(*real, thinking=thinking, sampling=settings, prefill_step_size=7)
    reused = 0
    for text in ("hello user", "the model reads", "a", "and now?"):
        fresh = Chat(*real, thinking=thinking, sampling=settings)
        fresh.messages = [dict(m) for m in chat.messages]
        assert chat.send(text) == fresh.send(text)
        assert chat.messages == fresh.messages
        reused += chat.stats.cached_tokens
        assert fresh.stats.cached_tokens == 0
    assert reused > 0


def test_a_seed_fixes_the_conversation(real):
    def run(seed):
        chat = Chat(*real, sampling=Sampling(seed=seed, max_tokens=8))
        return [chat.send(t) for t in ("hello", "hello")]

    first = run(1)
    assert run(1) == first and run(2) != first and first[0] != first[1]


def test_a_way_back_that_was_trimmed_away_is_not_taken(tmp_path):
    """A question on other grounds trims below the snapshot and is cancelled; then the first one comes again."""
    model, tokenizer = load(make_tiny(tmp_path, "e4b", sliding_window=512), dtype="float32")
    chat = Chat(model, tokenizer, sampling=Sampling(temperature=0.0, max_tokens=8))
    first = chat.send("hello user")
    chat.messages.clear()
    assert [e.kind for e in chat.stream("other", progress=lambda done, total: False)] == ["done"]
    assert chat.send("hello user") == first


def test_figures_of_the_real_cache(real):
    chat = Chat(*real, sampling=Sampling(temperature=0.0, max_tokens=4))
    chat.send("hello")
    assert chat.cache_bytes == chat.stats.cache_bytes > 0
    assert any("sliding ring" in line for line in chat.cache_status)
    assert chat.context_limit == real[0].text_config.max_position_embeddings


def test_chatting_imports_no_other_runtime(tmp_path):
    """The whole path, load to answer, without transformers, mlx-lm, mlx-vlm or torch."""
    folder = make_tiny(tmp_path, "e4b")
    script = f"""
import sys
from mlx_gemma4 import Chat, load
from mlx_gemma4.sampling import Sampling
Chat(*load({str(folder)!r}), sampling=Sampling(max_tokens=3)).send("hello")
print(sorted({{"transformers", "mlx_lm", "mlx_vlm", "torch"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
