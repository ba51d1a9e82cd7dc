"""Conversations that are not read twice: what each turn computes again, and sessions in files, forks and edits."""

import json
import subprocess
import sys

import mlx.core as mx
import pytest
from scripted import ScriptedModel
from test_chat_media import TEMPLATES, load_tiny
from test_media_prompt import picture
from tiny import write_tokenizer

from mlx_gemma4 import Chat
from mlx_gemma4.chat import ToolCall
from mlx_gemma4.errors import Gemma4Error, UsageError
from mlx_gemma4.generation import generate_step
from mlx_gemma4.sampling import Sampling
from mlx_gemma4.tokenizer import Tokenizer

OPENING = 8  # <|turn>model\n<|channel>thought\n<channel|> and the like, in tokens
FEW = Sampling(temperature=0.0, max_tokens=9)
WORDS = "the model looks at what was said before and computes only what is new in this turn ".split()
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks something up.",
        "parameters": {"type": "object", "properties": {"what": {"type": "string"}}, "required": ["what"]},
    },
}


@pytest.fixture(scope="module", params=["e2b", "26b-a4b"])
def loaded(tmp_path_factory, request):
    return load_tiny(tmp_path_factory.mktemp(request.param), request.param)


def question(turn: int, words: int = 12) -> str:
    return f"{turn}: " + " ".join(WORDS[(turn + i) % len(WORDS)] for i in range(words))


def next_logprobs(chat: Chat, warm: bool) -> mx.array:
    """Of the token after one more question, from the chat's memory or computed afresh; the chat stays as it is."""
    chat = chat.fork()
    prompt = chat._prompt([*chat.messages, {"role": "user", "content": "and?"}], bool(chat.thinking), ())
    if not warm:
        chat._memory.forget()
    cached = chat._memory.reuse(prompt.keys)
    media = chat.senses.encode(prompt, cached)
    steps = generate_step(mx.array(prompt.ids[cached:]), chat._model, prompt_cache=chat._memory.cache, media=media)
    return next(steps)[1]


def computed(chat: Chat) -> int:
    return chat.stats.prompt_tokens - chat.stats.cached_tokens


@pytest.mark.parametrize("thinking", [False, True])
def test_a_turn_reads_its_message_and_the_answer_before(loaded, thinking):
    chat = Chat(*loaded, system=question(99, 80), thinking=thinking, sampling=FEW, prefill_step_size=64)
    before, previous = 0, 0
    for turn in range(20):
        chat.send(question(turn))
        new = chat.stats.prompt_tokens - before
        # The answer comes with the opening of its turn, which the next prompt writes without an empty thought.
        assert computed(chat) <= new + previous + OPENING, turn
        before, previous = chat.stats.prompt_tokens, chat.stats.generation_tokens
    assert chat.stats.prompt_tokens > 600 > 16 * 8  # windows of 8, passed many times
    difference = mx.abs(next_logprobs(chat, warm=True) - next_logprobs(chat, warm=False)).max().item()
    assert difference < 1e-4


def test_an_edited_message_goes_back_to_the_turn_before(loaded):
    chat = Chat(*loaded, sampling=FEW)
    for turn in range(5):
        chat.send(question(turn))
    chat.messages[6:] = []  # from the fourth question on
    prefix = len(chat._prompt(chat.messages[:5], False, (), generation_prompt=False))
    chat.send("something else")
    assert chat.stats.cached_tokens >= prefix
    assert mx.abs(next_logprobs(chat, True) - next_logprobs(chat, False)).max().item() < 1e-4


def test_a_long_system_prompt_outlives_the_history(loaded):
    chat = Chat(*loaded, system=question(1, 200), sampling=FEW)
    for turn in range(3):
        chat.send(question(turn))
    chat.messages.clear()
    chat.send("a new start")
    assert chat.stats.cached_tokens > 300 and computed(chat) < 40


def test_ways_back_stay_within_their_bytes(loaded):
    chat = Chat(*loaded, sampling=FEW, snapshot_bytes=1)
    for turn in range(4):
        chat.send(question(turn))
        assert len(chat._memory.marks) == 1
    one = chat.snapshot_bytes
    chat = Chat(*loaded, sampling=FEW, snapshot_bytes=3 * one)
    for turn in range(8):
        chat.send(question(turn))
        assert chat.snapshot_bytes <= 3 * one
    assert len(chat._memory.marks) == 3


def test_a_fork_goes_its_own_way(loaded):
    chat = Chat(*loaded, sampling=FEW)
    chat.send("one", images=[picture()])
    twin = chat.fork()
    answers = [c.send(text) for c, text in ((chat, "two"), (twin, "three"), (chat, "four"), (twin, "four"))]
    assert twin.stats.cached_tokens > 60 and len(chat.messages) == len(twin.messages) == 6
    alone = Chat(*loaded, sampling=FEW)
    alone.messages = [dict(m) for m in twin.messages[:4]]
    assert alone.send("four") == answers[3]
    for c in (chat, twin):
        assert mx.abs(next_logprobs(c, True) - next_logprobs(c, False)).max().item() < 1e-4


# Files

GO_ON = """
import json, sys
from mlx_gemma4 import Chat, load
model, tokenizer = load(sys.argv[1], towers=True, dtype="float32")
chat = Chat.load(sys.argv[2], model, tokenizer)
answer = chat.send("and?")
print(json.dumps([answer, chat.stats.prompt_tokens, chat.stats.cached_tokens, chat.system, len(chat.messages)]))
"""


