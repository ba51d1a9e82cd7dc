"""One engine: answers that are stopped, requests that wait and are given up, and closing in the middle of both."""

import asyncio
import threading
import time
from contextlib import aclosing

import pytest
from engine_cases import GREEDY, LONG, Pace, checkpoint, eventually, gather

from mlx_gemma4.engine import CancelledError, Engine, RequestTimeoutError
from mlx_gemma4.errors import UsageError
from mlx_gemma4.events import Text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(folder):
    with Engine(folder) as engine:
        yield engine


@pytest.fixture
def pace():
    pace = Pace()
    yield pace
    pace.gate.set()


# Cancelling an answer


def stop_by(how, chat):
    """Reads two pieces of an endless answer and gives up; what was read."""
    read = []

    async def reading(stop):
        async with aclosing(chat.astream("hello")) as events:
            async for event in events:
                read.append(event)
                if len(read) == 2 and stop == "break":
                    break
                if len(read) == 2 and stop == "task":
                    asyncio.current_task().cancel()
                if len(read) == 2 and stop == "cancel":
                    chat.cancel()

    if how in ("break", "close", "cancel"):
        events = chat.stream("hello")
        for event in events:
            read.append(event)
            if len(read) == 2:
                if how == "cancel":
                    threading.Thread(target=chat.cancel).start()
                else:
                    break
        if how == "close":
            events.close()
        del events
    elif how == "async task":
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(reading("task"))
    elif how == "async send":

        async def sending():
            task = asyncio.create_task(chat.asend("hello"))
            while not chat._engine_steps() >= 4:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(sending())
    else:
        asyncio.run(reading(how.removeprefix("async ")))
    return read


@pytest.mark.parametrize("how", ["break", "close", "cancel", "async break", "async cancel", "async task", "async send"])
def test_an_answer_stops_within_a_token(engine, pace, how):
    chat = engine.chat(make=pace, sampling=LONG)
    chat._engine_steps = lambda: pace.steps
    pace.seconds = 0.02
    read = stop_by(how, chat)
    steps = pace.steps
    assert steps <= 8  # prompt in two steps; a piece is a token or more
    time.sleep(0.2)
    assert pace.steps == steps
    said = "".join(e.text for e in read if isinstance(e, Text))
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]
    assert chat.messages[1]["content"].startswith(said)
    if how.endswith("cancel"):
        assert read[-1].reason == chat.stats.finish_reason == "cancelled"
    pace.seconds = 0
    chat.call(lambda chat: setattr(chat, "sampling", GREEDY))
    assert chat.send("a") and len(chat.messages) == 4


def test_leaving_an_async_loop_is_enough(engine, pace):
    """Without aclosing: the event loop closes what the loop left behind."""
    chat = engine.chat(make=pace, sampling=LONG)
    pace.seconds = 0.02

    async def main():
        async for _ in chat.astream("hello"):
            break
        while len(chat.messages) < 2:
            await asyncio.sleep(0.01)
        steps = pace.steps
        await asyncio.sleep(0.2)
        assert pace.steps == steps <= 6

    asyncio.run(main())


def test_a_loop_that_is_gone(engine, pace):
    """A request whose event loop was closed under it ends, and the next is served."""
    chat = engine.chat(make=pace, sampling=LONG)
    pace.seconds = 0.01
    loop = asyncio.new_event_loop()
    events = chat.astream("hello")
    loop.run_until_complete(events.__anext__())
    loop.close()
    eventually(lambda: len(chat.messages) == 2)
    steps = pace.steps
    time.sleep(0.1)
    assert pace.steps == steps
    assert engine.generate("a", sampling=GREEDY)


# Waiting


def test_first_come_first_served(engine, pace):
    pace.gate.clear()
    order, threads = [], []
    first = engine.chat(make=pace, sampling=GREEDY)

    def ask(number, chat):
        chat.send("hello")
        order.append(number)

    for number, chat in enumerate([first, *(engine.chat(sampling=GREEDY) for _ in range(5))]):
        threads.append(threading.Thread(target=ask, args=(number, chat)))
        threads[-1].start()
        eventually(lambda: len(engine._worker._requests) > number)  # noqa: B023
        pace.arrived.wait(60)
    pace.gate.set()
    for thread in threads:
        thread.join(60)
    assert order == list(range(6))


