"""What a model takes beside text: from messages with sources to prompts with features.

Owns the way through `media/` and `models/merging.py` for one model: which senses it has, its own token budget for
pictures, and the store of what its towers made. Leaves files to `media/`, turns to `chat.py`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .media.content import Content, for_template, items_of, load_content, with_media
from .media.images import DEFAULT_BUDGET, TOKEN_BUDGETS
from .media.items import Item, MediaSettings, load_items
from .media.prompt import Marks, Prompt, expand
from .tokenizer import Tokenizer
from .tool_calls import decode_arguments

if TYPE_CHECKING:
    from .media.store import FeatureStore
    from .models.merging import Media


class Senses:
    """The way of pictures, sound and video into one model.

    >>> senses = Senses(model, tokenizer)
    >>> content = senses.load("What is this?", images=["cat.png"])
    >>> prompt = senses.prompt([{"role": "user", "content": content}])
    >>> media = senses.encode(prompt)                        # None for a prompt of text alone

    settings may be assigned at any time. store: None makes one.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        settings: MediaSettings | None = None,
        store: "FeatureStore | None" = None,
    ):
        self._model, self._tokenizer = model, tokenizer
        self.settings = settings or MediaSettings()
        raw = getattr(getattr(model, "config", None), "raw", {})
        self._marks = Marks.from_config(raw)
        self._texts = list(self._marks.texts(tokenizer).values())
        # Longest first: one may be part of another.
        self._control = sorted(tokenizer.convert_ids_to_tokens(list(tokenizer.special_ids)), key=len, reverse=True)
        budget = raw.get("vision_soft_tokens_per_image")
        self._image_tokens: int = budget if budget in TOKEN_BUDGETS else DEFAULT_BUDGET
        if store is None:
            from .media.store import FeatureStore

            store = FeatureStore()
        self.store = store

    @property
    def sees(self) -> bool:
        return self._has("vision_tower")

    @property
    def hears(self) -> bool:
        return self._has("audio_tower")

    def _has(self, tower: str) -> bool:
        return isinstance(self._model, dict) and tower in self._model  # a graph of MLX is a dictionary of its parts

    def items(self, kind: str, source: Any) -> list[Item]:
        """A source as the items of a prompt: one, for a video with a soundtrack two.

        Raises MediaError where it cannot be read, UsageError for a model that cannot take it.
        """
        from .models.merging import check_senses

        check_senses(self._model, {kind})
        return load_items(kind, source, self.settings, image_tokens=self._image_tokens, hears=self.hears)

    def load(
        self,
        content: Content | Sequence[dict[str, Any]],
        images: Sequence[Any] = (),
        audio: Sequence[Any] = (),
        videos: Sequence[Any] = (),
    ) -> Content:
        """A message's content with its sources loaded, these in front of it. Raises as `items` does."""
        return load_content(with_media(content, images, audio, videos), self.items)

    def prompt(
        self,
        messages: Sequence[dict[str, Any]],
        thinking: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> Prompt:
        """The prompt of a loaded conversation, exactly as the checkpoint's template writes it.

        Raises TokenizerError, and UsageError where a message spells out a mark of media.
        """
        text = self._tokenizer.apply_chat_template(
            for_template(messages, self._texts, self._control),
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            enable_thinking=thinking,
        )
        assert isinstance(text, str)
        return expand(text, items_of(messages), self._tokenizer, self._marks)

    def encode(self, prompt: Prompt, since: int = 0) -> "Media | None":
        """The features of what stands in a prompt from position `since` on, counted from there; None for text alone.

        Raises UsageError as `items` does.
        """
        if not any(run.stop > since for run in prompt.runs):
            return None
        from .models.merging import encode

        return encode(self._model, prompt.runs, self.store, since).after(since)


def media_prompt(
    model: Any,
    tokenizer: Tokenizer,
    messages: Sequence[dict[str, Any]],
    *,
    thinking: bool = False,
    tools: Sequence[dict[str, Any]] | None = None,
    settings: MediaSettings | None = None,
) -> Prompt:
    """The prompt of messages with sources in them, for `stream_generate`.

    >>> parts = [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "What is this?"}]
    >>> prompt = media_prompt(model, tokenizer, [{"role": "user", "content": parts}])
    >>> print(generate(model, tokenizer, prompt))

    Raises MediaError, UsageError, TokenizerError.
    """
    senses = Senses(model, tokenizer, settings)
    told = decode_arguments(messages)  # OpenAI's calls have theirs as text
    loaded = [m | {"content": senses.load(m["content"])} if m.get("content") else m for m in told]
    return senses.prompt(loaded, thinking, tools)
