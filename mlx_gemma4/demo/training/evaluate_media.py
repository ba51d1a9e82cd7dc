"""Shows a model unseen pictures, sounds and clips and counts right answers.

    python evaluate_media.py FOLDER [--count 100] [--out ../results.json]

Owns: asking through this package's own `Chat`, as a user would, and the report. Words count only when right to the last
character. Boxes count when all that was asked for is there, with the right label and an overlap (IoU) of 0.5 or more.
"""

import argparse
import json
import time
from pathlib import Path

import judging
import media
import sounds

from mlx_gemma4 import Chat, load
from mlx_gemma4.media.items import Item, MediaSettings, audio_item
from mlx_gemma4.media.video import load_video
from mlx_gemma4.sampling import Sampling

LONGEST = 220  # tokens of an answer; five boxes have 130


def sources(talk: media.Dialog) -> dict[str, list]:
    """The media of a conversation as arguments of `Chat.send`: pictures, samples, and clips as a list of frames."""
    out: dict[str, list] = {"images": [], "videos": [], "audio": []}
    for item in talk.items:
        if item.kind == "image":
            out["images"].append(item.source.image)
        elif item.kind == "video":
            clip = item.source
            video = load_video(list(clip.frames), rate=1 / clip.seconds[1])
            out["videos"].append(Item("video", "clip", video.frames, video.stamps))
        else:
            sound = item.source.sound if hasattr(item.source, "frames") else item.source
            out["audio"].append(audio_item(sound.samples, sounds.RATE))
    return out


def ask(model, tokenizer, talk: media.Dialog, budget: int) -> str:
    """The answer to a conversation's one question."""
    greedy = Sampling.from_defaults(tokenizer.generation_defaults, temperature=0.0, max_tokens=LONGEST)
    chat = Chat(model, tokenizer, sampling=greedy, media=MediaSettings(image_tokens=budget))
    question = media.MARKS.sub("", talk.example.messages[0]["content"])
    return chat.send(question, **sources(talk))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=2, help="which media; the training itself looks at those of 1")
    parser.add_argument("--kinds", default=",".join(media.KINDS))
    parser.add_argument("--budget", type=int, default=70, help="soft tokens of a picture")
    parser.add_argument("--frames", type=int, default=0, help="of each clip; 0: two to six")
    parser.add_argument("--held", action="store_true", help="only colours with shapes that the training never showed")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--name", default="", help="put behind each kind in the report")
    parser.add_argument("--show", type=int, default=2, help="wrong answers to print per kind")
    args = parser.parse_args()
    model, tokenizer = load(args.folder, towers=True)
    report = {}
    for kind in args.kinds.split(","):
        begin, good, shown = time.time(), 0, 0
        for talk in media.test_set(kind, args.count, args.seed, args.budget, args.held, args.frames):
            said, wanted = ask(model, tokenizer, talk, args.budget), talk.example.answer
            if judging.right(kind, said, wanted):
                good += 1
            elif shown < args.show:
                shown += 1
                print(f"  {kind}: {talk.example.messages[0]['content']!r}\n    said {said!r}\n    not  {wanted!r}")
        report[kind + args.name] = {"questions": args.count, "right": good, "accuracy": round(good / args.count, 4)}
        print(kind, json.dumps(report[kind + args.name]), f"{time.time() - begin:.0f} s", flush=True)
    if args.out:
        whole = json.loads(args.out.read_text()) if args.out.exists() else {"kinds": {}}
        whole["kinds"] |= report
        args.out.write_text(json.dumps(whole, indent=2) + "\n")


if __name__ == "__main__":
    main()
