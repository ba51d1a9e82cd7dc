"""A conversation on an engine, from any thread or event loop.

Owns the handle and the four ways to read a request: events or one result, for callers that may wait and for those on an
event loop. Leaves the conversation itself to `engine_model.py`, the engine to `engine.py`.
"""

import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import aclosing, closing, suppress
from typing import Any

from .chat import Chat
from .engine_model import Conversation, Keeper, never_begun
from .engine_request import AsyncResults, CancelledError, Progress, Request, results
from .engine_worker import Worker
from .errors import UsageError
from .events import ChatEvent, Malformed, Stats, Text, ToolCall


class EngineChat:
    """A conversation on an engine, from `Engine.chat`: what `Chat` does, from any thread or event loop.

    Several messages sent at once are answered one after the other. `cancel` may also come from a signal handler.
    """

    def __init__(self, engine: Any, worker: Worker, keeper: Keeper, conversation: Conversation):
        self._engine = engine  # which must not end before
        self._worker, self._keeper, self._conversation = worker, keeper, conversation
        self._requests: weakref.WeakSet[Request] = weakref.WeakSet()
        weakref.finalize(self, _let_go, worker, conversation).atexit = False

    def stream(
        self, message: Any, *, progress: Progress | None = None, timeout: float | None = None, **options: Any
    ) -> Generator[ChatEvent, None, None]:
        """Answers `message`, one event at a time, as `Chat.stream`, whose options these are. It waits for its turn from
        the first `next` on.

        progress(done, total) is called here, on the thread that iterates, in prompt tokens; False cancels.

        The model does not wait for a slow reader: leaving the loop early, the history may hold a few words more than
        were read.
        """
        return events(self, results(self._worker, self._turn("stream", message, options), progress, timeout))

    def astream(
        self, message: Any, *, progress: Progress | None = None, timeout: float | None = None, **options: Any
    ) -> AsyncResults[ChatEvent]:
        return AsyncResults(self._worker, self._turn("stream", message, options), progress, timeout, never_begun, self)

    def stream_results(
        self,
        returned: Sequence[tuple[ToolCall | Malformed, Any]],
        *,
        progress: Progress | None = None,
        timeout: float | None = None,
        **options: Any,
    ) -> Generator[ChatEvent, None, None]:
        """Goes on after tool calls, given what each returned, as `Chat.stream_results`. Run the tools where you like:
        meanwhile the engine serves others."""
        return events(self, results(self._worker, self._turn("stream_results", returned, options), progress, timeout))

    def astream_results(
        self,
        returned: Sequence[tuple[ToolCall | Malformed, Any]],
        *,
        progress: Progress | None = None,
        timeout: float | None = None,
        **options: Any,
    ) -> AsyncResults[ChatEvent]:
        return AsyncResults(
            self._worker, self._turn("stream_results", returned, options), progress, timeout, never_begun, self
        )

    def send(self, message: Any, **options: Any) -> str:
        """The whole answer without thoughts; what there was of it if it was cancelled, see `stats`."""
        return text(self.stream(message, **options))

    async def asend(self, message: Any, **options: Any) -> str:
        return await atext(self.astream(message, **options))

    def cancel(self) -> None:
        """Ends what this conversation is answering or waiting to answer."""
        for request in list(self._requests):
            request.cancel()

    @property
    def messages(self) -> list[dict[str, Any]]:
        """A copy of the history as it stands, without the system prompt."""
        return [dict(message) for message in list(self._conversation.current("messages"))]

    @property
    def stats(self) -> Stats | None:
        """Of the last turn."""
        return self._conversation.current("stats")

    def clear(self) -> None:
        """Forgets messages and cache, after what was sent before is answered."""
        self.call(Chat.clear)

    async def aclear(self) -> None:
        await self.acall(Chat.clear)

    def call(self, function: Callable[[Chat], Any], *, timeout: float | None = None) -> Any:
        """What function(chat) returns, run on the engine's thread between turns: for what only `Chat` can do.

        >>> chat.call(lambda chat: chat.set_system("Be brief."))
        """
        return result(results(self._worker, self._calling(function), timeout=timeout))

    async def acall(self, function: Callable[[Chat], Any], *, timeout: float | None = None) -> Any:
        return await aresult(AsyncResults(self._worker, self._calling(function), timeout=timeout))

    def fork(self) -> "EngineChat":
        """A conversation that goes on from here on its own; nothing is computed again."""
        return self._with(result(results(self._worker, self._forking())))

    async def afork(self) -> "EngineChat":
        return self._with(await aresult(AsyncResults(self._worker, self._forking())))

    def _with(self, conversation: Conversation) -> "EngineChat":
        return EngineChat(self._engine, self._worker, self._keeper, conversation)

    def _turn(self, method: str, message: Any, options: dict[str, Any]) -> Request:
        keeper, conversation = self._keeper, self._conversation
        request = Request(lambda request: conversation.turn(keeper, request, method, message, options))
        self._requests.add(request)
        return request

    def _forking(self) -> Request:
        keeper, conversation = self._keeper, self._conversation
        return Request(lambda request: iter([conversation.fork(keeper)]))

    def _calling(self, function: Callable[[Chat], Any]) -> Request:
        keeper, conversation = self._keeper, self._conversation
        return Request(lambda request: iter([function(conversation.chat(keeper))]))


def _let_go(worker: Worker, conversation: Conversation) -> None:
    """A conversation that nobody holds any more frees its cache, on the thread whose arrays these are."""
    with suppress(UsageError):  # the engine is closed, and has let go of it
        worker.submit(Request(lambda request: iter([conversation.put_away()]), needs_model=False))


def events(owner: Any, items: Generator[Any, None, None]) -> Generator[ChatEvent, None, None]:
    """The events of a turn, which ends with `Done` also where it was cancelled before it began. owner: must live on
    meanwhile."""
    try:
        with closing(items):
            yield from items
    except CancelledError:
        yield never_begun()


def text(turn: Generator[ChatEvent, None, None]) -> str:
    """The answer, without thoughts."""
    with closing(turn):
        return "".join(event.text for event in turn if isinstance(event, Text))


async def atext(turn: AsyncResults[ChatEvent]) -> str:
    async with aclosing(turn):
        return "".join([event.text async for event in turn if isinstance(event, Text)])


def result(items: Generator[Any, None, None]) -> Any:
    """The one thing a request yields."""
    [item] = items
    return item


async def aresult(items: AsyncResults) -> Any:
    async with aclosing(items):
        [item] = [item async for item in items]
        return item
