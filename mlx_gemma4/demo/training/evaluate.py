"""Asks a model the unseen questions and counts exact answers.

    python evaluate.py FOLDER [--torch] [--count 250] [--out results.json] [--kinds facts,sums]

Owns: greedy decoding of the test sets and the report. By default FOLDER runs in mlx-gemma4 itself (the figures in the
model card); with --torch the float32 checkpoint runs in transformers. An answer counts only when it is the expected
text to the last character; the thought before it may differ.
"""

import argparse
import json
import time
from pathlib import Path

import world

CLOSE, END = "<channel|>", "<turn|>"


def mlx_answers(folder: str):
    """(encode, reply) of our own package. reply(prompt ids, longest answer, leading ids that other prompts share)."""
    import mlx.core as mx

    from mlx_gemma4 import cache, load, stream_generate

    model, tokenizer = load(folder)
    read: dict = {"ids": None}

    def reply(ids: list[int], limit: int, shared: int) -> str:
        if shared and read["ids"] == ids[:shared]:
            cache.restore(read["cache"], read["snapshot"])
        elif shared:
            read.update(ids=ids[:shared], cache=model.make_cache())
            for at in range(0, shared, 512):
                mx.eval(model(mx.array([ids[at : min(at + 512, shared)]]), cache=read["cache"]))
            read["snapshot"] = cache.snapshot(read["cache"])
        options = {"prompt_cache": read["cache"]} if shared else {}
        out = [r.token for r in stream_generate(model, tokenizer, ids[shared:], max_tokens=limit, **options)]
        return tokenizer.decode(out, skip_special_tokens=False)

    return lambda text: tokenizer.encode(text, add_special_tokens=False), reply


def torch_answers(folder: str):
    """The same with transformers, from the float32 checkpoint."""
    import model as small
    import torch
    from tokenizers import Tokenizer

    torch.set_num_threads(1)
    net, tokenizer = small.load(Path(folder)), Tokenizer.from_file(f"{folder}/tokenizer.json")

    def reply(ids: list[int], limit: int, shared: int) -> str:
        with torch.no_grad():
            made = net.generate(
                torch.tensor([ids]), max_new_tokens=limit, do_sample=False, eos_token_id=small.EOS, pad_token_id=0
            )
        return tokenizer.decode(made[0, len(ids) :].tolist(), skip_special_tokens=False)

    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids, reply


def split(reply: str) -> tuple[str, str]:
    """(thought, answer) of a reply as it was generated."""
    reply = reply.split(END)[0]
    head, mark, tail = reply.rpartition(CLOSE)
    return (head, tail) if mark else ("", reply)


def prompt_of(example: world.Example, encode) -> list[int]:
    """Token ids up to the last model turn, as the chat template ends a prompt."""
    ids: list[int] = []
    parts = list(world.segments(example))[:-2]
    for text, _ in parts:
        ids += encode(text)
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("--count", type=int, default=250)
    parser.add_argument("--seed", type=int, default=2, help="which questions; the training itself looks at those of 1")
    parser.add_argument("--kinds", default=",".join(world.TEST_KINDS))
    parser.add_argument("--out")
    parser.add_argument("--show", type=int, default=3, help="wrong answers to print per kind")
    args = parser.parse_args()
    encode, reply = torch_answers(args.folder) if args.torch else mlx_answers(args.folder)
    report = {}
    for kind in args.kinds.split(","):
        begin, right, shown, parts = time.time(), 0, 0, {}
        examples = world.test_set(kind, args.count, encode, args.seed)
        for example in examples:
            shared = len(encode("<bos><|turn>user\n" + example.notes["text"])) if "text" in example.notes else 0
            said = reply(prompt_of(example, encode), 220, shared)
            good = split(said)[1] == example.answer and (END in said or not args.torch)
            right += good
            if part := example.notes.get("rule"):
                hit, all_ = parts.get(part, (0, 0))
                parts[part] = (hit + good, all_ + 1)
            if not good and shown < args.show:
                shown += 1
                asked = example.messages[-2]["content"][-90:]
                print(f"  {kind}: {asked!r}\n    said {said!r}\n    not  {example.answer!r}")
        report[kind] = {"questions": len(examples), "right": right, "accuracy": round(right / len(examples), 4)}
        if parts:
            report[kind]["parts"] = {k: f"{a} of {b}" for k, (a, b) in sorted(parts.items())}
        print(kind, json.dumps(report[kind]), f"{time.time() - begin:.0f} s", flush=True)
    if args.out:  # kinds asked in another call stay in the file
        out = Path(args.out)
        whole = json.loads(out.read_text()) if out.exists() else {"kinds": {}}
        whole["kinds"] |= report
        out.write_text(json.dumps(whole, indent=2) + "\n")


if __name__ == "__main__":
    main()
