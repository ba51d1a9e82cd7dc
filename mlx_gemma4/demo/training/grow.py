"""Gives the text model's tokenizer the marks of media and the words of pictures.

    python grow.py TEXT_CHECKPOINT OUT

Owns: which tokens are added. Old texts keep their tokens: marks are special, and the new merges are the last ones and
need letters or marks that stand together in hardly anything else. A box costs 25 tokens instead of 49.
"""

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer

VOCABULARY = 1600
MARKS = {"<|image|>": 1536, "<|image>": 1537, "<image|>": 1538, "<|audio|>": 1539, "<|audio>": 1540,
         "<audio|>": 1541, "<|video|>": 1542}  # fmt: skip
SPACE = "\u2581"
# Each is merged from left to right or as nested here; every step becomes a token.
CHAINS = (
    (f"{SPACE}c", ("i", ("r", "cle"))),
    (((f"{SPACE}s", "qu"), "a"), "re"),
    (f"{SPACE}t", ("ri", ("ang", "le"))),
    ((f"{SPACE}pic", "t"), "ure"),
    ((("de", "te"), "c"), "t"),
)
# What surrounds the numbers and the label of a box.
FRAMES = ('{"box_2d": [', '], "label": "', '"}]', '"}, ')


def merges(vocab: dict[str, int], encode) -> list[tuple[str, str]]:
    """The new merges, in order."""
    out: list[tuple[str, str]] = []

    def join(part) -> str:
        if isinstance(part, str):
            return part
        pair = join(part[0]), join(part[1])
        if pair not in out:
            out.append(pair)
        return "".join(pair)

    for chain in CHAINS:
        join(chain)
    for text in FRAMES:
        pieces = encode(text)
        for piece in pieces[1:]:
            pair = (pieces[0], piece)
            if pair not in out:
                out.append(pair)
            pieces[0] += piece
    return out


def main(source: Path, out: Path) -> None:
    text = (source / "tokenizer.json").read_text()
    old, raw = Tokenizer.from_str(text), json.loads(text)
    vocab, added = raw["model"]["vocab"], raw["added_tokens"]
    like = next(t for t in added if t["content"] == "<|turn>")
    for mark, number in MARKS.items():
        vocab[mark] = number
        added.append(like | {"id": number, "content": mark})
    free = iter(range(max(vocab.values()) + 1, VOCABULARY))
    known = {tuple(m) for m in raw["model"]["merges"]}
    for pair in merges(vocab, lambda t: old.encode(t, add_special_tokens=False).tokens):
        missing = [p for p in pair if p not in vocab]
        if missing or pair in known:
            raise SystemExit(f"{pair} cannot be merged: {missing or 'known already'}")
        vocab.setdefault("".join(pair), -1)
        if vocab["".join(pair)] < 0:
            vocab["".join(pair)] = next(free)
        raw["model"]["merges"].append(list(pair))
    for i, number in enumerate(free):
        vocab[f"<unused{i}>"] = number
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.json").write_text(json.dumps(raw, ensure_ascii=False, separators=(",", ":")))
    config = json.loads((source / "tokenizer_config.json").read_text())
    config |= {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>", "audio_token": "<|audio|>",
               "boa_token": "<|audio>", "eoa_token": "<audio|>", "extra_special_tokens": ["<|video|>"],
               "processor_class": "Gemma4Processor"}  # fmt: skip
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
