"""Tool calls: out of tokens, whatever their arguments hold; into messages, token for token as the template has them.

Shapes of `tool_cases.py` against what they mean, and against what mlx-lm and mlx-vlm make of them; any call there and
back; any damage. TOOL_CALL_CASES=100000 runs that many of each of the last two instead of a few thousand.
"""

import json
import os
import random
import re
from collections import Counter
from importlib import metadata, util
from pathlib import Path

import pytest
from optional import missing
from test_turns import encodings, published, tokenizer  # noqa: F401 (a fixture)
from tool_cases import (
    CLOSE,
    MALFORMED,
    OPEN,
    QUOTE,
    RESPONSE,
    SHAPES,
    SPELLED,
    TOLERATED,
    TOOLS,
    TURN_END,
    Encoder,
    any_call,
    damaged,
    tool,
)

from mlx_gemma4.call_grammar import TRIES, write
from mlx_gemma4.errors import UsageError
from mlx_gemma4.events import Malformed, Text, Thought, ToolCall
from mlx_gemma4.tool_calls import call_message, decode_arguments, result_message
from mlx_gemma4.turns import TurnParser, render

CASES = int(os.environ.get("TOOL_CALL_CASES", "3000"))
PARTS = 4  # so that the workers of pytest-xdist share them
USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def encoder(tokenizer):  # noqa: F811
    return Encoder(tokenizer)


@pytest.fixture(scope="module")
def say(tokenizer):  # noqa: F811
    """Events of a text, special tokens by name; thoughts and texts joined."""

    def events(text, tools=None, prompt="<|turn>model\n"):
        encode = lambda t: tokenizer.encode(t, add_special_tokens=False)  # noqa: E731
        return joined(TurnParser.after_prompt(tokenizer, encode(prompt), tools), encode(text))

    return events


def joined(parser, ids):
    found = []
    for event in [e for token in ids for e in parser.feed(token)] + parser.finish():
        if found and isinstance(event, Text | Thought) and type(found[-1]) is type(event):
            event = type(event)(found.pop().text + event.text)
        found.append(event)
    return found


def same(a, b):
    """Equal values of equal types: 1 is not 1.0, nor True; -0.0 is not 0.0."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


# Shapes


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(tokenizer, shape):  # noqa: F811
    text, name, arguments = SHAPES[shape]
    raw = f"<|tool_call>{text}<tool_call|>"
    for ids in encodings(tokenizer, raw):
        (call,) = joined(TurnParser(tokenizer), [*ids, RESPONSE])
        assert (call.name, call.raw) == (name, raw) and same(call.arguments, arguments), ids
        assert bool(call.notes) == (write(name, arguments) != text)


# What the peers read wrong, in the versions that were studied.
OFTEN = {"colons in the name", "dash in a key", "single quotes and a comma", "quote tokens inside a string"}
PEERS = {
    "mlx_lm": ("0.32.2", "tool_parsers/gemma4.py", OFTEN),
    "mlx_vlm": ("0.7.10", "tools/parsers/gemma4.py", OFTEN - {"colons in the name", "dash in a key"}),
}


@pytest.mark.parametrize("peer", PEERS)
def test_shapes_in_other_parsers(peer):
    """The same texts in the peers' parsers: what they read, we read alike."""
    version, file, wrong = PEERS[peer]
    package = util.find_spec(peer)
    path = Path(package.origin).parent / file if package and package.origin else None
    if path is None or not path.is_file():
        pytest.skip(missing(f"{peer} with its Gemma 4 parser", "dev"))
    # The file alone: the package would import all of transformers.
    spec = util.spec_from_file_location(f"{peer}_gemma4", path)
    parser = util.module_from_spec(spec)
    spec.loader.exec_module(parser)
    right = set()
    for shape, (text, name, arguments) in SHAPES.items():
        try:
            call = parser.parse_tool_call(text)
        except ValueError:  # json's, too
            continue
        made = call["arguments"]
        made = json.loads(made) if isinstance(made, str) else made
        if call["name"] == name and same(made, arguments):
            right.add(shape)
    if metadata.version(peer.replace("_", "-")) == version:
        assert right == set(SHAPES) - wrong
    assert right >= set(SHAPES) - OFTEN


