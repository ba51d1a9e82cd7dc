"""A model for an application: MLX on one thread of its own, callers on any thread or event loop.

Owns what an application begins with: the engine, and requests without a conversation. Leaves conversations to
`engine_chat.py`, loading to `engine_model.py`, the thread and its queue to `engine_worker.py`, turns to `chat.py`.
"""

import asyncio
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from . import catalog
from .chat import Chat
from .engine_chat import EngineChat, aresult, atext, events, result, text
from .engine_model import Conversation, Keeper, LoadProgress, ModelInfo, never_begun, one_shot
from .engine_request import AsyncResults, CancelledError, Progress, Request, RequestTimeoutError, results
from .engine_worker import Worker
from .events import ChatEvent

__all__ = ["CancelledError", "Engine", "EngineChat", "ModelInfo", "RequestTimeoutError"]


class Engine:
    """A model on a thread of its own.

        engine = Engine("e2b", progress=lambda stage, done, total: ...)     # begins to load, returns at once
        chat = engine.chat(system="Be terse.")
        print(chat.send("Hello"))                                           # on any thread
        async for event in chat.astream("And now?"):                        # on any event loop
            match event: ...                                                # Thought, Text, Done as in `Chat`

    source and the options after it: see `loading.load`. What loading raises comes out of the first use, or of `ready`,
    and out of every use until `unload`. progress(stage, done, total): stage "download" or "weights", in bytes; called
    on the engine's thread; False stops the load.

    Threads: every method may be called from any thread and any number of them at once, the `a...` ones from any event
    loop. One request runs at a time; the others wait in the order in which they came. Methods without `a` wait and
    belong into no event loop. Nothing may be called from the engine's own thread (`progress` above, `call`), where it
    would wait for itself. Two engines share nothing but the memory of the process. Event loops go on while the model
    computes; only reading a large tokenizer holds the whole process up, some 0.3 s for 262,144 entries.

    Cancelling: closing an iterator, leaving its loop, Ctrl-C, `task.cancel()` and `cancel` end a request that waits at
    once, and one that runs before its next token or chunk of prefill; the history is then as `Chat.stream` says.
    Every request takes timeout= in seconds, waiting included; RequestTimeoutError (a TimeoutError) is raised then.

    `close` it, or use `with` or `async with`; an engine that nobody holds any more ends by itself, and so does the
    program.
    """

    def __init__(
        self,
        source: Any = catalog.DEMO,
        *,
        progress: LoadProgress | None = None,
        revision: str | None = None,
        dtype: Any = None,
        kv_bits: float | None = None,
        ple: str = "memory",
        towers: bool = False,
        check: bool = False,
        token: str | None = None,
    ):
        options = {"revision": revision, "dtype": dtype, "kv_bits": kv_bits, "ple": ple, "towers": towers}
        self._keeper = Keeper(source, {**options, "check": check, "token": token}, progress)
        self._worker = Worker(f"gemma4 {source}", self._keeper.prepare, self._keeper.unload)
        weakref.finalize(self, self._worker.stop).atexit = False  # the worker sees to that itself
        self._worker.submit(Request(lambda request: iter(())))

    def ready(self, timeout: float | None = None) -> ModelInfo:
        """Waits until the model is loaded. Raises what loading raised, RequestTimeoutError."""
        return self.call(lambda model, tokenizer: self._keeper.info, timeout=timeout)

    async def aready(self, timeout: float | None = None) -> ModelInfo:
        return await self.acall(lambda model, tokenizer: self._keeper.info, timeout=timeout)

    @property
    def model_info(self) -> ModelInfo | None:
        """None while nothing is loaded."""
        return self._keeper.info

    def chat(
        self,
        *,
        messages: Sequence[dict[str, Any]] = (),
        make: Callable[..., Chat] | None = None,
        **options: Any,
    ) -> "EngineChat":
        """A conversation. options: those of `Chat`; what it refuses comes out of the first use.

        messages: a history to go on with, media in it as sources. make: called as make(model, tokenizer, **options) on
        the engine's thread instead of `Chat`, when the conversation is first used and after an unload.
        """
        return EngineChat(self, self._worker, self._keeper, Conversation(make, messages, options))

    def stream(
        self, prompt: Any, *, progress: Progress | None = None, timeout: float | None = None, **options: Any
    ) -> Generator[ChatEvent, None, None]:
        """Answers without a conversation; events as of `Chat.stream`.

        prompt: text, a content, or messages, the last one the user's. options: those of `Chat` and of `Chat.stream`.
        progress(done, total): see `EngineChat.stream`.
        """
        return events(self, results(self._worker, self._single(prompt, options), progress, timeout))

    def astream(
        self, prompt: Any, *, progress: Progress | None = None, timeout: float | None = None, **options: Any
    ) -> AsyncResults[ChatEvent]:
        return AsyncResults(self._worker, self._single(prompt, options), progress, timeout, never_begun, self)

    def generate(self, prompt: Any, **options: Any) -> str:
        """The whole answer of `stream`, without thoughts; what there was of it if it was cancelled."""
        return text(self.stream(prompt, **options))

    async def agenerate(self, prompt: Any, **options: Any) -> str:
        return await atext(self.astream(prompt, **options))

    def call(self, function: Callable[..., Any], *, timeout: float | None = None) -> Any:
        """What function(model, tokenizer) returns, run on the engine's thread when its turn comes.

        It is not interrupted, and must return no arrays that are not evaluated. Raises what it raises, CancelledError.
        """
        return result(results(self._worker, self._calling(function), timeout=timeout))

    async def acall(self, function: Callable[..., Any], *, timeout: float | None = None) -> Any:
        return await aresult(AsyncResults(self._worker, self._calling(function), timeout=timeout))

    def cancel(self) -> None:
        """Cancels everything that runs or waits, loading included; the next request loads again."""
        self._worker.cancel()

    def unload(self, timeout: float | None = None) -> None:
        """Frees the model and all caches, after the requests that came before (`cancel` first, not to wait).

        The next request loads again. Conversations keep their messages and settings, but for what was done to a Chat
        inside `EngineChat.call` that is not in `engine_model.KEPT`. Where something else still refers to the model,
        garbage is collected, for which all threads of the process stand still a moment.
        """
        result(results(self._worker, self._unloading(), timeout=timeout))

    async def aunload(self, timeout: float | None = None) -> None:
        await aresult(AsyncResults(self._worker, self._unloading(), timeout=timeout))

    def close(self, timeout: float | None = None) -> None:
        """Cancels everything, frees the model and waits for the thread's end, at most `timeout` seconds. A closed
        engine is of no more use; messages and stats of its conversations can still be read."""
        self._worker.stop()
        self._worker.join(timeout)

    async def aclose(self) -> None:
        await asyncio.to_thread(self.close)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aenter__(self) -> "Engine":
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    def _single(self, prompt: Any, options: dict[str, Any]) -> Request:
        conversation, message, options = one_shot(prompt, options)

        def work(request: Request) -> Iterator[ChatEvent]:
            try:
                yield from conversation.turn(keeper, request, "stream", message, options)
            finally:
                conversation.put_away()

        keeper = self._keeper
        return Request(work)

    def _calling(self, function: Callable[..., Any]) -> Request:
        keeper = self._keeper
        return Request(lambda request: iter([function(*keeper.loaded)]))

    def _unloading(self) -> Request:
        keeper = self._keeper
        return Request(lambda request: iter([keeper.unload()]), needs_model=False)
