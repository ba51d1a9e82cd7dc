"""What a conversation computes again, turn after turn, beside mlx-lm's server and mlx-vlm's chat; sessions in files.

    python -m benchmarks.sessions [--parts turns tools file] [--out benchmarks/results]

Owns the conversations, one process per side and case, and three files: sessions-turns.csv and sessions-tools.csv count
prompt tokens, which no machine changes; sessions-file.csv has times. Random tiny checkpoints with the published
templates (`tests/tiny.py`), whose sliding windows of 16 are passed many times; `checkpoint.py`'s for the times.

What a random model says means nothing and does not come back as the same tokens, so every side is given its answers
where it samples, the same ones: a thought, if it thinks, words, <turn|>. All else is the runtime's own, at its
defaults: mlx-lm's server is asked over HTTP and gets its own messages back, mlx-vlm is its chat's class.
"""

import argparse
import contextlib
import csv
import io
import itertools
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmarks.checkpoint import write_checkpoint
from mlx_gemma4 import Chat, load
from mlx_gemma4.events import Done, ToolCall
from mlx_gemma4.generation import generate_step
from mlx_gemma4.sampling import Sampling
from mlx_gemma4.tokenizer import Tokenizer

TESTS = Path(__file__).resolve().parent.parent / "tests"
TEMPLATES = {"e2b": "E2B-E4B", "26b-a4b": "12B-26B-31B"}
TURNS, STEPS = 20, 40
STOP, TOOL_STOP = 106, 50  # <turn|>, <|tool_response>
WORDS = "the model looks at what was said before and computes only what is new in this turn of it all ".split()
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks something up.",
        "parameters": {"type": "object", "properties": {"what": {"type": "string"}}, "required": ["what"]},
    },
}
# Of the conversation that is saved: tokens, and what its checkpoint is stored and computed in. On a CPU, MLX reads
# prompts fastest in bfloat16, so this is the hardest rival for a file.
LONG, DTYPE = 4096, "bfloat16"


# Checkpoints and conversations


def write_tiny(folder: Path, family: str) -> Path:
    """A random checkpoint every side loads, with towers, a processor's settings and the published template."""
    import tiny
    import tiny_26b

    tiny.make_tiny(folder, family, dtype="float32", towers=True, sliding_window=16, max_position_embeddings=65536)
    shutil.copy(template(family), folder / "chat_template.jinja")
    (folder / "processor_config.json").write_text(json.dumps(tiny_26b.PROCESSOR))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    named = {"image": "<|image|>", "boi": "<|image>", "eoi": "<image|>"}
    named |= {"audio": "<|audio|>", "boa": "<|audio>", "eoa": "<audio|>"}
    settings |= {f"{name}_token": token for name, token in named.items()}
    settings |= {"processor_class": "Gemma4Processor", "extra_special_tokens": ["<|video|>"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def template(family: str) -> Path:
    return TESTS / "fixtures" / "chat_template" / f"chat_template.{TEMPLATES[family]}.jinja"


def picture(path: Path) -> Path:
    import numpy as np
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 96, 3), np.uint8)).save(path)
    return path


def words(turn: int, count: int) -> str:
    return f"{turn}: " + " ".join(WORDS[(turn + i) % len(WORDS)] for i in range(count))


SYSTEM = words(99, 60)


def question(turn: int) -> str:
    return words(turn, 8 + turn % 9)


def replies(tokenizer: Tokenizer, thinking: bool, tools: bool) -> list[list[int]]:
    """The tokens of each answer, in order."""
    out = []
    opened = tools and opens_thoughts(tokenizer, thinking)
    for n in range(STEPS + 1 if tools else TURNS):
        text = "" if opened and n else "<|channel>thought\n"
        text = f"{text}{words(n + 3, 12 + n % 5)}\n<channel|>" if thinking else ""
        calls = tools and n < STEPS
        text += f'<|tool_call>call:look{{what:<|"|>thing {n}<|"|>}}<tool_call|>' if calls else words(n + 7, 9 + n % 8)
        out.append([*tokenizer.encode(text, add_special_tokens=False), TOOL_STOP if calls else STOP])
    return out


def opens_thoughts(tokenizer: Tokenizer, thinking: bool) -> bool:
    """Whether the template begins the thought itself after a tool's result, as that of the larger models does."""
    call = {"id": "0", "type": "function", "function": {"name": "look", "arguments": {"what": "it"}}}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    messages.append({"role": "tool", "tool_call_id": "0", "name": "look", "content": "this"})
    ids = tokenizer.apply_chat_template(messages, tools=[TOOL], add_generation_prompt=True, enable_thinking=thinking)
    return tokenizer.decode(ids).endswith("<|channel>thought\n")