# Variants


@pytest.mark.parametrize("case", TOLERATED)
def test_variants_are_read_and_noted(say, case):
    text, name, arguments, words = TOLERATED[case]
    raw = f"<|tool_call>{text}<tool_call|>"
    for end in ("<|tool_response>", "<turn|>", "after"):
        call, *rest = say(raw + end, TOOLS)
        assert (call.name, call.raw) == (name, raw) and same(call.arguments, arguments), call
        assert all(word in " ".join(call.notes) for word in words.split()), call.notes
        assert rest == ([Text("after")] if end == "after" else [])


@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        ('call:mcp.fs:read-file{:1,a:b:2,my path:<|"|>/x<|"|>,{:{},,x:[]}', "mcp.fs:read-file", None),
        ("call:mcp.fs:read-file{a:b:{a:b:1}}", "mcp.fs:read-file", "error"),  # nothing is declared inside
    ],
)
def test_the_declaration_says_what_a_key_is(say, text, name, arguments):
    (event,) = say(f"<|tool_call>{text}<tool_call|><|tool_response>", TOOLS)
    if arguments == "error":
        assert isinstance(event, Malformed)
    else:
        assert event.name == name and event.arguments == {"": 1, "a:b": 2, "my path": "/x", "{": {}, ",x": []}
    (event,) = say(f"<|tool_call>{text}<tool_call|><|tool_response>")
    assert isinstance(event, Malformed)  # without a declaration nobody can know


def test_a_declared_key_in_nested_schemas(say):
    inner = {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"x:y": {}}}]}
    tools = [tool("f", a={"type": "array", "items": inner}, b={"type": "object", "additionalProperties": inner})]
    (call,) = say("<|tool_call>call:f{a:[{x:y:1},null],b:{k:{x:y:2}}}<tool_call|>", tools)
    assert call.arguments == {"a": [{"x:y": 1}, None], "b": {"k": {"x:y": 2}}} and call.notes == ()


def test_calls_of_any_name_without_a_declaration(say):
    (call,) = say("<|tool_call>call:google:mcp:x/y.z{a:1}<tool_call|><|tool_response>")
    assert call == ToolCall("google:mcp:x/y.z", {"a": 1}, "<|tool_call>call:google:mcp:x/y.z{a:1}<tool_call|>")
    (call,) = say("<|tool_call>call:f{a:1}<tool_call|>", ["f", "g"])  # names alone will do
    assert call.name == "f" and call.notes == ()
    assert isinstance(say("<|tool_call>call:f{a:1}<tool_call|>", [])[0], Malformed)


def test_tools_need_names(tokenizer):  # noqa: F811
    with pytest.raises(UsageError, match="no name"):
        TurnParser(tokenizer, tools=[{"type": "function", "function": {}}])


def test_quote_token_typed_letter_by_letter_is_text(tokenizer, encoder):  # noqa: F811
    arguments = {"a": '<|"|>},<tool_call|>', "b": "x"}
    ids = encoder.call("f", arguments, random.Random(1))
    assert ids.count(QUOTE) == 4
    (call,) = joined(TurnParser(tokenizer), ids)
    assert call.arguments == arguments


# Rows, places, ends


def test_text_and_thoughts_around_calls(say):
    a, b = "<|tool_call>call:add{a:1}<tool_call|>", "<|tool_call>call:add{a:2}<tool_call|>"
    events = say(f"<|channel>thought\nhm\n<channel|>Now{a}{b}\nthen<|tool_response>", TOOLS)
    calls = [ToolCall("add", {"a": 1}, a), ToolCall("add", {"a": 2}, b)]
    assert events == [Thought("hm"), Text("Now"), *calls, Text("\nthen")]
    # After a tool's result with thinking on, the prompt ends inside the thought.
    events = say(f"hm\n<channel|>{a}", TOOLS, prompt="<tool_response|><|channel>thought\n")
    assert events == [Thought("hm"), calls[0]]


