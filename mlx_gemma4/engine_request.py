"""One request to an engine: given to the worker by a caller who waits, or whose event loop goes on meanwhile.

Owns how results, progress, errors and cancelling travel between the two threads. Leaves the queue to
`engine_worker.py`.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .errors import Gemma4Error, UsageError

if TYPE_CHECKING:
    from .engine_worker import Worker

# What travels to the caller, each with a value. The last three end a request.
ITEM, PROGRESS, END, ERROR, CANCELLED = "item", "progress", "end", "error", "cancelled"
LAST = (END, ERROR, CANCELLED)

Entry = tuple[str, Any]
T = TypeVar("T")
# Called with (done, total) on the caller's thread; False cancels.
Progress = Callable[[int, int], Any]


class CancelledError(Gemma4Error):
    """A request was given up before it had a result."""


class RequestTimeoutError(Gemma4Error, TimeoutError):
    """The `timeout` of a request passed."""


class Request:
    """Work for the worker: `work(request)` is called on its thread and yields what goes back to the caller.

    needs_model: whether `prepare` of the worker comes first.
    """

    def __init__(self, work: Callable[["Request"], Iterator[Any]], needs_model: bool = True):
        self.needs_model = needs_model
        self.cancelled = self.submitted = False
        self.put: Callable[[Entry], Any] = lambda entry: None
        self._work: Callable[[Request], Iterator[Any]] | None = work
        self._started = False
        self._stop: Callable[[], None] | None = None
        # Reentrant: a signal handler may cancel what the thread it interrupts is just cancelling.
        self._lock = threading.RLock()

    def cancel(self) -> None:
        """Ends it: at once while it waits, else as soon as what it does can stop; without effect before and after.

        From any thread or a signal handler.
        """
        with self._lock:
            if not self.submitted or self.cancelled or self._work is None:
                return
            self.cancelled = True
            if not self._started:
                self._work = None
                self._tell((CANCELLED, None))
            elif self._stop is not None:
                self._stop()

    def on_cancel(self, stop: Callable[[], None]) -> None:
        """`cancel` will call `stop`; never after the work has ended, when the same thing may be at other work."""
        with self._lock:
            self._stop = stop
            if self.cancelled:
                stop()

    def report(self, done: int, total: int) -> bool:
        """Tells the caller how far it is; False when the request was cancelled."""
        self._tell((PROGRESS, (done, total)))
        return not self.cancelled

    def run(self) -> None:
        """On the worker's thread."""
        with self._lock:
            if self._work is None:
                return
            self._started = True
            work = self._work
        last: Entry = (END, None)
        try:
            for item in work(self):
                self._tell((ITEM, item))
                del item  # it would stay until the next one comes
        except CancelledError:
            last = (CANCELLED, None)
        except BaseException as e:  # whatever it is, it is the caller's
            last = (ERROR, e)
        with self._lock:
            self._work = self._stop = None
        self._tell(last)
        del last  # a cycle: an error knows this frame

    def _tell(self, entry: Entry) -> None:
        try:
            self.put(entry)
        except RuntimeError:  # the caller's event loop is closed: nobody is there to listen
            self.cancel()


def results(
    worker: "Worker", request: Request, progress: Progress | None = None, timeout: float | None = None
) -> Generator[Any, None, None]:
    """What the request yields, for a caller that may wait. timeout: seconds from now on.

    Closing the iterator cancels, and returns when the worker has let go of the request.

    Raises what the work raised, CancelledError, RequestTimeoutError, UsageError.
    """
    if worker.is_current():
        raise UsageError("the engine cannot wait for itself; call it from another thread than its own")
    deadline = _deadline(timeout)
    outbox: queue.SimpleQueue[Entry] = queue.SimpleQueue()
    request.put = outbox.put
    kind: str = ""
    try:
        worker.submit(request)
        while kind not in LAST:
            kind, value = _next(outbox, deadline, timeout)
            if kind == ITEM:
                yield value
            else:
                _settle(request, kind, value, progress)
    finally:
        request.cancel()
        # An iterator that nobody holds may be closed on any thread, so on the worker's.
        while request.submitted and kind not in LAST and not worker.is_current():
            kind, value = outbox.get()


class AsyncResults(Generic[T]):
    """As `results`, for a caller on an event loop, the one of the first `anext`.

    instead: makes what is yielded, as the last, where the request was cancelled before it had a result; without it
    that raises CancelledError. owner: must live on meanwhile.

    Nobody has to close it, but `aclose` also waits until the worker has let go of the request. No generator: those a
    loop closes for itself when it ends, which takes longer than the loop then has.
    """

    def __init__(
        self,
        worker: "Worker",
        request: Request,
        progress: Progress | None = None,
        timeout: float | None = None,
        instead: Callable[[], T] | None = None,
        owner: Any = None,
    ):
        self._worker, self._request, self._progress, self._timeout = worker, request, progress, timeout
        self._instead, self._owner = instead, owner
        # The request knows the outbox, but not this object, which so ends where it is left.
        self._outbox: asyncio.Queue[Entry] = asyncio.Queue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._deadline: float | None = None
        self._kind = ""

    def __aiter__(self) -> "AsyncResults[T]":
        return self

    async def __anext__(self) -> T:
        if self._loop is None:
            self._deadline = _deadline(self._timeout)
            self._loop = asyncio.get_running_loop()
            self._request.put = partial(self._loop.call_soon_threadsafe, self._outbox.put_nowait)
            self._worker.submit(self._request)
        try:
            while self._kind not in LAST:
                self._kind, value = await self._get()
                if self._kind == ITEM:
                    return value
                _settle(self._request, self._kind, value, self._progress)
        except CancelledError:
            if self._instead is None:
                raise
            return self._instead()
        except BaseException:
            self._request.cancel()
            raise
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Cancels, and returns when the worker has let go of the request."""
        self._request.cancel()
        while self._request.submitted and self._kind not in LAST:
            self._kind, _ = await self._outbox.get()

    def __del__(self) -> None:
        self._request.cancel()

    async def _get(self) -> Entry:
        if self._deadline is None or not self._outbox.empty():
            return await self._outbox.get()
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                return await self._outbox.get()
        except TimeoutError:
            raise RequestTimeoutError(_late(self._timeout)) from None


def _next(outbox: "queue.SimpleQueue[Entry]", deadline: float | None, timeout: float | None) -> Entry:
    if deadline is None or not outbox.empty():
        return outbox.get()
    try:
        return outbox.get(timeout=max(0.0, deadline - time.monotonic()))
    except queue.Empty:
        raise RequestTimeoutError(_late(timeout)) from None


def _settle(request: Request, kind: str, value: Any, progress: Progress | None) -> None:
    """What is no item: progress is told, an end without a result raised."""
    if kind == PROGRESS and progress is not None and progress(*value) is False:
        request.cancel()
    elif kind == CANCELLED:
        raise CancelledError("the request was cancelled before it had a result; send it again if you still want it")
    elif kind == ERROR:
        try:
            raise value
        finally:
            del value  # a cycle: the error knows this frame


def _deadline(timeout: float | None) -> float | None:
    if timeout is not None and not timeout > 0:
        raise UsageError(f"timeout must be a number of seconds above 0, or None, not {timeout!r}")
    return None if timeout is None else time.monotonic() + timeout


def _late(timeout: float | None) -> str:
    return f"no end after {timeout} seconds; allow more, or ask for less"