class Script:
    """A sampler that says the answers given to it, the next one from each `begin` on."""

    def __init__(self, answers: list[list[int]]):
        self._answers = iter(answers)

    def begin(self) -> "Script":
        self._left = iter(next(self._answers))
        return self

    def __call__(self, logprobs: mx.array) -> mx.array:
        # Loops compute a step ahead: after the end they ask once more.
        return mx.array([next(self._left, STOP)])


@dataclass(frozen=True)
class Scripted(Sampling):
    """Ours takes a sampler through its settings."""

    script: Script | None = None

    def sampler(self) -> Any:
        return self.script


# Sides, each in a process of its own; rows are (prompt tokens, those computed, generated) per answer


def ours(case: dict[str, Any]) -> dict[str, Any]:
    model, tokenizer = load(case["folder"], towers=True, dtype="float32")
    script = Script(replies(tokenizer, case["thinking"], case["tools"]))
    sampling = Scripted(temperature=0.0, script=script)
    tools = [TOOL] if case["tools"] else []
    chat = Chat(model, tokenizer, system=SYSTEM, thinking=case["thinking"], sampling=sampling, tools=tools)
    rows, worst = [], 0.0
    if case["tools"]:
        script.begin()
        events = list(chat.stream(question(0)))
        for step in range(STEPS):
            rows.append(counts(chat))
            (call,) = [e for e in events if isinstance(e, ToolCall)]
            assert call.arguments == {"what": f"thing {step}"}
            script.begin()
            events = list(chat.stream_results([(call, words(step, 30))]))
        assert isinstance(events[-1], Done) and events[-1].reason == "stop"
        rows.append(counts(chat))
        worst = difference(chat)
    else:
        for turn in range(TURNS):
            script.begin()
            chat.send(question(turn), images=[case["image"]] if case["image"] and turn == 0 else [])
            rows.append(counts(chat))
            if turn % 5 == 4:
                worst = max(worst, difference(chat))
    return {"rows": rows, "held": chat.context_used, "difference": worst}


def counts(chat: Chat, *reasons: str) -> tuple[int, int, int]:
    stats = chat.stats
    assert stats is not None and stats.finish_reason in (reasons or ("stop", "tool_calls"))
    return stats.prompt_tokens, stats.prompt_tokens - stats.cached_tokens, stats.generation_tokens


def difference(chat: Chat) -> float:
    """Largest difference of the log-probabilities after one more question, from the memory and computed afresh."""

    def after(chat: Chat, warm: bool) -> mx.array:
        tools = [t.declaration if hasattr(t, "declaration") else t for t in chat.tools]
        prompt = chat._prompt([*chat.messages, {"role": "user", "content": "and?"}], bool(chat.thinking), tools)
        if not warm:
            chat._memory.forget()
        cached = chat._memory.reuse(prompt.keys)
        assert (cached > 0) == warm
        media = chat.senses.encode(prompt, cached)
        tokens = mx.array(prompt.ids[cached:])
        return next(generate_step(tokens, chat._model, prompt_cache=chat._memory.cache, media=media))[1]

    return float(mx.max(mx.abs(after(chat.fork(), True) - after(chat.fork(), False))))


def mlx_vlm_chat(case: dict[str, Any]) -> dict[str, Any]:
    """`mlx_vlm.chat`'s class, driven as its loop drives it; the counts are those of its own last chunk."""
    from mlx_vlm import chat as module

    last: list[Any] = []
    stream = module.stream_generate

    def noted(*args: Any, **kwargs: Any) -> Iterator[Any]:
        chunk = None
        for chunk in stream(*args, **kwargs):
            yield chunk
        last.append(chunk)

    module.stream_generate = noted
    script = Script(replies(Tokenizer.from_folder(case["folder"]), case["thinking"], False))
    options = {"enable_thinking": case["thinking"], "sampler": script}
    rows, fed = [], [0]
    with contextlib.redirect_stdout(io.StringIO()):
        chat = module.MLXVisionChat(case["folder"], temperature=0.0, max_tokens=1000, **options)
        count_positions(chat.model.language_model, fed)
        chat.add_to_history("system", SYSTEM)
        for turn in range(TURNS):
            if case["image"] and turn == 0 and not chat.process_image(case["image"]):
                raise SystemExit("mlx-vlm did not take the picture")
            chat.add_to_history("user", question(turn))
            script.begin()
            chat.add_to_history("assistant", chat.generate_response())
            said = last[-1]
            computed = said.prompt_tokens - said.cached_tokens
            # What it says it computed is what its model was fed, less its own tokens.
            assert computed <= fed[0] <= computed + said.generation_tokens + 1, (fed, computed, said.generation_tokens)
            rows.append((said.prompt_tokens, computed, said.generation_tokens))
            fed[0] = 0
    return {"rows": rows}


