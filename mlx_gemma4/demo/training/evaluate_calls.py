"""Gives a model unseen tools and sentences and counts right calls, answers and JSON.

    python evaluate_calls.py FOLDER [--count 100] [--out ../results.json]

Owns: asking through this package's own `Chat` and `run_turn`, as a user would, and the report. Kinds: "call" (name and
all arguments), "call-answer" (that, and the answer to the result, to the last character), "no-call" (no call where no
tool serves; exact answers are reported beside it), "json" (the answer reads as the wanted object), "json-schema" (the
same under its schema as `response_format`), "function" (Python functions as tools, results as these give them).
"""

import argparse
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import calls
import forms
import talk

from mlx_gemma4 import Chat, load
from mlx_gemma4.sampling import Sampling
from mlx_gemma4.tools import Tool, run_turn

KINDS = ("call", "call-answer", "no-call", "json", "json-schema", "function")
LONGEST = 160


def forecast(city: str, day: str) -> dict:
    """The weather of a day."""
    return {"celsius": len(city) + len(day)}


def room_of(name: str) -> str:
    """The room of a person."""
    return f"{name} works in room {len(name)}."


def less(a: int, b: int) -> int:
    """Takes b from a."""
    return a - b


def _function(rng: random.Random) -> tuple[str, dict[str, Any], str]:
    """(question, arguments, answer) of one of the three functions, which no training knows."""
    kind, name = rng.randrange(3), talk.name(rng, True)
    city, day = rng.choice(talk.CITIES), rng.choice("Monday Friday Sunday".split())
    a, b = rng.randrange(100, 1000), rng.randrange(100)
    if kind == 0:
        given = {"city": city, "day": day}
        return f"What is the forecast for {city} on {day}?", given, f"The celsius is {len(city) + len(day)}."
    if kind == 1:
        return f"In which room is {name}?", {"name": name}, room_of(name)
    return f"Use less with a {a} and b {b}.", {"a": a, "b": b}, f"The answer is {a - b}."


def _plain(found: Any) -> Any:
    """A result as a tool returns it: JSON text in a message was an object."""
    return json.loads(found) if isinstance(found, str) and found.startswith("{") else found


def _asked(chat: Chat, question: str, tools: list[Any]) -> tuple[list[Any], str]:
    """(name and arguments of every call, or None for what cannot be read; the text said last)."""
    made, said = [], ""
    for event in run_turn(chat, question, tools, max_rounds=2):
        if event.kind == "tool_call":
            made.append((event.name, event.arguments))
        elif event.kind == "malformed":
            made.append(None)
        elif event.kind == "tool_result":
            said = ""
        elif event.kind == "text":
            said += event.text
    return made, said.strip()


def ask(chat: Chat, kind: str, talked: calls.Example) -> tuple[bool, bool, Any]:
    """(whether it counts, whether the words were right, too, what was said)."""
    question, wanted = talked.messages[0]["content"], talked.notes.get("wanted")
    if wanted is not None:
        schema = forms.schema_of(wanted) | {"additionalProperties": False}
        said = chat.send(question, response_format=schema if kind == "json-schema" else None)
        try:
            right = json.dumps(json.loads(said)) == json.dumps(wanted)  # types and the order of keys count, too
        except ValueError:
            right = False
        return right, right, said
    found = talked.messages[2]["content"] if kind == "call-answer" else "stop"
    tools = [Tool.from_declaration(d, lambda **_: _plain(found)) for d in talked.tools]
    made, said = _asked(chat, question, tools)
    if kind == "no-call":
        return not made, said == talked.answer, (made, said)
    function = talked.messages[1]["tool_calls"][0]["function"]
    right = made[:1] == [(function["name"], function["arguments"])]
    if kind == "call":
        return right, right, made
    words = said == talked.answer and len(made) == 1
    return right and words, words, (made, said)


def function_turn(chat: Chat, rng: random.Random) -> tuple[bool, bool, Any, str, Any]:
    """As `ask`, with the three functions; then the question and what was wanted."""
    question, given, answer = _function(rng)
    made, said = _asked(chat, question, [forecast, room_of, less])
    right = len(made) == 1 and made[0] is not None and made[0][1] == given
    return right and said == answer, said == answer, (made, said), question, (given, answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=2, help="which questions; the training itself looks at those of 1")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--thinking", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--show", type=int, default=2, help="wrong answers to print per kind")
    args = parser.parse_args()
    model, tokenizer = load(args.folder)
    greedy = Sampling.from_defaults(tokenizer.generation_defaults, temperature=0.0, max_tokens=LONGEST)
    report = {}
    for kind in args.kinds.split(","):
        begin, shown, good, parts, words = time.time(), 0, 0, Counter(), 0
        rng = random.Random(f"functions/{args.seed}")
        made: list[calls.Example | None] = [None] * args.count
        if kind != "function":
            made = [*calls.test_set(kind.removesuffix("-schema"), args.count, args.seed)]
        for talked in made:
            chat = Chat(model, tokenizer, sampling=greedy, thinking=args.thinking)
            if talked is None:
                right, exact, said, question, wanted = function_turn(chat, rng)
                side = kind
            else:
                right, exact, said = ask(chat, kind, talked)
                question, side, wanted = talked.messages[0]["content"], talked.notes["side"], talked.messages[1:]
            good, words = good + right, words + exact
            parts[side, right] += 1
            if not right and shown < args.show:
                shown += 1
                print(f"  {kind}: {question!r}\n    said {said!r}\n    not  {wanted!r}")
        report[kind] = {"questions": args.count, "right": good, "accuracy": round(good / args.count, 4)}
        if kind in ("no-call", "call-answer"):
            report[kind]["answers right"] = words
        sides = sorted({side for side, _ in parts})
        if len(sides) > 1:
            report[kind]["parts"] = {s: f"{parts[s, True]} of {parts[s, True] + parts[s, False]}" for s in sides}
        print(kind, json.dumps(report[kind]), f"{time.time() - begin:.0f} s", flush=True)
    if args.out:  # kinds asked in another call stay in the file
        whole = json.loads(args.out.read_text()) if args.out.exists() else {"kinds": {}}
        whole["kinds"] |= report
        args.out.write_text(json.dumps(whole, indent=2) + "\n")


if __name__ == "__main__":
    main()
