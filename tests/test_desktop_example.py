"""The example window under a virtual display: it streams, stops in mid-answer and closes in mid-answer.

Needs tkinter and Xvfb; SCREENSHOTS=folder keeps pictures of it (with ImageMagick's `import`).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tkinter", reason="this Python was built without Tk: install python3-tk")
pytestmark = pytest.mark.skipif(
    shutil.which("Xvfb") is None, reason="no Xvfb, a display without a screen: install xvfb"
)

ROOT = Path(__file__).parents[1]
DRIVE = """
import os, subprocess, time, tkinter as tk
from engine_cases import LONG, Pace
from desktop_chat import ChatWindow

root = tk.Tk()
window = ChatWindow(root, "demo")
pace = Pace(0.05)

def wait(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, window.text.get("1.0", "end")
        root.update()
        time.sleep(0.01)

def shown():
    return window.text.get("1.0", "end")

def picture(name):
    if folder := os.environ.get("SCREENSHOTS"):
        root.update()
        subprocess.run(["import", "-window", "root", f"{folder}/{name}.png"], check=True)

def ask(question):
    window.entry.insert(0, question)
    window.send_button.invoke()
    assert str(window.stop_button["state"]) == "normal" and str(window.send_button["state"]) == "disabled"

wait(lambda: "context" in window.status.get())
ask("What is 2+2?")
wait(lambda: not window.answering)
assert "4" in shown() and "tokens/s" in window.status.get(), shown()
picture("answered")

# Without an end, so that stopping is not a race.
window.chat = window.engine.chat(make=pace, sampling=LONG)
ask("Go on.")
wait(lambda: pace.steps > 25)
picture("answering")
window.stop_button.invoke()
wait(lambda: not window.answering)
assert shown().rstrip().endswith("(stopped)") and len(window.chat.messages) == 2
assert str(window.stop_button["state"]) == "disabled"
picture("stopped")

steps = pace.steps
ask("And more.")
wait(lambda: pace.steps > steps + 5)
thread = window.engine._worker._thread
window.close()
assert not thread.is_alive() and len(window.chat.messages) == 4
print("closed")
"""


@pytest.fixture
def display():
    """A free display of its own: the server picks the number and writes it into the pipe."""
    read, write = os.pipe()
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", str(write), "-screen", "0", "900x640x24"], pass_fds=[write], stderr=subprocess.DEVNULL
    )
    os.close(write)
    with os.fdopen(read) as pipe:
        number = pipe.readline().strip()
    assert number, "Xvfb did not start"
    yield f":{number}"
    server.terminate()
    server.wait(30)


def environment(display):
    path = os.pathsep.join(str(p) for p in (ROOT, ROOT / "examples", ROOT / "tests"))
    return {**os.environ, "DISPLAY": display, "PYTHONPATH": path}


def test_the_window(display):
    done = subprocess.run(
        [sys.executable, "-c", DRIVE], env=environment(display), capture_output=True, text=True, timeout=200
    )
    assert (done.stdout, done.returncode) == ("closed\n", 0), done.stderr


def test_it_shows_what_went_wrong(display):
    script = """
import time, tkinter as tk
from desktop_chat import ChatWindow
root = tk.Tk()
window = ChatWindow(root, "/nowhere/model")
end = time.monotonic() + 60
while "there is no folder" not in window.text.get("1.0", "end"):
    assert time.monotonic() < end
    root.update()
window.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(display), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr


def test_it_starts_as_a_program():
    """As far as that needs no display."""
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "desktop_chat.py", "--help"],
        env=environment(""),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0 and "--model" in done.stdout, done.stderr
