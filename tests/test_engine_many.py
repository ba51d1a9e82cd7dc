"""Engines among many: callers at once, two engines, an event loop that must go on, and programs that end in the middle.

`crowd` is also how the figures are made: `python tests/test_engine_many.py 500` prints answers, memory and how long the
event loop stood still, beside a process that does nothing: a virtual machine pauses, too.
"""

import asyncio
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import aclosing, closing
from pathlib import Path

import mlx.core as mx
import pytest
from engine_cases import GREEDY, Pace, checkpoint
from tiny import make_tiny

from mlx_gemma4 import Chat, load
from mlx_gemma4.engine import Engine
from mlx_gemma4.events import Done, Text

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
QUESTIONS = ["hello user", "the model", "a", "what is this", "one two three", "and then?", "why", "the end of it all"]
CALLERS = 10
SHARES = {"median": 0.5, "99 %": 0.99, "99.9 %": 0.999, "most": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("tiny"))


def truth_of(folder, sampling=GREEDY):
    model, tokenizer = load(folder)
    return {q: Chat(model, tokenizer, sampling=sampling).send(q) for q in QUESTIONS}


async def heartbeat(gaps, every=0.005):
    """When the event loop came back, and how much later than asked for, in seconds."""
    while True:
        begin = time.perf_counter()
        await asyncio.sleep(every)
        now = time.perf_counter()
        gaps.append((now, now - begin - every))


# A process that does nothing else, to tell what the machine is late by anyway.
IDLE = "import asyncio, test_engine_many as t\nclass Out:\n def append(s, gap): print(*gap, flush=True)\n"
IDLE += "asyncio.run(t.heartbeat(Out()))"


def beyond(gaps, idle):
    """Each gap less the longest of the idle process that ended while it lasted, or up to 2 ms later; both in order."""
    out, at = [], 0
    for now, late in gaps:
        while at < len(idle) and idle[at][0] < now - late:
            at += 1
        same = [i for t, i in idle[at : at + 100] if t < now + 0.002]
        out.append(max(0.0, late - max(same, default=0.0)))
    return out


def test_beyond_what_the_machine_is_late_by():
    idle = [(1.0, 0.001), (2.0, 0.05), (2.5, 0.001)]
    assert beyond([(1.001, 0.03), (2.001, 0.06), (2.499, 0.02), (3, 0.02)], idle) == pytest.approx(
        [0.029, 0.01, 0.019, 0.02]
    )