@pytest.mark.parametrize("how", ["cancel", "timeout", "task", "async timeout", "engine"])
def test_who_waits_is_let_go_at_once(engine, pace, how):
    """While the engine is stuck in another one's step."""
    pace.gate.clear()
    stuck = engine.chat(make=pace, sampling=GREEDY)
    thread = threading.Thread(target=stuck.send, args=("hello",))
    thread.start()
    assert pace.arrived.wait(60)
    chat = engine.chat(sampling=GREEDY)

    async def cancelled_task():
        task = asyncio.create_task(chat.asend("a"))
        await asyncio.sleep(0.05)
        task.cancel()
        await task

    if how in ("cancel", "engine"):
        threading.Timer(0.1, chat.cancel if how == "cancel" else engine.cancel).start()
        assert gather(chat.stream("a")) == ("", "cancelled")
    elif how == "task":
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(cancelled_task())
    elif how == "timeout":
        with pytest.raises(TimeoutError, match=r"0\.05 seconds"):
            chat.send("a", timeout=0.05)
    else:
        with pytest.raises(RequestTimeoutError):
            asyncio.run(chat.asend("a", timeout=0.05))
    assert thread.is_alive() and chat.messages == [] and chat.stats is None
    pace.gate.set()
    thread.join(60)
    assert chat.send("a")


@pytest.mark.parametrize("style", ["sync", "async"])
def test_an_answer_that_takes_too_long(engine, pace, style):
    chat = engine.chat(make=pace, sampling=LONG)
    pace.seconds = 0.02
    with pytest.raises(RequestTimeoutError, match="allow more"):
        chat.send("a", timeout=0.3) if style == "sync" else asyncio.run(chat.asend("a", timeout=0.3))
    steps = pace.steps
    time.sleep(0.1)
    assert pace.steps == steps and len(chat.messages) in (0, 2)
    assert engine.chat(sampling=GREEDY).send("a", timeout=100)


def test_cancelling_nothing(engine):
    chat = engine.chat(sampling=GREEDY)
    chat.cancel()
    assert chat.send("a")
    chat.cancel()
    engine.cancel()
    events = chat.stream("b")
    chat.cancel()  # not asked yet
    assert gather(events)[1] == "length"
    chat.stream("never asked")
    assert chat.send("c") and len(chat.messages) == 6


def test_the_engine_does_not_wait_for_itself(engine):
    with pytest.raises(UsageError, match="wait for itself"):
        engine.call(lambda model, tokenizer: engine.generate("a"))
    assert engine.generate("a", sampling=GREEDY)


def test_close(folder, pace):
    engine = Engine(folder)
    chat = engine.chat(make=pace, sampling=LONG)
    pace.seconds, answers = 0.01, []
    threads = [threading.Thread(target=lambda: answers.append(gather(chat.stream("a")))) for _ in range(3)]
    for thread in threads:
        thread.start()
    eventually(lambda: pace.steps > 4)
    worker = engine._worker._thread
    engine.close()
    assert not worker.is_alive()
    for thread in threads:
        thread.join(60)
    assert [reason for _, reason in answers] == ["cancelled"] * 3
    assert sum(bool(text) for text, _ in answers) == 1 and len(chat.messages) == 2
    engine.close()
    for use in (engine.ready, lambda: chat.send("a"), lambda: engine.generate("a"), engine.unload):
        with pytest.raises(UsageError, match="closed"):
            use()
    with pytest.raises(UsageError, match="closed"):
        asyncio.run(engine.aready())
    engine.cancel()
    chat.cancel()


def test_calls_are_not_interrupted_but_given_up(engine, pace):
    pace.gate.clear()
    chat = engine.chat(make=pace, sampling=GREEDY)
    thread = threading.Thread(target=lambda: chat.send("a"))
    thread.start()
    assert pace.arrived.wait(60)
    caught = []

    def call():
        try:
            engine.call(lambda model, tokenizer: caught.append("ran"))
        except CancelledError as e:
            caught.append(e)

    waiting = threading.Thread(target=call)
    waiting.start()
    eventually(lambda: engine._worker._inbox.qsize() == 1)
    engine.cancel()
    waiting.join(60)
    assert len(caught) == 1 and isinstance(caught[0], CancelledError)
    pace.gate.set()
    thread.join(60)
