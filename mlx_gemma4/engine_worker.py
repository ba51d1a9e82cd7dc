"""One thread that does the work of many callers, in order.

Owns the thread, its queue and its end. Leaves what travels back to a caller to `engine_request.py`, and what the work
is to `engine_model.py`.

The thread is a daemon, so that a program may end without closing anything; but it must not end while MLX is in the
middle of something, so at exit the worker is stopped as by `stop` and waited for.
"""

import queue
import threading
import weakref
from collections.abc import Callable

import mlx.core as mx

from .engine_request import Request
from .errors import UsageError

# How long the end of the program waits for a step that nothing interrupts: a chunk of prefill, a tensor being read.
EXIT_SECONDS = 60.0
# MLX keeps freed buffers; they are given back when there is nothing to do, and after this many requests in a row.
CLEAR_EVERY = 16


class Worker:
    """prepare(halted): called on the thread before a request that needs the model; when `halted` is set, it should
    give up. leave: called on it before it ends. Neither may raise.
    """

    def __init__(self, name: str, prepare: Callable[[threading.Event], None], leave: Callable[[], None]):
        self._prepare, self._leave = prepare, leave
        self.closed = False
        self._halted = threading.Event()
        self._inbox: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        # Reentrant: what the garbage collector finds inside `submit` may call `stop`.
        self._lock = threading.RLock()
        self._requests: weakref.WeakSet[Request] = weakref.WeakSet()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        weakref.finalize(self, _end, weakref.ref(self))
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Puts it at the end of the queue. Raises UsageError after `stop`."""
        with self._lock:
            if self.closed:
                raise UsageError("this engine is closed; make a new Engine")
            request.submitted = True
            self._requests.add(request)
            self._inbox.put(request)

    def cancel(self) -> None:
        """Cancels what runs and what waits."""
        with self._lock:
            requests = list(self._requests)
        for request in requests:
            request.cancel()
        self._halted.set()

    def stop(self) -> None:
        """Cancels everything and lets the thread end, without waiting for it."""
        with self._lock:
            if not self.closed:
                self.closed = True
                self._inbox.put(None)
        self.cancel()

    def join(self, timeout: float | None = None) -> None:
        """Waits for the end of the thread, except on it."""
        if not self.is_current():
            self._thread.join(timeout)

    def is_current(self) -> bool:
        return threading.current_thread() is self._thread

    def _run(self) -> None:
        served = 0
        try:
            while (request := self._inbox.get()) is not None:
                if request.needs_model:
                    self._halted = halted = threading.Event()
                    if not request.cancelled:  # looked at after `_halted` is there: `cancel` sets them in this order
                        self._prepare(halted)
                request.run()
                del request  # while the thread waits for the next one
                served += 1
                if self._inbox.empty() or served % CLEAR_EVERY == 0:
                    mx.clear_cache()
        finally:
            self._leave()
            # Streams belong to their thread: left behind, they are torn down by a thread that has no Python any more.
            mx.clear_streams()


def _end(ref: "weakref.ref[Worker]") -> None:
    """At the end of the program; not before, since a worker that runs is held by its thread."""
    if (worker := ref()) is not None:
        worker.stop()
        worker.join(EXIT_SECONDS)