def test_several_calls_in_one_block(say):
    text = '<|tool_call>call:add{a:1}call:add{a:2},\ncall:note{text:<|"|>call:add{a:3}<|"|>}<tool_call|>'
    events = say(text + "<|tool_response>", TOOLS)
    assert [(e.name, e.arguments) for e in events] == [
        ("add", {"a": 1}),
        ("add", {"a": 2}),
        ("note", {"text": "call:add{a:3}"}),
    ]
    assert all("several calls in one block" in e.notes for e in events)
    assert "".join(e.raw for e in events) == text


def test_a_call_is_told_when_it_ends(tokenizer):  # noqa: F811
    parser = TurnParser(tokenizer)
    ids = tokenizer.encode('<|tool_call>call:f{a:<|"|>x<|"|>}<tool_call|>', add_special_tokens=False)
    for token in ids[:-1]:
        assert parser.feed(token) == [] and parser.state == "call"
    assert [e.kind for e in parser.feed(ids[-1])] == ["tool_call"] and parser.state == "text"


def test_a_call_token_that_closes_nothing_is_not_told(tokenizer):  # noqa: F811
    euro = [tokenizer.token_id(f"<0x{b:02X}>") for b in "€".encode()]
    assert joined(TurnParser(tokenizer), [*euro, CLOSE, *euro]) == [Text("€€")]
    # Two halves around it are no character.
    assert joined(TurnParser(tokenizer), [*euro[:2], CLOSE, euro[2]]) == [Text("\ufffd" * 3)]
    call = tokenizer.encode("call:add{a:1", add_special_tokens=False)
    (call,) = joined(TurnParser(tokenizer, tools=TOOLS), [*call, tokenizer.token_id("<0x7D>"), CLOSE])
    assert call.raw == "call:add{a:1}<tool_call|>"


@pytest.mark.parametrize("end", ["<|tool_response>", "<turn|>", "<eos>", ""])
def test_a_call_that_is_never_closed(say, end):
    (call,) = say('<|tool_call>call:note{text:<|"|>x<|"|>}' + end, TOOLS)
    assert call.arguments == {"text": "x"} and call.notes == ("<tool_call|> missing",)
    one, two = say("<|tool_call>call:add{a:1}<|tool_call>call:add{a:2}" + end, TOOLS)
    assert (one.arguments, two.arguments) == ({"a": 1}, {"a": 2}) and one.raw == "<|tool_call>call:add{a:1}"


@pytest.mark.parametrize("end", ["<|tool_response>", "<turn|>", ""])
def test_a_truncated_call_is_malformed_at_every_length(tokenizer, end):  # noqa: F811
    text = '<|tool_call>call:note{o:{a:[1,2]},tags:[<|"|>x<|"|>],text:<|"|>it is <b> 🍎<|"|>}'
    ids, last = tokenizer.encode(text, add_special_tokens=False), tokenizer.token_id(end)
    for n in range(1, len(ids)):
        parser = TurnParser(tokenizer, tools=TOOLS)
        (event,) = joined(parser, ids[:n] + [last] * bool(end))
        assert isinstance(event, Malformed) and event.raw == tokenizer.decode(ids[:n]), n
        assert parser.stopped == bool(end) and "\n" not in event.error


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(say, case):
    text, error = MALFORMED[case]
    raw = f"<|tool_call>{text}<tool_call|>"
    (event,) = say(raw + "<|tool_response>", TOOLS)
    assert isinstance(event, Malformed) and event.raw == raw
    assert re.search(error, event.error), event.error
    # The turn goes on after it.
    assert say(f"{raw}So.<|tool_call>call:add{{a:1}}<tool_call|><turn|>", TOOLS)[1:] == [
        Text("So."),
        ToolCall("add", {"a": 1}, "<|tool_call>call:add{a:1}<tool_call|>"),
    ]


def test_a_lost_quote_takes_no_other_call_with_it(say):
    bad, good = '<|tool_call>call:note{text:<|"|>x}<tool_call|>', "<|tool_call>call:add{a:1}<tool_call|>"
    one, text, two = say(f"{bad}and{good}<|tool_response>", TOOLS)
    assert isinstance(one, Malformed) and one.raw == bad
    assert text == Text("and") and two == ToolCall("add", {"a": 1}, good)