def crowd(engine, truth, requests, cancelled=0.2, sampling=GREEDY, seed=0):
    """Half of `requests` from ten threads, half from one event loop: (finished, cancelled, wrong, gaps of the loop).

    A share of them is given up at a random moment, on one of four ways. What was said until then must be how the whole
    answer begins.
    """
    finished, given_up, wrong, gaps = [], [], [], []

    def judge(question, said, whole):
        (finished if whole else given_up).append(question)
        if said != truth[question] if whole else not truth[question].startswith(said):
            wrong.append((question, said))

    def in_thread(number):
        rng = random.Random(seed + number)
        chat = engine.chat(sampling=sampling)
        for i in range(requests // 2 // CALLERS):
            question, said, whole = rng.choice(QUESTIONS), "", False
            single = rng.random() < 0.3
            give_up = rng.random() < cancelled
            after = rng.randrange(6) if give_up else None
            if not single:
                chat.clear()
            timer = threading.Timer(rng.random() * 0.2, chat.cancel) if give_up and not single and i % 2 else None
            if timer is not None:
                after = None
                timer.start()
            stream = engine.stream(question, sampling=sampling) if single else chat.stream(question)
            with closing(stream) as events:
                for count, event in enumerate(events):
                    if isinstance(event, Text):
                        said += event.text
                    whole = isinstance(event, Done) and event.reason != "cancelled"
                    if count == after:
                        break
            if timer is not None:
                timer.cancel()
                timer.join()
            judge(question, said, whole)

    async def one(number):
        rng = random.Random(1000 + seed + number)
        question, said, whole = rng.choice(QUESTIONS), "", False

        async def read(after=None):
            nonlocal said, whole
            async with aclosing(engine.astream(question, sampling=sampling)) as events:
                count = 0
                async for event in events:
                    if isinstance(event, Text):
                        said += event.text
                    whole = isinstance(event, Done) and event.reason != "cancelled"
                    if count == after:
                        break
                    count += 1

        if rng.random() >= cancelled:
            await read()
        elif number % 2:
            await read(after=rng.randrange(6))
        else:
            task = asyncio.create_task(read())
            await asyncio.sleep(rng.random())
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled() or task.exception() is None
        judge(question, said, whole)

    async def loop():
        beat = asyncio.create_task(heartbeat(gaps))
        ends = asyncio.Semaphore(CALLERS)

        async def bounded(number):
            async with ends:
                await one(number)

        await asyncio.gather(*(bounded(n) for n in range(requests // 2)))
        beat.cancel()

    threads = [threading.Thread(target=in_thread, args=(n,)) for n in range(CALLERS)]
    for thread in threads:
        thread.start()
    asyncio.run(loop())
    for thread in threads:
        thread.join()
    return finished, given_up, wrong, gaps


def test_many_callers(folder):
    truth = truth_of(folder)
    with Engine(folder) as engine:
        engine.ready()
        engine.generate("a", sampling=GREEDY)
        threads, memory = threading.active_count(), mx.get_active_memory()
        finished, given_up, wrong, _ = crowd(engine, truth, 60)
        assert wrong == [] and len(finished) + len(given_up) == 60 and len(finished) >= 36
        engine.call(lambda model, tokenizer: None)  # what was let go has been put away
        assert threading.active_count() == threads and engine._worker._inbox.empty()
        assert mx.get_active_memory() - memory < 100_000
    assert len(engine._worker._requests) == 0


def test_two_engines(folder, tmp_path):
    """At once, with other weights each."""
    other = tmp_path / "other"
    make_tiny(other, "26b-a4b", seed=1)
    truths = [truth_of(folder), truth_of(other)]
    assert truths[0] != truths[1]
    results = [None, None]
    with Engine(folder) as first, Engine(other) as second:

        def run(i, engine):
            results[i] = crowd(engine, truths[i], 20, cancelled=0.2, seed=i)

        threads = [threading.Thread(target=run, args=pair) for pair in enumerate((first, second))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        first.unload()
        assert second.generate("a", sampling=GREEDY) == truths[1]["a"]
    for finished, given_up, wrong, _ in results:
        assert wrong == [] and len(finished) + len(given_up) == 20


def test_the_event_loop_goes_on(folder):
    """While the engine is stuck in a step, in loading, in unloading; while requests wait, are given up and it closes.

    The machine may be busy, so this looks for what waits for the engine (1 s each), not for milliseconds.
    """
    gaps, pace = [], Pace()

    async def main():
        beat = asyncio.create_task(heartbeat(gaps))
        engine = Engine(folder, progress=lambda stage, done, total: done or time.sleep(1))
        await engine.aready()
        chat = engine.chat(make=pace, sampling=GREEDY, prefill_step_size=4)
        pace.seconds = 1
        running = asyncio.create_task(chat.asend("hello user", progress=lambda done, total: None))
        waiting = [asyncio.create_task(engine.agenerate("a", sampling=GREEDY)) for _ in range(3)]
        await asyncio.sleep(0.5)
        waiting[0].cancel()
        running.cancel()
        await asyncio.wait([running, *waiting])
        async for _ in chat.astream("hello"):
            break
        engine.cancel()
        pace.models.clear()
        await engine.aunload()
        last = asyncio.create_task(chat.asend("hello"))
        await asyncio.sleep(0.5)
        pace.models.clear()
        await engine.aclose()
        await last
        beat.cancel()

    asyncio.run(main())
    assert len(gaps) > 100 and max(late for _, late in gaps) < 0.8


# The end of the program

START = """
import asyncio, sys, threading, time
from mlx_gemma4.engine import Engine
from engine_cases import LONG, GREEDY
engine = Engine(sys.argv[1])
chat = engine.chat(sampling=LONG)
def read(count):
    for n, event in enumerate(chat.stream("hello")):
        if n == count:
            return event
"""
ENDINGS = {
    "idle": "engine.ready(); print('there')",
    "loading": "print('there')",
    "exit in an answer": "events = chat.stream('hello'); next(events); print('there'); sys.exit(3)",
    "error in an answer": "for event in chat.stream('hello'): print('there'); raise SystemExit(3)",
    "answer on a daemon thread": """
threading.Thread(target=read, args=(None,), daemon=True).start()
while len(chat.messages) < 1: time.sleep(0.01)
print('there'); sys.exit(3)""",
    "answer on a thread that is waited for": """
threading.Thread(target=lambda: (read(5), print('there'))).start(); sys.exit(3)""",
    "async": """
async def main():
    async for event in chat.astream('hello'):
        print('there'); sys.exit(3)
asyncio.run(main())""",
    "async and left": """
async def main():
    global task
    task = asyncio.create_task(chat.asend('hello'))
    while not chat.messages: await asyncio.sleep(0.01)
    print('there')
asyncio.run(main()); sys.exit(3)""",
    "interrupt": """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
try: chat.send('hello')
except KeyboardInterrupt: print('there', len(chat.messages) in (0, 2)); sys.exit(3)""",
}


def start(folder, ending):
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", START + ending, str(folder)],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def check_end(process, code):
    out, err = process.communicate(timeout=120)
    assert (out.split(), process.returncode) == (["there", "True"][: len(out.split())], code), err
    assert out and err == ""


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_program_ends(folder, ending):
    """Without a hang, an abort or a word on stderr, though nobody closed anything."""
    check_end(start(folder, ENDINGS[ending]), 3 if "exit" in ENDINGS[ending].lower() else 0)


def test_exit_in_an_answer_ten_times(folder):
    for _ in range(2):
        for process in [start(folder, ENDINGS["exit in an answer"]) for _ in range(5)]:
            check_end(process, 3)


def _figures(requests):
    """Prints what a crowd of so many requests comes to."""
    folder = checkpoint(Path(tempfile.mkdtemp()) / "tiny")
    truth = truth_of(folder)
    with Engine(folder) as engine:
        engine.ready()

        def memory():
            engine.call(lambda model, tokenizer: None)
            rss = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
            return f"active {mx.get_active_memory():,} cached {mx.get_cache_memory():,} RSS {rss:,} bytes"

        crowd(engine, truth, 40, seed=99)
        print(f"before: {memory()}, {threading.active_count()} threads")
        gaps, started, done = [], time.perf_counter(), [0, 0]
        with tempfile.TemporaryFile("w+") as out:
            with subprocess.Popen([sys.executable, "-c", IDLE], stdout=out, cwd=Path(__file__).parent) as idle:
                for part in range(max(1, requests // 100)):
                    finished, given_up, wrong, some = crowd(engine, truth, min(100, requests), seed=100 * part)
                    assert not wrong, wrong
                    done = [done[0] + len(finished), done[1] + len(given_up)]
                    gaps += some
                    print(f"after {sum(done)}: {memory()}, {threading.active_count()} threads")
                idle.kill()
            out.seek(0)
            control = [tuple(map(float, line.split())) for line in out.readlines()[:-1]]  # the last may be cut
        print(f"{done[0]} finished, all as alone; {done[1]} given up; {time.perf_counter() - started:.1f} s")
        for what, late in (
            ("event loop", [late for _, late in gaps]),
            ("an idle process beside it", [late for when, late in control if when > started]),
            ("event loop beyond the idle process", beyond(gaps, control)),
        ):
            late.sort()
            at = [f"{name} {late[int((len(late) - 1) * share)] * 1e3:.2f}" for name, share in SHARES.items()]
            print(f"{what} late, ms: {', '.join(at)} of {len(late)}")


if __name__ == "__main__":
    _figures(int(sys.argv[1]))
