"""What an engine's worker keeps: the model, and the conversations that outlive it.

Owns loading with progress, unloading, and a `Chat` that is made when it is first used and again after an unload.
All of it runs on the worker's thread, but for what says otherwise. Leaves the thread to `engine_worker.py`, reading
weights to `loading.py`, turns to `chat.py`.
"""

import gc
import inspect
import threading
import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import MISSING, dataclass, fields
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from .chat import Chat
from .engine_request import CancelledError, Request
from .errors import Gemma4Error, UsageError, WeightsError
from .events import ChatEvent, Done, Stats
from .loading import load
from .media.store import FeatureStore

# Called with (stage, done, total), stage "download" or "weights", both in bytes; False stops the load.
LoadProgress = Callable[[str, int, int], Any]

# What an unload carries over to the next Chat of the same conversation.
KEPT = ("messages", "system", "thinking", "sampling", "tools", "on_full", "loop_guard", "stats")


@dataclass(frozen=True)
class ModelInfo:
    """What was loaded."""

    source: str
    model_type: str
    compute_dtype: str  # "bfloat16", "float16" or "float32"
    weight_bytes: int
    weight_bits: int | None  # of packed weights; None: not packed
    kv_bits: float  # bits per number in the cache; 16: as computed
    context_limit: int  # positions
    sees: bool
    hears: bool
    chats: bool  # whether it has a chat template


class Keeper:
    """source, options: for `load`. `info` may be read from any thread."""

    def __init__(self, source: Any, options: dict[str, Any], progress: LoadProgress | None):
        self.info: ModelInfo | None = None
        self.features = FeatureStore()  # one for all conversations: a picture is computed once
        self._source, self._options, self._progress = source, options, progress
        self._loaded: tuple[Any, Any] | None = None
        self._error: BaseException | None = None
        self._open: weakref.WeakSet[Conversation] = weakref.WeakSet()

    @property
    def loaded(self) -> tuple[Any, Any]:
        """(model, tokenizer). Raises what loading raised."""
        if self._error is not None:
            raise self._error.with_traceback(None)  # each raise would lengthen it
        if self._loaded is None:
            raise CancelledError("loading was cancelled; ask again to load the model after all")
        return self._loaded

    def prepare(self, halted: threading.Event) -> None:
        """Loads unless that was done, or has failed already."""
        if self._loaded is not None or self._error is not None:
            return
        try:
            self._loaded = self._load(halted)
        except BaseException as e:
            if not (halted.is_set() and isinstance(e, CancelledError)):
                self._error = e
        if self._loaded is None:
            mx.clear_cache()

    def unload(self) -> None:
        """Lets go of the model, of all caches and of an error of loading; messages stay."""
        for conversation in list(self._open):
            conversation.put_away()
        model = None if self._loaded is None else weakref.ref(self._loaded[0])
        self._loaded = self._error = self.info = None
        self.features.clear()
        if model is not None and model() is not None:  # in a cycle; collecting stops all threads, so only then
            gc.collect()
        mx.clear_cache()

    def opened(self, conversation: "Conversation") -> None:
        self._open.add(conversation)

    def _load(self, halted: threading.Event) -> tuple[Any, Any]:
        def tell(stage: str, done: int, total: int) -> None:
            if halted.is_set():
                raise CancelledError("loading was cancelled")
            if self._progress is not None and self._progress(stage, done, total) is False:
                raise Gemma4Error("loading was stopped by its progress callback; unload() allows another try")

        # Read one by one here instead of inside `load`, so that each can be told about, or be the last.
        model, tokenizer = load(
            self._source, lazy=True, progress=lambda done, total: tell("download", done, total), **self._options
        )
        named: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
        total, done = sum(a.nbytes for _, a in named), 0
        tell("weights", 0, total)
        for name, array in named:
            try:
                mx.eval(array)
            except RuntimeError as e:
                raise WeightsError(
                    f"{self._source}: tensor {name} cannot be read ({str(e).partition(chr(10))[0]}); download it again"
                ) from None
            done += array.nbytes
            tell("weights", done, total)
        mx.eval(model.private_arrays())
        quantization = model.config.quantization or {}
        self.info = ModelInfo(
            source=str(self._source),
            model_type=model.config.model_type,
            compute_dtype=str(model.compute_dtype).removeprefix("mlx.core."),
            weight_bytes=total,
            weight_bits=quantization.get("bits"),
            kv_bits=model.kv_bits,
            context_limit=model.text_config.max_position_embeddings,
            sees="vision_tower" in model,
            hears="audio_tower" in model,
            chats=tokenizer.chat_template is not None,
        )
        return model, tokenizer


