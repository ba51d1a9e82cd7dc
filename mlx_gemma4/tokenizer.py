"""A checkpoint's tokenizer: text to ids and back, its special tokens, its chat template, its stop ids and
defaults.

Owns reading tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json, through
the `tokenizers` package alone. Leaves rendering to `template.py`, streaming text to `detokenizer.py`, and
what a conversation looks like in tokens to `turns.py`.

Names are those transformers' tokenizers use where mlx-lm relies on them (`encode`, `decode`, `eos_token_id`,
`get_vocab`, `chat_template`, `convert_tokens_to_ids`, `apply_chat_template`), so mlx-lm's functions accept
this object.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from . import template
from .detokenizer import DecoderDetokenizer, StreamingDetokenizer, is_gemma_decoder
from .errors import TokenizerError, UsageError

# generation_config.json of every published Gemma 4 (-it and base); used where a folder has no such file.
PUBLISHED_DEFAULTS = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 64}


class Tokenizer:
    """Made by `Tokenizer.from_folder`. Use changes nothing in it, so threads may share one.

    bos_token, eos_token, pad_token   names, or None; with `_id` the ids
    eos_token_ids                     set of ids that end a turn: generation_config.json's, else
                                      config.json's, else the tokenizer's own <eos>
    chat_template                     Jinja source, or None for base models
    generation_defaults               sampling settings of generation_config.json (temperature, top_p, ...)
    """

    def __init__(
        self,
        tokenizer_json: str,
        *,
        special: dict[str, Any] | None = None,
        chat_template: str | None = None,
        eos_token_ids: Iterable[int] = (),
        generation_defaults: dict[str, Any] | None = None,
    ):
        from tokenizers import Tokenizer as RawTokenizer

        try:
            self._raw = RawTokenizer.from_str(tokenizer_json)
        except Exception as e:  # the package raises plain Exception
            raise TokenizerError(f"tokenizer.json cannot be read ({_line(e)}); download it again") from None
        # A file may carry training-time padding or truncation; a prompt must be neither padded nor cut.
        self._raw.no_padding()
        self._raw.no_truncation()
        self._plain = is_gemma_decoder(tokenizer_json)

        special = special or {}
        self.bos_token = self._name(special, "bos_token", "<bos>")
        self.eos_token = self._name(special, "eos_token", "<eos>")
        self.pad_token = self._name(special, "pad_token", "<pad>")
        self.bos_token_id = self.token_id(self.bos_token)
        self.eos_token_id = self.token_id(self.eos_token)
        self.pad_token_id = self.token_id(self.pad_token)
        own_eos = () if self.eos_token_id is None else (self.eos_token_id,)
        self.eos_token_ids = set(eos_token_ids) or set(own_eos)
        self._vocabularies: dict[tuple[Any, ...], Any] = {}
        self.special_ids = frozenset(i for i, t in self._raw.get_added_tokens_decoder().items() if t.special)
        self._start = self.bos_token_id if special.get("add_bos_token", True) else None
        self.chat_template = chat_template
        self.has_chat_template = chat_template is not None
        self.generation_defaults = dict(PUBLISHED_DEFAULTS if generation_defaults is None else generation_defaults)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Reads the tokenizer of a checkpoint folder. Raises TokenizerError naming the file that is missing
        or bad."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(f"{folder} has no tokenizer.json; copy it from the original checkpoint")
        settings = _read_json(folder / "tokenizer_config.json")
        generation = _read_json(folder / "generation_config.json")
        config = _read_json(folder / "config.json")
        text_config = config.get("text_config") or {}
        eos = _first(generation.get("eos_token_id"), config.get("eos_token_id"), text_config.get("eos_token_id"))
        defaults = {k: v for k, v in generation.items() if k in SAMPLING_KEYS and v is not None}
        return cls(
            _read(path),
            special=settings,
            chat_template=_find_template(folder, settings),
            eos_token_ids=[] if eos is None else ([eos] if isinstance(eos, int) else eos),
            generation_defaults=defaults or None,
        )

    # Ids and text

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written in it become their ids.

        add_special_tokens: starts with <bos> (exactly one, whether the text or the file's post-processor
        brings it too). Text rendered by the chat template already has it: encode that with False.
        """
        ids = self._raw.encode(text, add_special_tokens=False).ids
        if add_special_tokens and self._start is not None and ids[:1] != [self._start]:
            ids.insert(0, self._start)
        return ids

    def decode(self, ids: int | Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of `ids`. Bytes that are no UTF-8 become U+FFFD; ids outside the vocabulary leave nothing."""
        ids = [ids] if isinstance(ids, int) else [int(i) for i in ids]
        return self._raw.decode(ids, skip_special_tokens=skip_special_tokens)

    @property
    def detokenizer(self) -> StreamingDetokenizer:
        """A fresh streaming detokenizer that shows special tokens, as `decode` does and mlx-lm's do."""
        return self.make_detokenizer()

    def make_detokenizer(self, skip_special_tokens: bool = False) -> StreamingDetokenizer:
        """A fresh streaming detokenizer; its final text is `decode(tokens, skip_special_tokens)`."""
        kind = StreamingDetokenizer if self._plain else DecoderDetokenizer
        return kind(self._raw, self.special_ids if skip_special_tokens else ())

    # Vocabulary

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return self._raw.get_vocab_size(with_added_tokens=True)

    def __len__(self) -> int:
        return self.vocab_size

    def get_vocab(self) -> dict[str, int]:
        return self._raw.get_vocab(with_added_tokens=True)

    def token_id(self, token: str | None) -> int | None:
        """The id of exactly this token, or None."""
        return None if token is None else self._raw.token_to_id(token)

    @property
    def constraint_vocabulary(self) -> Any:
        """The vocabulary as llguidance reads it (an `LLTokenizer`); a second or so for 262,144 tokens, made once."""
        from llguidance import LLTokenizer

        return self._for_stops("all", lambda stops: LLTokenizer(self._raw.to_str(), eos_token=stops))

    @property
    def byte_vocabulary(self) -> Any:
        """Bytes and special tokens alone, see `endings.py`; made once."""
        from .endings import byte_vocabulary

        return self._for_stops("bytes", lambda _: byte_vocabulary(self))

    def _for_stops(self, kind: str, make: Callable[[list[int]], Any]) -> Any:
        """Vocabularies hold the stop ids, which a caller may change. Raises UsageError where there are none."""
        stops = sorted(self.eos_token_ids)
        if not stops:
            raise UsageError(
                "no token ends an answer, so none can be held to a form; set the tokenizer's eos_token_ids"
            )
        key = (kind, *stops)
        if key not in self._vocabularies:
            self._vocabularies[key] = make(stops)
        return self._vocabularies[key]

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> Any:
        return self.token_id(tokens) if isinstance(tokens, str) else [self.token_id(t) for t in tokens]

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        return self._raw.id_to_token(ids) if isinstance(ids, int) else [self._raw.id_to_token(i) for i in ids]

    # Conversations

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        tokenize: bool = True,
        enable_thinking: bool | None = None,
        **variables: Any,
    ) -> list[int] | str:
        """Renders the checkpoint's template: ids, or text with tokenize=False.

        add_generation_prompt: ends with the opening of the model's turn. None: unless the last message is the
        model's own, which is what both callers that wait for an answer and mlx-lm's data sets expect.
        enable_thinking: None leaves it to the template (off in the published ones).
        variables: reach the template under their names (`preserve_thinking=True`, ...).

        Raises TokenizerError for a base model, and when the template refuses the messages.
        """
        if self.chat_template is None:
            raise TokenizerError(
                "this checkpoint has no chat template (a base model?); use an -it model or `gemma4 generate --raw`"
            )
        if add_generation_prompt is None:
            add_generation_prompt = not messages or messages[-1].get("role") not in ("assistant", "model")
        if variables.pop("return_dict", False):
            raise TypeError("apply_chat_template returns ids or text; return_dict=True is not offered")
        if enable_thinking is not None:
            variables["enable_thinking"] = enable_thinking
        names = {n: t for n in ("bos", "eos", "pad") if (t := getattr(self, f"{n}_token")) is not None}
        text = template.render(
            self.chat_template,
            messages=list(messages),
            tools=list(tools) if tools else None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **{f"{n}_token": t for n, t in names.items()},
            **variables,
        )
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def _name(self, special: dict[str, Any], key: str, usual: str) -> str | None:
        """A special token's name from tokenizer_config.json, where it is a string or an AddedToken
        dictionary."""
        value = special.get(key)
        name = value.get("content") if isinstance(value, dict) else value
        name = usual if name is None else name
        return name if self.token_id(name) is not None else None


SAMPLING_KEYS = (
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "suppress_tokens",
)


def _find_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """chat_template.jinja, else tokenizer_config.json's entry, else chat_template.json (older processors)."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read(path)
    found = settings.get("chat_template")
    if found is None:
        found = _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(found, list):  # several named templates
        named = {entry["name"]: entry["template"] for entry in found}
        if "default" not in named:
            raise TokenizerError(f"{folder} names chat templates {', '.join(sorted(named))} but none is 'default'")
        found = named["default"]
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise TokenizerError(f"{path} cannot be read ({_line(e)})") from None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; {} when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read(path))
    except json.JSONDecodeError as e:
        raise TokenizerError(f"{path} is not valid JSON ({e}); download it again") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} holds no JSON object; download it again")
    return value


def _first(*values: Any) -> Any:
    return next((v for v in values if v is not None), None)


def _line(error: Any) -> str:
    return " ".join(str(error).split())