def test_time_is_linear_in_call_tokens(say):
    """A model gone wild in a string: each call token could be the end."""
    events = say('<|tool_call>call:note{text:<|"|>' + "<tool_call|>}" * 3000, TOOLS)
    assert isinstance(events[0], Malformed)
    events = say("<|tool_call>call:note{tags:[" + '<|"|>a<|"|>,' * 10 * TRIES + "!}<tool_call|>", TOOLS)
    assert isinstance(events[0], Malformed)


def test_a_call_in_a_thought(say):
    call = "<|tool_call>call:add{a:1}<tool_call|>"
    # Goes on thinking: it only thought of calling.
    events = say(f"<|channel>thought\nI could\n{call}\nor not\n<channel|>4", TOOLS)
    assert events == [Thought(f"I could\n{call}\nor not"), Text("4")]
    assert say(f"<|channel>thought\n{call}<channel|>4", TOOLS) == [Thought(call), Text("4")]
    # Stops: it forgot to close the thought.
    for end in ("<|tool_response>", "<turn|>"):
        thought, one, two = say(f"<|channel>thought\nLet's go.\n{call}\n{call}{end}", TOOLS)
        assert thought == Thought("Let's go.") and one.arguments == two.arguments == {"a": 1}
        assert one.notes == ("the thought was not closed before the call",)
    assert say(f"<|channel>{call}<turn|>", TOOLS)[0].kind == "tool_call"
    # Cut off in it, or by a limit before the turn's end: nobody knows, so nothing is called.
    assert say(f"<|channel>thought\nhm\n{call}", TOOLS) == [Thought(f"hm\n{call}")]
    cut = "<|channel>thought\nhm\n<|tool_call>call:add{a:"
    assert [e.kind for e in say(cut, TOOLS)] == ["thought"]
    assert [e.kind for e in say(cut + "<|tool_response>", TOOLS)] == ["thought", "malformed"]


def test_a_call_without_its_token(say):
    text = 'call:note{text:<|"|>x<|"|>}'
    for before in ("", "<|channel>thought\nhm\n<channel|>"):
        *_, call = say(f"{before}{text}<|tool_response>", TOOLS)
        assert call == ToolCall("note", {"text": "x"}, text, notes=("<|tool_call> missing", "<tool_call|> missing"))
    assert say(f"\n{text}<tool_call|><|tool_response>", TOOLS)[1].raw == f"{text}<tool_call|>"
    assert say("call:add{a:<|tool_response>", TOOLS)[0].kind == "malformed"
    for words in (
        f"{text} calls it.<turn|>",
        "call:other{}<turn|>",
        "call:add",
        "call me<turn|>",
        f"So: {text}<turn|>",
    ):
        said = words.removesuffix("<turn|>")
        assert say(words, TOOLS) == [Text(said)]
    assert say(f"{text}<turn|>") == [Text(text)]  # no tools, no call


@pytest.mark.parametrize(
    "after", ["<turn|>", "<|channel>thought\n<turn|>", "<|tool_call>call:add{a:2}<tool_call|>", ""]
)
def test_a_call_without_its_token_in_bytes(tokenizer, after):  # noqa: F811
    """What the detokenizer held back may begin the call, and end it."""
    ids = [tokenizer.token_id(f"<0x{b:02X}>") for b in b"call:add{a:1}"]
    ids += tokenizer.encode(after, add_special_tokens=False)
    call, *rest = joined(TurnParser(tokenizer, tools=TOOLS), ids)
    assert (call.arguments, call.raw) == ({"a": 1}, "call:add{a:1}")
    assert [e.arguments for e in rest] == ([{"a": 2}] if "add" in after else [])