class Conversation:
    """A `Chat` as long as the model is loaded, and what of it outlives that.

    make: called with (model, tokenizer, **options); None is `Chat`. messages: the history it begins with, sources of
    media in it, a system prompt first if there is one.
    """

    def __init__(self, make: Callable[..., Chat] | None, messages: Sequence[dict[str, Any]], options: dict[str, Any]):
        self._make, self._options = make, options
        self._kept: dict[str, Any] = {"messages": list(messages)}
        self._chat: Chat | None = None
        if messages and messages[0].get("role") == "system":
            if options.get("system"):
                raise UsageError("there is a system prompt in messages and another in system=; give one of them")
            self._options = {**options, "system": messages[0]["content"]}
            self._kept["messages"] = list(messages[1:])

    def current(self, name: str) -> Any:
        """An attribute of the chat, as it stands. From any thread."""
        chat, kept = self._chat, self._kept
        return kept.get(name) if chat is None else getattr(chat, name)

    def chat(self, keeper: Keeper) -> Chat:
        """Raises what loading raised, and what `Chat` and the media in its first messages do."""
        if self._chat is None:
            model, tokenizer = keeper.loaded
            if self._make is None:
                chat = Chat(model, tokenizer, **{"features": keeper.features, **self._options})
            else:
                chat = self._make(model, tokenizer, **self._options)
            senses = chat.senses
            kept = dict(self._kept)
            history = kept.pop("messages")
            if history:
                chat.messages[:] = [
                    m | {"content": senses.load(m["content"])} if m.get("content") else dict(m) for m in history
                ]
            for name, value in kept.items():
                setattr(chat, name, value)
            self._chat = chat
            keeper.opened(self)
        return self._chat

    def turn(
        self,
        keeper: Keeper,
        request: Request,
        method: str,
        message: Any,
        options: dict[str, Any],
    ) -> Generator[ChatEvent, None, None]:
        """method: "stream" or "stream_results"."""
        chat = self.chat(keeper)
        request.on_cancel(chat.cancel)
        # A cancel from before the turn begins is met by `report`.
        with closing(getattr(chat, method)(message, progress=request.report, **options)) as events:
            yield from events

    def fork(self, keeper: Keeper) -> "Conversation":
        """Another one that stands where this one does."""
        other = Conversation(self._make, (), self._options)
        other._chat = self.chat(keeper).fork()
        keeper.opened(other)
        return other

    def put_away(self) -> None:
        """Lets go of the chat, and of its cache at once; what is needed to make it again stays."""
        if self._chat is not None:
            self._kept = {name: getattr(self._chat, name) for name in KEPT}
            self._kept["messages"] = list(self._chat.messages)
            self._chat = None


def one_shot(prompt: Any, options: dict[str, Any]) -> tuple[Conversation, Any, dict[str, Any]]:
    """(conversation, its last message, options of the turn) for a text, a content, or messages that end with the
    user's. Raises UsageError."""
    made = {name: value for name, value in options.items() if name in _OF_CHAT}
    rest = {name: value for name, value in options.items() if name not in _OF_CHAT}
    if isinstance(prompt, str) or not prompt or "role" not in prompt[0]:
        return Conversation(None, (), made), prompt, rest
    *history, last = prompt
    if last.get("role") != "user":
        raise UsageError(f"the last of the messages must be the user's, not one of {last.get('role')!r}")
    return Conversation(None, history, made), last["content"], rest


def never_begun() -> Done:
    """The end of a turn that was cancelled while it waited for its turn."""
    figures: dict[str, Any] = {f.name: 0 for f in fields(Stats) if f.default is MISSING}
    return Done(Stats(**{**figures, "context_limit": None, "finish_reason": "cancelled"}), "cancelled")


_OF_CHAT = frozenset(inspect.signature(Chat).parameters) - {"model", "tokenizer"}
