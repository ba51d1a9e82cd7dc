"""One engine: loading, conversations, progress, errors and memory, seen from outside."""

import asyncio
import gc
import re
import threading
import time
from pathlib import Path

import mlx.core as mx
import pytest
from engine_cases import GREEDY, LONG, Pace, agather, checkpoint, eventually, gather

from mlx_gemma4 import Chat, load
from mlx_gemma4.engine import Engine, RequestTimeoutError
from mlx_gemma4.errors import Gemma4Error, ModelNotFoundError, UsageError
from mlx_gemma4.events import Text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(folder):
    with Engine(folder) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(folder):
    """What a chat of its own answers, without any engine."""
    model, tokenizer = load(folder)
    return lambda **options: Chat(model, tokenizer, sampling=GREEDY, **options)


@pytest.fixture
def pace():
    pace = Pace()
    yield pace
    pace.gate.set()


# Loading


def test_loading_tells_how_far_it_is(folder):
    calls = []
    with Engine(folder, progress=lambda *call: calls.append((*call, threading.current_thread().name))) as engine:
        info = engine.ready()
        assert engine.model_info is info
    stages, done, total, threads = zip(*calls, strict=True)
    assert set(stages) == {"weights"} and set(total) == {info.weight_bytes} and set(threads) == {f"gemma4 {folder}"}
    assert done[0] == 0 and done[-1] == info.weight_bytes and list(done) == sorted(done) and len(done) > 10
    assert (info.model_type, info.kv_bits, info.context_limit) == ("gemma4", 16, 4096)
    assert info.chats and not info.sees and not info.hears


def test_options_reach_the_model(folder):
    with Engine(folder, dtype="bfloat16", towers=True) as engine:
        assert engine.ready().compute_dtype == "bfloat16"
    with Engine("demo", kv_bits=3.5) as engine:
        assert engine.ready().kv_bits == 3.5


def test_errors_of_loading_come_out_of_every_use(tmp_path):
    with Engine(tmp_path / "nothing") as engine:
        for use in (engine.ready, lambda: engine.generate("a"), lambda: engine.chat().send("a")):
            with pytest.raises(ModelNotFoundError, match="nothing"):
                use()
        with pytest.raises(ModelNotFoundError):
            asyncio.run(engine.aready())
        checkpoint(tmp_path / "nothing")
        with pytest.raises(ModelNotFoundError):
            engine.ready()
        engine.unload()  # forgets it
        assert engine.ready().context_limit == 4096


def test_progress_can_stop_loading(folder):
    with Engine(folder, progress=lambda stage, done, total: done == 0) as engine:
        for use in (engine.ready, lambda: engine.chat().send("a")):
            with pytest.raises(Gemma4Error, match="stopped by its progress callback"):
                use()


def test_cancel_while_loading(folder):
    """It stops between two tensors; who asks later gets a model after all."""
    reached, go, calls = threading.Event(), threading.Event(), []

    def progress(stage, done, total):
        calls.append(done)
        reached.set()
        assert go.wait(60)

    with Engine(folder, progress=progress) as engine:
        assert reached.wait(60)
        with pytest.raises(RequestTimeoutError):
            engine.ready(timeout=0.01)
        chat = engine.chat(sampling=GREEDY)
        waiting = threading.Thread(target=lambda: calls.append(gather(chat.stream("a"))))
        waiting.start()
        eventually(lambda: chat._requests)
        time.sleep(0.05)
        engine.cancel()
        waiting.join(60)
        assert calls == [0, ("", "cancelled")]  # at once, before loading goes on
        go.set()
        assert engine.ready() and chat.send("a")
        assert calls[2] == 0 and calls[-1] == engine.model_info.weight_bytes


def test_close_while_loading(folder):
    reached = threading.Event()
    engine = Engine(folder, progress=lambda *_: reached.set() or time.sleep(0.02))
    assert reached.wait(60)
    engine.close()
    assert engine.model_info is None


# Conversations


