"""The keyboard while something else has the screen.

Owns the terminal's setting meanwhile. Leaves what is pressed to whoever reads it.
"""

from __future__ import annotations

import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unseen(drop: bool = False) -> Iterator[None]:
    """Keys are not echoed, and are read one by one, Enter as it comes. drop: those pressed before are gone."""
    try:
        terminal = sys.stdin.fileno()
        before = termios.tcgetattr(terminal)
    except (OSError, ValueError, AttributeError, termios.error):
        yield  # no terminal on stdin
        return
    silent = termios.tcgetattr(terminal)
    silent[0] &= ~termios.ICRNL
    silent[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(terminal, termios.TCSAFLUSH if drop else termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)
