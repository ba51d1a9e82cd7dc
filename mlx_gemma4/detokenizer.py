"""Token ids to text, one id at a time, never half a character.

Owns the streaming side of decoding, with mlx-lm's interface (`add_token`, `finalize`, `text`, `last_segment`,
`tokens`, `offset`). Leaves whole-sequence decoding to `tokenizer.py` and the meaning of tokens to `turns.py`.

Gemma 4's decoder is three steps: "▁" becomes a space, runs of byte tokens (`<0xE2>`) become the UTF-8 they
spell, everything is joined. Only the second looks at more than one token, and it judges a run as a whole: if
all its bytes are UTF-8 they become characters, else each byte becomes U+FFFD (tokenizers
`decoders/byte_fallback.rs`). So this class holds back the current run of byte tokens and nothing else, and
its text is always a prefix of `tokenizer.decode(tokens)`:

    id              41       <0xF0>  <0x9F>  <0x8D>  <0x8E>  7
    last_segment    "An"     ""      ""      ""      ""      "🍎 a"
"""

import json
from collections.abc import Container
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RawTokenizer


def is_gemma_decoder(tokenizer_json: str) -> bool:
    """Whether tokenizer.json's decoder is the three steps above."""
    decoder = json.loads(tokenizer_json).get("decoder") or {}
    steps = decoder.get("decoders") if decoder.get("type") == "Sequence" else None
    return steps == [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]


class StreamingDetokenizer:
    """Constant work per token. Made by `Tokenizer.detokenizer`.

    raw: the `tokenizers.Tokenizer` that names the pieces; its decoder must be Gemma's (`is_gemma_decoder`).
    hidden: ids that leave no text (special tokens, where the caller does not want to see them).
    """

    def __init__(self, raw: "RawTokenizer", hidden: Container[int] = ()):
        self._raw = raw
        self._hidden = hidden
        self.reset()

    def reset(self) -> None:
        """Forgets everything that was added."""
        self.tokens: list[int] = []
        self.offset = 0  # characters of `text` already handed out by last_segment
        self._read: list[str] = []  # pieces handed out, joined on demand: long texts are not copied per token
        self._unread: list[str] = []
        self._run = bytearray()  # bytes of the byte tokens since the last ordinary one

    def add_token(self, token: int) -> None:
        """Takes one id. Ids the vocabulary does not have leave no text, as in `decode`."""
        self.tokens.append(token)
        if token in self._hidden:
            return
        piece = self._raw.id_to_token(token)
        if piece is None:
            return
        byte = _byte_of(piece)
        if byte is not None:
            self._run.append(byte)
            return
        self._flush()
        self._unread.append(piece.replace("▁", " "))

    def finalize(self) -> None:
        """Lets go of what was held back; call after the last token."""
        self._flush()

    def _flush(self) -> None:
        if self._run:
            try:
                self._unread.append(self._run.decode("utf-8"))
            except UnicodeDecodeError:
                self._unread.append("\ufffd" * len(self._run))
            self._run.clear()

    @property
    def text(self) -> str:
        """All complete text so far."""
        if len(self._read) > 1:
            self._read = ["".join(self._read)]
        return "".join(self._read + self._unread)

    @property
    def last_segment(self) -> str:
        """The text that appeared since this property was last read."""
        segment = "".join(self._unread)
        if segment:
            self._read.append(segment)
            self.offset += len(segment)
        self._unread.clear()
        return segment


class DecoderDetokenizer(StreamingDetokenizer):
    """The same for any other decoder, through the `tokenizers` package's own stream; it re-reads a short
    window per
    token. `finalize` compares with the whole text once, so the end is exact here too."""

    def reset(self) -> None:
        super().reset()
        from tokenizers.decoders import DecodeStream

        self._shown: list[int] = []  # tokens without the hidden ones
        self._stream = DecodeStream(skip_special_tokens=False)

    def add_token(self, token: int) -> None:
        self.tokens.append(token)
        if token in self._hidden:
            return
        self._shown.append(token)
        piece = self._stream.step(self._raw, token)
        if piece:
            self._unread.append(piece)

    def finalize(self) -> None:
        whole, said = self._raw.decode(self._shown, skip_special_tokens=False), self.text
        self._unread.append(whole[len(said) :])


def _byte_of(piece: str) -> int | None:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return int(piece[3:5], 16)
        except ValueError:
            return None
    return None
