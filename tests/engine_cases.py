"""What tests of the engine share: a real graph that can be slowed, stopped and counted, and greedy truth.

Owns the stand-ins for `test_engine*.py`.
"""

import threading
import time
from pathlib import Path

from tiny import SPECIAL, make_tiny

from mlx_gemma4.chat import Chat
from mlx_gemma4.events import Done, Text
from mlx_gemma4.sampling import Sampling

_TEMPLATE = Path(__file__).parent / "fixtures" / "chat_template" / "chat_template.E2B-E4B.jinja"

# Text until the limit: a random model would stop, think or call something now and then.
_TEXT_ONLY = tuple(SPECIAL.values())
GREEDY = Sampling(temperature=0.0, max_tokens=12, suppress_tokens=_TEXT_ONLY)
LONG = Sampling(temperature=0.0, max_tokens=3000, suppress_tokens=_TEXT_ONLY)


class Paced:
    """A model that calls `before(n)` ahead of its n-th step; otherwise the one it is given."""

    def __init__(self, model, before):
        self._model, self._before = model, before
        self.steps = 0

    def __getattr__(self, name):
        return getattr(self._model, name)

    def __call__(self, *args, **kwargs):
        self.steps += 1
        self._before(self.steps)
        return self._model(*args, **kwargs)


class Pace:
    """`make` for `Engine.chat`: its chats run on a model that waits `seconds` before each step, and while the gate is
    closed."""

    def __init__(self, seconds=0.0):
        self.seconds = seconds
        self.gate = threading.Event()
        self.gate.set()
        self.arrived = threading.Event()  # somebody came to the gate
        self.error = None
        self.models = []

    def __call__(self, model, tokenizer, **options):
        self.models.append(Paced(model, self._before))
        return Chat(self.models[-1], tokenizer, loop_guard=False, **options)

    @property
    def steps(self):
        return sum(model.steps for model in self.models)

    def _before(self, step):
        self.arrived.set()
        assert self.gate.wait(60)
        if self.error is not None:
            raise self.error
        time.sleep(self.seconds)


def checkpoint(folder):
    """A tiny random e2b with the published template."""
    folder = make_tiny(folder, "e2b")
    (folder / "chat_template.jinja").write_text(_TEMPLATE.read_text(encoding="utf-8"))
    return folder


def gather(events):
    """(text, reason) of a turn."""
    events = list(events)
    assert isinstance(events[-1], Done)
    return "".join(e.text for e in events if isinstance(e, Text)), events[-1].reason


async def agather(events):
    return gather([event async for event in events])


def eventually(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)