@pytest.mark.parametrize("kv_bits", [None, 4])
def test_a_saved_conversation_goes_on_in_another_process(tmp_path, kv_bits):
    loaded = load_tiny(tmp_path / "model", "26b-a4b", head_dim=64, global_head_dim=128)
    chat = Chat(*loaded, system=question(7, 90), sampling=FEW, kv_bits=kv_bits)
    chat.send("look", images=[picture()])
    chat.send("and then?")
    file = tmp_path / "talk.safetensors"
    chat.save(file)
    out = subprocess.run(
        [sys.executable, "-c", GO_ON, tmp_path / "model", file], capture_output=True, text=True, check=True
    )
    answer, prompt, cached, system, count = json.loads(out.stdout)
    assert [answer, system, count] == [chat.send("and?"), chat.system, 6]
    assert (prompt, cached) == (chat.stats.prompt_tokens, chat.stats.cached_tokens) and cached > prompt - 130


def test_a_file_of_other_weights_or_settings_is_refused(loaded, tmp_path):
    chat = Chat(*loaded, sampling=FEW)
    chat.send("hello")
    file = tmp_path / "talk.safetensors"
    chat.save(file)
    name = "e2b" if chat.senses.hears else "26b-a4b"
    others = load_tiny(tmp_path / "other", name), load_tiny(tmp_path / "wide", name, sliding_window=16)
    changed, wide = others
    layer = changed[0].layers[0].mlp.gate_proj
    layer.weight = layer.weight * 1.01
    for model, tokenizer in (changed, wide):
        with pytest.raises(Gemma4Error, match="saved by another model") as e:
            Chat.load(file, model, tokenizer)
        assert "\n" not in str(e.value)
    with pytest.raises(Gemma4Error, match="not there or cannot be read"):
        Chat.load(tmp_path / "none.safetensors", *loaded)
    with pytest.raises(UsageError, match=r"must end in \.safetensors"):
        chat.save(tmp_path / "talk.json")
    again = Chat.load(file, *loaded)
    assert again.messages == chat.messages and again.context_used == chat.context_used


def test_settings_given_at_load_go_before_the_saved_ones(tmp_path):
    loaded = load_tiny(tmp_path / "model", "e2b", head_dim=64, global_head_dim=128)
    chat = Chat(*loaded, sampling=FEW, kv_bits=4)
    chat.send("hello")
    chat.save(tmp_path / "talk.safetensors")
    with pytest.raises(Gemma4Error, match=r"was saved with .* bits 4"):
        Chat.load(tmp_path / "talk.safetensors", *loaded, kv_bits=3)
    assert Chat.load(tmp_path / "talk.safetensors", *loaded, thinking=True).thinking


# Tools


class CallingModel(ScriptedModel):
    """Says `replies[n]` after n tool results."""

    def _next(self, ids):
        results, opened = self.tokenizer.token_id("<tool_response|>"), self.tokenizer.encode("<|turn>model\n", False)
        count = ids.count(results)
        begin = max(len(ids) - ids[::-1].index(results) if count else 0, _after(ids, opened))
        reply = [*self.tokenizer.encode(self.replies[count], False), 50 if "call:" in self.replies[count] else 106]
        # The prompt may have opened the thought, or closed an empty one, already.
        said = ids[begin:]
        empty = self.tokenizer.encode("<|channel>thought\n<channel|>", False)
        said = said[len(empty) :] if said[: len(empty)] == empty else said
        return reply[len(said)] if len(said) < len(reply) else 0


def _after(ids, part):
    return next((i + len(part) for i in reversed(range(len(ids))) if ids[i : i + len(part)] == part), 0)


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("thinking", [False, True])
def test_a_chain_of_calls_is_read_once(tmp_path, family, thinking):
    """40 calls in a row: at most 5 % of the tokens are computed twice."""
    from pathlib import Path

    write_tokenizer(tmp_path)
    source = Path(__file__).parent / "fixtures" / "chat_template" / f"chat_template.{TEMPLATES[family]}.jinja"
    vocabulary = (tmp_path / "tokenizer.json").read_text()
    tokenizer = Tokenizer(vocabulary, chat_template=source.read_text(), eos_token_ids=[1, 106, 50])
    thought = "<|channel>thought\nlook it up\n<channel|>" if thinking else ""
    replies = [f'{thought}<|tool_call>call:look{{what:<|"|>thing {i}<|"|>}}<tool_call|>' for i in range(40)]
    model = CallingModel(tokenizer, [*replies, f"{thought}done"], 8, 100_000)
    chat = Chat(model, tokenizer, sampling=Sampling(temperature=0.0), tools=[TOOL], thinking=thinking)
    events, total = list(chat.stream("find all things")), 0
    for i in range(40):
        total += computed(chat) + chat.stats.generation_tokens
        (call,) = [e for e in events if isinstance(e, ToolCall)]
        assert call.arguments == {"what": f"thing {i}"} and events[-1].reason == "tool_calls"
        events = list(chat.stream_results([(call, question(i, 30))]))
    total += computed(chat) + chat.stats.generation_tokens
    assert events[-1].reason == "stop" and chat.messages[-1]["content"] == "done"
    assert total <= 1.05 * chat.context_used