def test_a_prompt_may_begin_the_call(say, tokenizer):  # noqa: F811
    prompt = '<|turn>model\n<|channel>thought\nold\n<channel|><|tool_call>call:note{text:<|"|>a'
    for before in encodings(tokenizer, prompt, count=4):
        for ids in encodings(tokenizer, 'b<|"|>}<tool_call|><|tool_response>', count=4):
            (call,) = joined(TurnParser.after_prompt(tokenizer, before, TOOLS), ids)
            assert call.arguments == {"text": "ab"} and call.notes == ()


def test_what_a_tool_said_is_no_state(say):
    prompt = (
        '<|turn>model\n<|tool_call>call:f{}<tool_call|><|tool_response>response:f{value:<|"|>{}<|"|>}<tool_response|>'
    )
    for nasty in ("<|channel>thought\n", "<|tool_call>call:add{", "<|turn>model\n<|channel>"):
        assert say("4<turn|>", TOOLS, prompt.replace("{}<", nasty + "<")) == [Text("4")]


# There and back


@pytest.mark.parametrize("part", range(PARTS))
def test_any_call_survives(tokenizer, encoder, part):  # noqa: F811
    for seed in range(part, CASES, PARTS):
        rng = random.Random(seed)
        name, arguments, tools = any_call(rng)
        text = write(name, arguments)
        streams = [encoder.call(name, arguments, rng)]
        # The template's text, tokenized: special names in strings are special tokens there.
        spelled = text.count(SPELLED[0]) > streams[0].count(QUOTE)
        if not spelled and not any(token in text for token in ("\u2581", *SPELLED[1:])):
            streams.append(encoder.call(name, arguments))
        for ids in streams:
            (call,) = joined(TurnParser(tokenizer, tools=tools), [*ids, RESPONSE])
            assert isinstance(call, ToolCall) and call.name == name, (seed, call)
            assert same(call.arguments, arguments) and call.raw == f"<|tool_call>{text}<tool_call|>", (seed, call)
            assert all("call tokens inside a string" in note for note in call.notes), (seed, call.notes)


@pytest.mark.parametrize("template", ["E2B-E4B", "12B-26B-31B"])
def test_write_is_the_template(tokenizer, template):  # noqa: F811
    """The renderer the round trip uses, `call_message` and the published templates agree to the letter."""
    checkpoint = published(tokenizer, template)
    for seed in range(300):
        rng = random.Random(seed)
        calls = [ToolCall(*any_call(rng)[:2], raw="") for _ in range(rng.randint(1, 3))]
        text = checkpoint.apply_chat_template([USER, call_message(calls)], tokenize=False)
        said = "".join(f"<|tool_call>{write(c.name, c.arguments)}<tool_call|>" for c in calls)
        assert text.endswith(f"<|turn>model\n{said}<|tool_response>"), seed


# Damage


@pytest.mark.parametrize("part", range(PARTS))
def test_no_damage_makes_a_wrong_call(tokenizer, encoder, part):  # noqa: F811
    """A call without notes is what was written, to the letter; and no event is lost, invented or out of order."""
    count = Counter()
    for seed in range(part, CASES, PARTS):
        rng = random.Random(seed)
        name, arguments, tools = any_call(rng)
        sound = [*encoder.call(name, arguments, rng), rng.choice([RESPONSE, TURN_END])]
        ids = damaged(sound, rng)
        tools = tools if rng.random() < 0.7 else None
        parser = TurnParser(tokenizer, tools=tools)
        events = joined(parser, ids)
        said = iter(tokenizer.decode(ids))
        for event in events:
            raw = event.text if isinstance(event, Text | Thought) else event.raw
            assert all(char in said for char in raw), (seed, event)  # in this order; what frames a thought is left out
            if isinstance(event, ToolCall) and not event.notes:
                assert event.raw == f"<|tool_call>{write(event.name, event.arguments)}<tool_call|>", (seed, event)
                assert tools is None or event.name in [t["function"]["name"] for t in tools], (seed, event)
            if isinstance(event, ToolCall):
                right = event.name == name and same(event.arguments, arguments)
                count["call as before" if right else f"another call, {event.notes or 'as written'}"] += 1
            else:
                count[event.kind] += 1
        # Until the call's end nothing is text.
        if ids[:1] == [OPEN] and CLOSE not in ids and OPEN not in ids[1:]:
            assert not any(isinstance(e, Text) for e in events), seed
    print(part, count.most_common(12))  # pytest -rP shows what became of them


