"""An engine whose model still lies on a Hub: progress, an event loop that goes on, a stop, a lost connection.

Each case is a process of its own, as in `test_hub.py`, and downloads over HTTP with the real client.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_cases import GREEDY, checkpoint
from hub_server import Hub, environment

from mlx_gemma4 import Chat, load

ROOT = Path(__file__).parent.parent
REPO = "someone/tiny-gemma"
BEGIN = """
import asyncio, json, sys, time
from mlx_gemma4.engine import Engine
from mlx_gemma4.errors import Gemma4Error
from engine_cases import GREEDY

seen = []
def note(stage, done, total):
    seen.append((stage, done, total))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("hub") / "tiny")


@pytest.fixture
def hub(folder):
    with Hub() as server:
        server.repo(REPO, {p.name: p.read_bytes() for p in folder.iterdir()})
        yield server


@pytest.fixture
def run(hub, tmp_path):
    """run(code, between) -> what a process that knows this Hub wrote last, read as JSON.

    between: called once the process has written its first line; then it is sent one, too.
    """

    def python(code: str, between: Callable[[], None] | None = None):
        env = environment(tmp_path, hub.url, PYTHONPATH=os.pathsep.join((str(ROOT), str(ROOT / "tests"))))
        with subprocess.Popen(
            [sys.executable, "-c", BEGIN + code],
            env=env, cwd=tmp_path, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            if between is not None:
                process.stdout.readline()
                between()
            out, complaints = process.communicate("\n", timeout=120)
        assert process.returncode == 0 and "Traceback" not in complaints, complaints
        return json.loads(out.splitlines()[-1])

    return python


@pytest.fixture(scope="module")
def truth(folder):
    return Chat(*load(folder), sampling=GREEDY).send("hello user")


def test_downloads_tells_and_answers(hub, run, folder, truth):
    """Stages in order, each up to its whole; the answer is that of the folder; the second engine fetches nothing."""
    code = f"""
with Engine({REPO!r}, progress=note) as engine:
    said = engine.generate("hello user", sampling=GREEDY)
with Engine({REPO!r}) as engine:
    again = engine.generate("hello user", sampling=GREEDY)
print(json.dumps([said, again, seen]))
"""
    said, again, seen = run(code)
    assert said == again == truth
    stages = [stage for stage, *_ in seen]
    first = stages.index("weights")
    assert set(stages[:first]) == {"download"} and set(stages[first:]) == {"weights"}
    for part in (seen[:first], seen[first:]):
        done = [d for _, d, _ in part]
        assert done == sorted(done) and len({t for *_, t in part}) == 1 and done[-1] == part[0][2]
    assert seen[0][2] >= (folder / "model.safetensors").stat().st_size
    assert len(hub.fetched("model.safetensors")) == 1


def test_the_event_loop_goes_on_while_it_downloads(hub, run, truth):
    """A slow Hub: the loop beats all the time, and the request that waits for the model is answered."""
    hub.chunk_delay = 0.02
    code = f"""
async def main():
    beats = 0
    async def beat():
        nonlocal beats
        while True:
            await asyncio.sleep(0.01)
            beats += engine.model_info is None
    async with Engine({REPO!r}, progress=note) as engine:
        beating = asyncio.create_task(beat())
        said = await engine.agenerate("hello user", sampling=GREEDY)
        beating.cancel()
    return said, beats
print(json.dumps(asyncio.run(main())))
"""
    said, beats = run(code)
    assert said == truth and beats >= 10


def test_stopped_by_its_callback_and_tried_again(hub, run, truth):
    """False from the callback: one line; after `unload` the next request downloads."""
    code = f"""
stops = [True]
def stop(stage, done, total):
    note(stage, done, total)
    return not (stops and done > total // 3)
engine = Engine({REPO!r}, progress=stop)
try:
    engine.ready()
    error = None
except Gemma4Error as e:
    error = str(e)
stage = seen[-1][0]
stops.clear()
engine.unload()
said = engine.generate("hello user", sampling=GREEDY)
engine.close()
print(json.dumps([error, stage, said]))
"""
    error, stage, said = run(code)
    assert stage == "download" and error and "stopped by its progress callback" in error and "\n" not in error
    assert said == truth


def test_a_lost_connection_is_one_line_and_the_next_try_goes_on(hub, run, truth):
    code = f"""
time.sleep = lambda s: None  # between the client's retries
engine = Engine({REPO!r})
errors = []
for _ in range(2):  # an error of loading stays until `unload`
    try:
        engine.generate("hello user", sampling=GREEDY)
    except Gemma4Error as e:
        errors.append(str(e))
print("lost", flush=True)
sys.stdin.readline()
engine.unload()
said = engine.generate("hello user", sampling=GREEDY)
engine.close()
print(json.dumps([errors, said]))
"""

    def back():
        hub.refusing = hub.refuse_after_cut = False

    hub.cut_after, hub.refuse_after_cut = 100_000, True
    errors, said = run(code, back)
    assert len(errors) == 2 and errors[0] == errors[1]
    assert "connection was lost" in errors[0] and "\n" not in errors[0]
    assert said == truth
