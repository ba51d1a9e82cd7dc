"""A question that one key answers.

Owns reading that key. Leaves the terminal's setting to `keys.py`, and what the answers mean to whoever asks.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Mapping

from . import keys
from .status import WIPE
from .stream import BOLD, RESET, wants_style

_STEP = 0.1  # seconds between two looks at whether the question still stands
_ESCAPE, _END = "\x1b", "\x04"  # also Ctrl-D


def can_ask() -> bool:
    """Whether somebody sees the question and can answer it."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))


def ask(question: str, answers: Mapping[str, str], going: Callable[[], bool] = lambda: True) -> str | None:
    """The key pressed, one of `answers` (keys to the words they stand for); None for Esc, Ctrl-D, or once `going` is
    False.

    What was typed before the question came is dropped: it cannot have been meant as its answer. Enter is none.
    """
    choices = " / ".join(f"({key}) {word}" for key, word in answers.items())
    styled = wants_style(sys.stderr)
    with keys.unseen(drop=True):
        sys.stderr.write(f"{BOLD}{question}{RESET} {choices} " if styled else f"{question} {choices} ")
        sys.stderr.flush()
        key = _key(sys.stdin.fileno(), answers, going)
    word = answers[key] if key else "-"
    sys.stderr.write(f"{WIPE}{BOLD}{question}{RESET} {word}\n" if styled else f"{word}\n")
    sys.stderr.flush()
    return key


def _key(terminal: int, answers: Mapping[str, str], going: Callable[[], bool]) -> str | None:
    while going():
        if not select.select([terminal], [], [], _STEP)[0]:
            continue
        pressed = os.read(terminal, 64).decode("utf-8", "replace")
        if not pressed or pressed in (_ESCAPE, _END):
            return None
        # One key: neither an arrow, which ends in a letter, nor something pasted.
        if (key := pressed.strip().lower()) in answers:
            return key
    return None
