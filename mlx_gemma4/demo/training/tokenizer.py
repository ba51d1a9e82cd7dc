"""Builds the small model's tokenizer: Gemma 4's structure and special ids, a vocabulary of its own.

Owns: tokenizer.json and tokenizer_config.json. As in Gemma 4: byte-pair encoding with byte fallback, a space becomes
U+2581, and the ids of pad, eos, bos, unk, mask, tools, thinking, channels, turns and newline are the real ones, so the
stop ids [1, 106, 50] hold. Digits are single tokens. The merges are learned on text of the world, inside words only,
so they hold for unsplit text as well.
"""

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SIZE = 1536
SPECIAL = {
    "<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4,
    "<|tool>": 46, "<tool|>": 47, "<|tool_call>": 48, "<tool_call|>": 49, "<|tool_response>": 50,
    "<tool_response|>": 51,
    '<|"|>': 52, "<|think|>": 98, "<|channel>": 100, "<channel|>": 101, "<|turn>": 105, "<turn|>": 106,
}  # fmt: skip
FIXED = {"\n": 107, "\n\n": 108}
SPACE = "\u2581"
# Words, digits one by one, marks one by one; a leading space belongs to the word.
_PIECES = Regex(f"{SPACE}?[A-Za-z]+|[0-9]|\\n\\n|\\n|{SPACE}|[^A-Za-z0-9\\n{SPACE}]")


def _learn(texts: list[str], pieces: int) -> tuple[list[str], list[tuple[str, str]]]:
    """The first `pieces` tokens beyond single characters and the merges that make them."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", SPACE)
    learner.pre_tokenizer = pre_tokenizers.Split(_PIECES, "isolated")
    ascii_marks = [chr(c) for c in range(33, 127)] + [SPACE]
    trainer = trainers.BpeTrainer(
        vocab_size=pieces + len(ascii_marks), initial_alphabet=ascii_marks, show_progress=False
    )
    learner.train_from_iterator((t.replace("\n", " ") for t in texts), trainer)
    model = json.loads(learner.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    return ascii_marks, merges


def build(texts: list[str]) -> Tokenizer:
    """The tokenizer with SIZE entries for these texts."""
    fixed = SPECIAL | FIXED
    free = iter(sorted(set(range(SIZE)) - set(fixed.values())))
    vocab = dict(fixed)
    room = SIZE - len(fixed) - 256
    alphabet, merges = _learn(texts, room)
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = next(free)
    for piece in alphabet:
        vocab[piece] = next(free)
    kept: list[tuple[str, str]] = [("\n", "\n")]
    for left, right in merges:
        if left not in vocab or right not in vocab:
            continue
        if left + right not in vocab:
            token = next(free, None)
            if token is None:
                break
            vocab[left + right] = token
        kept.append((left, right))
    for i, token in enumerate(free):
        vocab[f"<unused{i}>"] = token
    made = Tokenizer(models.BPE(vocab=vocab, merges=kept, fuse_unk=True, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", SPACE)
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    made.post_processor = processors.TemplateProcessing(
        single="<bos>:0 $A:0", pair="<bos>:0 $A:0 <bos>:1 $B:1", special_tokens=[("<bos>", SPECIAL["<bos>"])]
    )
    return made


CONFIG = {
    "backend": "tokenizers", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>",
    "mask_token": "<mask>", "soc_token": "<|channel>", "eoc_token": "<channel|>", "sot_token": "<|turn>",
    "eot_token": "<turn|>", "think_token": "<|think|>", "std_token": "<|tool>", "etd_token": "<tool|>",
    "stc_token": "<|tool_call>", "etc_token": "<tool_call|>", "str_token": "<|tool_response>",
    "etr_token": "<tool_response|>", "escape_token": '<|"|>', "model_max_length": 8192, "padding_side": "left",
    "tokenizer_class": "GemmaTokenizer",
}  # fmt: skip


def world_texts(count: int) -> list[str]:
    """Text of the world (the training side) to learn merges from."""
    import world

    rng = random.Random("tokenizer")
    texts = [q for t in world.TOPICS for q in t.train[:12]] + [t.answer for t in world.TOPICS for _ in range(4)]
    for _ in range(count):
        example = world.draw(rng, lambda s: s.split(), 300)
        texts.append(" ".join(text for text, _ in world.segments(example) if not text.startswith("<bos>")))
    for mark in SPECIAL:
        texts = [t.replace(mark, " ") for t in texts]
    return texts


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    build(world_texts(12_000)).save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


if __name__ == "__main__":
    import sys

    main(Path(sys.argv[1]))