# Messages


def test_messages_render_as_the_template_has_them(tokenizer):  # noqa: F811
    checkpoint = published(tokenizer, "12B-26B-31B")
    calls = [ToolCall("f", {"b": 1, "a": "x"}, "", id="k1"), ToolCall("g", {}, "", id="k2")]
    results = [result_message(calls[0], "18C"), result_message(calls[1], 2.5)]
    text = checkpoint.apply_chat_template(
        [USER, call_message(calls, "Sure.", "hm"), *results], tokenize=False, add_generation_prompt=False
    )
    assert text.partition("Hi<turn|>\n")[2] == (
        '<|turn>model\n<|channel>thought\nhm\n<channel|><|tool_call>call:f{a:<|"|>x<|"|>,b:1}<tool_call|>'
        '<|tool_call>call:g{}<tool_call|><|tool_response>response:f{value:<|"|>18C<|"|>}<tool_response|>'
        "<|tool_response>response:g{value:2.5}<tool_response|>Sure.<turn|>\n"
    )


def test_results_without_ids_keep_their_names(tokenizer):  # noqa: F811
    checkpoint = published(tokenizer, "E2B-E4B")
    calls = [ToolCall("f", {}, ""), ToolCall("g", {}, "")]
    text = checkpoint.apply_chat_template(
        [USER, call_message(calls), *(result_message(c, None) for c in calls)], tokenize=False
    )
    assert "response:f{value:null}" in text and "response:g{value:null}" in text


@pytest.mark.parametrize(
    ("result", "written"),
    [
        ("a", '{value:<|"|>a<|"|>}'),
        (True, "{value:true}"),
        (None, "{value:null}"),
        ({"t": 1, "é": [None]}, '{value:<|"|>{"t": 1, "é": [null]}<|"|>}'),
        ([1, "a"], '{value:<|"|>[1, "a"]<|"|>}'),
        ([], '{value:<|"|>[]<|"|>}'),
        ([{"type": "text", "text": "see"}, {"type": "image"}], '{value:<|"|>see<|"|>}<tool_response|><|image|>'),
    ],
)
def test_results(tokenizer, result, written):  # noqa: F811
    call = ToolCall("f", {}, "", id="k")
    messages = [USER, call_message([call]), result_message(call, result)]
    for template in ("E2B-E4B", "12B-26B-31B"):
        text = published(tokenizer, template).apply_chat_template(messages, tokenize=False)
        assert f"<|tool_response>response:f{written}" in text


def test_a_result_that_json_lacks():
    with pytest.raises(UsageError, match="result of f is no JSON value"):
        result_message(ToolCall("f", {}, ""), {"a": {1, 2}})


def test_openai_arguments_are_decoded(tokenizer):  # noqa: F811
    openai = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function"}]}
    openai["tool_calls"][0]["function"] = {"name": "f", "arguments": '{"b": 1, "a": "x"}'}
    messages = decode_arguments([USER, openai])
    assert isinstance(openai["tool_calls"][0]["function"]["arguments"], str)  # nothing given was changed
    large = published(tokenizer, "12B-26B-31B")
    same_call = call_message([ToolCall("f", {"b": 1, "a": "x"}, "")])
    assert render(large, messages, False) == render(large, [USER, same_call], False)
    openai["tool_calls"][0]["function"]["arguments"] = ""
    assert decode_arguments([openai])[0]["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize("arguments", ["{", "[1]", "[" * 100_000, 3])
def test_openai_arguments_that_are_none(arguments):
    call = {"id": "1", "function": {"name": "f", "arguments": arguments}}
    with pytest.raises(UsageError, match="arguments of the call of f"):
        decode_arguments([{"role": "assistant", "tool_calls": [call]}])
    with pytest.raises(UsageError, match="no name"):
        decode_arguments([{"role": "assistant", "tool_calls": [{"id": "1"}]}])