def count_positions(model: Any, fed: list[int]) -> None:
    kind = type(model)
    call = kind.__call__

    def counted(self: Any, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        fed[0] += (inputs if inputs is not None else kwargs["inputs_embeds"]).shape[1]
        return call(self, inputs, *args, **kwargs)

    kind.__call__ = counted


def serve(case: dict[str, Any]) -> None:
    """mlx-lm's server on `case["port"]`, each request's answer given."""
    from mlx_lm import server

    script = Script(replies(Tokenizer.from_folder(case["folder"]), case["thinking"], case["tools"]))
    server._make_sampler = lambda args, tokenizer: script.begin()
    sys.argv = ["mlx_lm.server", "--model", case["folder"], "--port", str(case["port"])]
    server.main()


def mlx_lm_server(case: dict[str, Any]) -> dict[str, Any]:
    """A client of that server: what it answers goes into the history as it came, and tokens are as it reports them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    server = subprocess.Popen(side("serve", case | {"port": port}), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def ask(path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        return json.load(opener.open(f"http://127.0.0.1:{port}{path}", data, timeout=300))

    messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]
    rows = []
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                ask("/health")
                break
            if server.poll() is not None:
                raise SystemExit(f"mlx-lm's server ended: {server.stderr and server.stderr.read().decode()[-2000:]}")
            time.sleep(0.2)
        for turn in range(STEPS + 1 if case["tools"] else TURNS):
            if case["tools"] and turn:
                (call,) = messages[-1]["tool_calls"]
                content = words(turn - 1, 30)
                messages.append({"role": "tool", "tool_call_id": call["id"], "name": "look", "content": content})
            else:
                messages.append({"role": "user", "content": question(turn)})
            body: dict[str, Any] = {"messages": messages, "max_tokens": 1000, "temperature": 0.0}
            body["chat_template_kwargs"] = {"enable_thinking": case["thinking"]}
            if case["tools"]:
                body["tools"] = [TOOL]
            answer = ask("/v1/chat/completions", body)
            usage = answer["usage"]
            cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
            rows.append((usage["prompt_tokens"], usage["prompt_tokens"] - cached, usage["completion_tokens"]))
            messages.append(answer["choices"][0]["message"])
    finally:
        server.terminate()
        server.communicate()
    return {"rows": rows}


def side(name: str, case: dict[str, Any]) -> list[str]:
    return [sys.executable, "-m", "benchmarks.sessions", "--side", name, "--case", json.dumps(case)]


def run_side(name: str, case: dict[str, Any]) -> dict[str, Any]:
    out = subprocess.run(side(name, case), stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


# Parts


def turns() -> Iterator[dict[str, Any]]:
    """Conversations of 20 turns: tokens computed, on every side."""
    for family, image, thinking in itertools.product(TEMPLATES, (False, True), (False, True)):
        with tempfile.TemporaryDirectory() as name:
            case: dict[str, Any] = {"folder": str(write_tiny(Path(name), family)), "thinking": thinking}
            case |= {"tools": False, "image": str(picture(Path(name) / "picture.png")) if image else None}
            about = {"checkpoint": family, "thinking": thinking, "image_in_turn_1": image}
            for who in ("ours", "mlx-lm server", "mlx-vlm chat"):
                if image and who == "mlx-lm server":
                    continue  # its Gemma 4 has no towers
                yield about | {"side": who} | totals(run_side(who, case))


def tools() -> Iterator[dict[str, Any]]:
    """A question, 40 calls with their results, and an answer: tokens computed, ours and mlx-lm's."""
    for family, thinking in itertools.product(TEMPLATES, (False, True)):
        with tempfile.TemporaryDirectory() as name:
            case = {"folder": str(write_tiny(Path(name), family)), "thinking": thinking, "tools": True, "image": None}
            for who in ("ours", "mlx-lm server"):
                found = run_side(who, case)
                row = {"checkpoint": family, "thinking": thinking, "side": who} | totals(found)
                fed = row["computed"] + row["generated"]
                # The last answer's end is sampled and not fed.
                row["computed_twice"] = round(fed / (found["rows"][-1][0] + found["rows"][-1][2]) - 1, 4)
                yield row


def totals(found: dict[str, Any]) -> dict[str, Any]:
    """prompts: tokens of all prompts together, what a runtime without any reuse computes."""
    prompts, computed, generated = (sum(row[i] for row in found["rows"]) for i in range(3))
    last = found["rows"][-1][0]
    return {
        "prompts": prompts,
        "last_prompt": last,
        "computed": computed,
        "computed_over_prompts": round(computed / prompts, 4),
        "computed_over_last_prompt": round(computed / last, 3),
        "generated": generated,
        "logprobs_off_a_cold_prefill": f"{found['difference']:.1e}" if "difference" in found else "",
        "computed_per_turn": " ".join(str(row[1]) for row in found["rows"]),
    }


def file(rounds: int) -> Iterator[dict[str, Any]]:
    """A conversation of 4,096 tokens saved, its process killed, and gone on with in new ones: against reading it."""
    for shape, family in (("e-family", "e2b"), ("moe", "26b-a4b")):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "model"
            write_checkpoint(folder, shape, "plain", DTYPE)
            from tiny import write_tokenizer

            write_tokenizer(folder, 8192)
            shutil.copy(template(family), folder / "chat_template.jinja")
            case = {"folder": str(folder), "file": str(Path(name) / "talk.safetensors")}
            saving = subprocess.run(side("save", case), stdout=subprocess.PIPE, text=True)
            assert saving.returncode == -signal.SIGKILL, saving.returncode
            about = json.loads(saving.stdout)
            took: dict[str, list[dict[str, Any]]] = {"cold": [], "loaded": []}
            for number in range(rounds):
                order = list(took)
                for how in order[:: 1 if number % 2 == 0 else -1]:
                    took[how].append(run_side(how, case))
            cold, loaded = (min(took[how], key=lambda t: t["cpu_seconds"]) for how in took)
            pairs = list(zip(took["loaded"], took["cold"], strict=True))
            assert {t["prompt"] for one in took.values() for t in one} == {cold["prompt"]}
            row = {"checkpoint": shape, "computes_in": DTYPE, **about, "rounds": rounds}
            row |= {"prompt": cold["prompt"], "cold_computed": cold["computed"], "loaded_computed": loaded["computed"]}
            for clock in ("seconds", "cpu_seconds"):
                row |= {f"cold_{clock}": round(cold[clock], 3), f"loaded_{clock}": round(loaded[clock], 3)}
                ratios = [a[clock] / b[clock] for a, b in pairs]
                row[f"{clock}_ratio"] = round(statistics.median(ratios), 4)
                row[f"{clock}_ratio_highest"] = round(max(ratios), 4)
            yield row


def save_and_die(case: dict[str, Any]) -> None:
    """Reads a conversation of LONG tokens with one short answer, saves it, and is killed."""
    model, tokenizer = load(case["folder"], dtype=DTYPE)
    per_word = len(tokenizer.encode(words(1, 400))) / 400
    chat = Chat(model, tokenizer, sampling=Sampling(temperature=0.0, max_tokens=16))
    chat.send(words(1, int((LONG - 40) / per_word)))
    begin = time.perf_counter()
    chat.save(case["file"])
    took = time.perf_counter() - begin
    held = {"positions": chat.context_used, "save_seconds": round(took, 3)}
    held |= {"cache_bytes": chat.cache_bytes, "file_bytes": Path(case["file"]).stat().st_size}
    print(json.dumps(held), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def first_token(case: dict[str, Any], loaded: bool) -> dict[str, Any]:
    """Seconds from the file, or from the bare messages, to the first token of the next answer; the model is warm."""
    model, tokenizer = load(case["folder"], dtype=DTYPE)
    one = Sampling(temperature=0.0, max_tokens=1)
    Chat(model, tokenizer, sampling=one).send("hello")
    told = [] if loaded else Chat.load(case["file"], model, tokenizer).messages
    begin = time.perf_counter(), time.process_time()
    if loaded:
        chat = Chat.load(case["file"], model, tokenizer, sampling=one)
    else:
        chat = Chat(model, tokenizer, sampling=one)
        chat.messages = told
    chat.send("and then?")
    took = time.perf_counter() - begin[0], time.process_time() - begin[1]
    prompt, computed, _ = counts(chat, "length")
    return {"seconds": took[0], "cpu_seconds": took[1], "prompt": prompt, "computed": computed}


SIDES = {
    "ours": ours,
    "mlx-lm server": mlx_lm_server,
    "mlx-vlm chat": mlx_vlm_chat,
    "cold": lambda case: first_token(case, loaded=False),
    "loaded": lambda case: first_token(case, loaded=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=("turns", "tools", "file"), default=("turns", "tools", "file"))
    parser.add_argument("--rounds", type=int, default=3, help="of the part with times")
    parser.add_argument("--out", type=Path, help="folder for sessions-*.csv")
    parser.add_argument("--side", choices=(*SIDES, "serve", "save"), help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    if args.side == "serve":
        serve(args.case)
    elif args.side == "save":
        save_and_die(args.case)
    elif args.side:
        print(json.dumps(SIDES[args.side](args.case)))
    if args.side:
        return
    parts = {"turns": turns, "tools": tools, "file": lambda: file(args.rounds)}
    for part in args.parts:
        rows = []
        for row in parts[part]():
            rows.append(row)
            print(row, flush=True)
        if args.out:
            with (args.out / f"sessions-{part}.csv").open("w", newline="") as out:
                writer = csv.DictWriter(out, rows[0])
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()
