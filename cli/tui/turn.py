"""One turn on the screen: the chat's events into a view, with Ctrl-C and the keyboard looked after.

Owns what a terminal does while an answer runs. Leaves the answer to `mlx_gemma4.chat.Chat` and its looks to
`stream.py`.
"""

from __future__ import annotations

import signal
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .status import PrefillMeter
from .stream import AnswerView

if TYPE_CHECKING:
    from mlx_gemma4.chat import Chat, Done


def show_turn(chat: Chat, message: str | list[dict[str, Any]], view: AnswerView, *, patient: bool) -> Done:
    """Answers `message`, text or parts, into `view` and returns the closing event.

    Ctrl-C stops the answer before its next token or prefill chunk. A second one is ignored if `patient` (a
    conversation is worth more than the wait) and otherwise ends the program with KeyboardInterrupt.
    """
    from mlx_gemma4.chat import Done, Text, Thought

    meter = PrefillMeter()
    with _stop_on_ctrl_c(chat.cancel, patient), _keys_unseen():
        try:
            for event in chat.stream(message, progress=meter):
                meter.clear()
                if isinstance(event, Thought):
                    view.thought(event.text)
                elif isinstance(event, Text):
                    view.text(event.text)
                elif isinstance(event, Done):
                    return event
        finally:
            meter.clear()
            view.finish()
    raise RuntimeError("the answer ended without its closing event")


@contextmanager
def _stop_on_ctrl_c(cancel: Callable[[], None], patient: bool) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread only
        return
    pressed = False

    def on_interrupt(number: int, frame: object) -> None:
        nonlocal pressed
        if pressed and not patient:
            raise KeyboardInterrupt
        pressed = True
        cancel()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def between_prompts() -> Iterator[None]:
    """For a whole dialogue: Ctrl-C is nobody's unless an answer or the prompt line takes it.

    Without this a second Ctrl-C, pressed just as the answer stops, would end the program and the conversation.
    """
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        with _keys_unseen():
            yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def interruptible() -> Iterator[None]:
    """For work between two prompts that may last, such as reading a long clip: Ctrl-C raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _keys_unseen() -> Iterator[None]:
    """Keys pressed meanwhile are not echoed into the answer and reach the next prompt line one by one."""
    try:
        terminal = sys.stdin.fileno()
        before = termios.tcgetattr(terminal)
    except (OSError, ValueError, AttributeError, termios.error):
        yield  # no terminal on stdin
        return
    silent = termios.tcgetattr(terminal)
    silent[0] &= ~termios.ICRNL
    silent[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(terminal, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)