def test_conversations_are_those_of_chat(engine, alone):
    ours, theirs = engine.chat(sampling=GREEDY, system="be brief"), alone(system="be brief")
    for text in ("hello user", "the model", "a"):
        assert ours.send(text) == theirs.send(text)
    assert ours.messages == theirs.messages and ours.stats.cached_tokens == theirs.stats.cached_tokens > 0
    ours.messages.clear()
    ours.messages[0]["content"] = "changed"
    assert ours.messages == theirs.messages  # a copy

    async def further():
        async for event in ours.astream("and"):
            last = event
        return last, await ours.asend("then")

    last, text = asyncio.run(further())
    assert last.reason == "length"
    assert [theirs.send("and"), theirs.send("then")][1] == text and ours.messages == theirs.messages
    ours.clear()
    theirs.clear()
    assert ours.messages == [] and ours.stats is None
    assert ours.send("hello") == theirs.send("hello")


def test_a_history_to_go_on_with(engine, alone):
    chat = alone(system="be brief")
    chat.send("hello user")
    history = [{"role": "system", "content": "be brief"}, *chat.messages]
    ours = engine.chat(messages=history, sampling=GREEDY)
    assert ours.messages == history[1:] and ours.stats is None
    with pytest.raises(UsageError, match="system"):
        engine.chat(messages=history, system="other")
    question = {"role": "user", "content": "the model"}
    once = engine.generate([*history, question], sampling=GREEDY)
    assert ours.send("the model") == chat.send("the model") == once
    with pytest.raises(UsageError, match="user's"):
        engine.generate(chat.messages, sampling=GREEDY)


def test_requests_without_a_conversation(engine, alone):
    truth = alone().send("hello user")
    assert engine.generate("hello user", sampling=GREEDY) == truth
    assert engine.generate([{"type": "text", "text": "hello user"}], sampling=GREEDY) == truth
    assert gather(engine.stream("hello user", sampling=GREEDY)) == (truth, "length")

    async def main():
        assert await engine.agenerate("hello user", sampling=GREEDY) == truth
        return await agather(engine.astream("hello user", sampling=GREEDY))

    assert asyncio.run(main()) == (truth, "length")


def test_fork_and_call(engine, alone):
    chat, other = engine.chat(sampling=GREEDY), alone()
    chat.send("hello")
    other.send("hello")
    branch = chat.fork()
    assert branch.send("a") == other.fork().send("a") and branch.stats.cached_tokens > 0
    assert len(chat.messages) == 2 and len(branch.messages) == 4
    chat.call(lambda chat: chat.set_system("be brief"))
    other.set_system("be brief")
    assert chat.send("b") == other.send("b")
    branch = asyncio.run(chat.afork())
    assert asyncio.run(branch.acall(lambda chat: chat.system)) == "be brief"
    asyncio.run(branch.aclear())
    assert branch.messages == [] and len(chat.messages) == 4
    assert engine.call(lambda model, tokenizer: tokenizer.encode("a")) == asyncio.run(
        engine.acall(lambda model, tokenizer: tokenizer.encode("a"))
    )


def test_a_saved_conversation(engine, alone, tmp_path):
    chat = engine.chat(sampling=GREEDY)
    chat.send("hello")
    chat.call(lambda chat: chat.save(tmp_path / "talk.safetensors"))
    again = engine.chat(make=lambda model, tokenizer: Chat.load(tmp_path / "talk.safetensors", model, tokenizer))
    assert again.send("a") == chat.send("a") and again.stats.cached_tokens == chat.stats.cached_tokens


def test_options_refused(engine):
    for chat in (engine.chat(kv_bits=7), engine.chat(thinking="a bit")):
        with pytest.raises(UsageError):
            chat.send("a")
    for timeout in (0, -1):
        with pytest.raises(UsageError, match="timeout"):
            engine.ready(timeout=timeout)
    with pytest.raises(TypeError):
        engine.chat().send("a", colour="red")


# Progress of a prompt


@pytest.mark.parametrize("style", ["sync", "async"])
def test_progress_comes_to_the_caller(engine, style):
    chat, calls = engine.chat(sampling=GREEDY, prefill_step_size=4), []

    def progress(done, total):
        calls.append((done, total))
        assert threading.current_thread() is threading.main_thread()

    if style == "sync":
        chat.send("hello user", progress=progress)
    else:
        asyncio.run(chat.asend("hello user", progress=progress))
    total = chat.stats.prompt_tokens
    assert calls[0] == (0, total) and calls[-1] == (total, total) and len(calls) > 3


