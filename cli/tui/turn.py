"""One turn on the screen: the chat's events into a view, with Ctrl-C and the keyboard looked after.

Owns what a terminal does while an answer runs. Leaves the answer to `mlx_gemma4.chat.Chat`, calls of tools to
`mlx_gemma4.tools` and `toolbox.py`, the keyboard's setting to `keys.py`, and the looks of an answer to `stream.py`.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from . import keys, status
from .status import PrefillMeter
from .stream import AnswerView
from .toolbox import Toolbox, ToolMeter, malformed, shown_call, shown_result

if TYPE_CHECKING:
    from mlx_gemma4.chat import Chat
    from mlx_gemma4.events import Done, Malformed, ToolCall
    from mlx_gemma4.tools import Tool


def show_turn(
    chat: Chat,
    message: str | list[dict[str, Any]],
    view: AnswerView,
    *,
    patient: bool,
    toolbox: Toolbox | None = None,
    on_call: Callable[[ToolCall | Malformed], None] | None = None,
    response_format: Any = None,
) -> Done:
    """Answers `message`, text or parts, into `view` and returns the closing event.

    toolbox: calls are run, shown and asked for; None: they are only told, to `on_call` or on stderr.

    Ctrl-C stops the answer before its next token or prefill chunk, or the tool that runs. A second one is ignored if
    `patient` (a conversation is worth more than the wait) and otherwise ends the program with KeyboardInterrupt.
    """
    from mlx_gemma4.events import Done, Malformed, Text, Thought, ToolCall

    options = {} if response_format is None else {"response_format": response_format}
    meter = PrefillMeter()
    running = ToolMeter()
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        chat.cancel()

    def going() -> bool:
        running.tick()
        return not stopped.is_set()

    seen: list[ToolCall] = []

    def confirm(call: ToolCall, tool: Tool) -> bool:
        assert toolbox is not None
        seen.append(call)
        meter.clear()
        view.finish()
        allowed = toolbox.confirm(call, tool)
        if allowed:
            running.start(call.name)
        return allowed

    if toolbox is None:
        events: Generator[Any, None, None] = chat.stream(message, progress=meter, **options)
    else:
        from mlx_gemma4.tools import run_turn

        toolbox.going = going
        events = run_turn(chat, message, toolbox.tools, confirm=confirm, going=going, progress=meter, **options)
    done = None
    with _stop_on_ctrl_c(stop, patient), keys.unseen(), closing(events):
        try:
            for event in events:
                meter.clear()
                running.clear()
                if isinstance(event, Thought):
                    view.thought(event.text)
                elif isinstance(event, Text):
                    view.text(event.text)
                elif isinstance(event, Done):
                    done = event
                elif on_call is not None and isinstance(event, ToolCall | Malformed):
                    on_call(event)
                else:
                    view.finish()
                    for line in _lines(event, seen, called=toolbox is not None):
                        status.dim(line)
        finally:
            meter.clear()
            running.clear()
            view.finish()
    if done is None:
        raise RuntimeError("the answer ended without its closing event")
    return done


def _lines(event: Any, seen: list[ToolCall], called: bool) -> list[str]:
    """What to say about an event that is no text. seen: the calls shown when they were to be run; called: they are."""
    from mlx_gemma4.events import Malformed, Shortened, ToolCall
    from mlx_gemma4.tools import ToolResult

    if isinstance(event, ToolResult) and not isinstance(event.call, Malformed):
        return [*([] if event.call in seen else [shown_call(event.call)]), shown_result(event)]
    if isinstance(event, ToolCall) and not called:
        return [f"the model calls {shown_call(event)}"]
    if isinstance(event, Malformed):
        return [malformed(event)]
    return [status.shortened_line(event)] if isinstance(event, Shortened) else []


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
        with keys.unseen():
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