@pytest.mark.parametrize("style", ["sync", "async"])
def test_progress_cancels_within_a_chunk(engine, pace, style):
    chat = engine.chat(make=pace, sampling=GREEDY, prefill_step_size=4)
    question, pace.seconds = "the model reads this " * 8, 0.02

    def progress(done, total):
        return done < 8

    if style == "sync":
        answer = gather(chat.stream(question, progress=progress))
    else:
        answer = asyncio.run(agather(chat.astream(question, progress=progress)))
    assert answer == ("", "cancelled") and chat.messages == []
    assert 2 <= pace.steps <= 4  # the caller hears of a chunk while the next may have begun
    assert chat.send("hello") and len(chat.messages) == 2


def test_errors_of_progress_end_the_request(engine, pace):
    chat = engine.chat(make=pace, sampling=LONG, prefill_step_size=4)
    with pytest.raises(ZeroDivisionError):
        chat.send("hello user", progress=lambda done, total: done // 0)
    assert pace.steps <= 3 and chat.messages == []


# Errors


@pytest.mark.parametrize("error", [RuntimeError("device lost"), KeyboardInterrupt(), SystemExit(3)])
def test_errors_reach_the_caller_as_raised(engine, pace, error):
    chat = engine.chat(make=pace, sampling=GREEDY)
    chat.send("hello")
    pace.error = error
    for ask in (lambda: chat.send("a"), lambda: asyncio.run(chat.asend("a"))):
        if isinstance(error, RuntimeError):
            with pytest.raises(RuntimeError) as caught:
                ask()
            assert caught.value is error
    if not isinstance(error, RuntimeError):
        with pytest.raises(type(error)) as caught:
            chat.send("a")
        assert caught.value is error
    assert len(chat.messages) == 2
    pace.error = None
    assert chat.send("a") and len(chat.messages) == 4


# Memory and the end


def test_unload(folder, alone):
    other = alone()
    gc.collect()
    mx.clear_cache()
    before, calls = mx.get_active_memory(), []
    with Engine(folder, progress=lambda stage, done, total: calls.append(done)) as engine:
        chat = engine.chat(sampling=GREEDY, system="be brief")
        other.system = "be brief"
        assert chat.send("hello") == other.send("hello")
        loaded = mx.get_active_memory()
        assert loaded > before + engine.model_info.weight_bytes
        once = len(calls)
        for unload in (engine.unload, lambda: asyncio.run(engine.aunload())):
            unload()
            assert engine.model_info is None
            assert mx.get_active_memory() - before < 0.1 * (loaded - before)
            messages = chat.messages
            assert messages == other.messages and chat.stats.finish_reason == "length"
            assert chat.send("a") == other.send("a")
        assert len(calls) == 3 * once


def test_conversations_let_go_of_their_cache(engine):
    def talk():
        chat = engine.chat(sampling=GREEDY)
        chat.send("the model reads this " * 12)
        return chat.call(lambda chat: chat.cache_bytes)

    size = talk()
    engine.call(lambda model, tokenizer: None)
    before = mx.get_active_memory()
    for _ in range(5):
        talk()
        engine.generate("the model reads this " * 12, sampling=GREEDY)
    engine.call(lambda model, tokenizer: None)
    assert size > 20_000 and mx.get_active_memory() - before < size


def test_async_with(folder):
    async def main():
        async with Engine(folder) as engine:
            info = await engine.aready()
            assert await engine.chat(sampling=GREEDY).asend("a")
        assert not engine._worker._thread.is_alive()
        return info

    assert asyncio.run(main()).context_limit == 4096


def test_an_engine_that_nobody_holds_ends(folder):
    engine = Engine(folder)
    chat = engine.chat(sampling=GREEDY)
    assert chat.send("a")
    worker = engine._worker._thread
    del engine
    gc.collect()
    assert chat.send("b")  # the conversation holds it
    text = next(e for e in Engine(folder).chat(sampling=GREEDY).stream("a") if isinstance(e, Text))  # so does a turn
    assert text.text
    del chat
    gc.collect()
    worker.join(60)
    assert not worker.is_alive()


def test_the_page_does_what_it_says(capsys):
    page = (Path(__file__).parents[1] / "docs" / "engine.md").read_text(encoding="utf-8")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    assert "ModelInfo" in capsys.readouterr().out and names["engine"]._worker.closed
