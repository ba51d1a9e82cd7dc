"""The training's tools and JSON: the template that writes them, what is learnt from them, and what only the test asks.

Needs no model. The expected texts are those of the published E2B and E4B template, written out.
"""

import json
import random

import pytest
import tokenizers
from training_world import training_modules

from mlx_gemma4 import demo
from mlx_gemma4.errors import TokenizerError
from mlx_gemma4.template import render
from mlx_gemma4.tokenizer import Tokenizer
from mlx_gemma4.tools import Tool

TOOL = {"type": "function", "function": {"name": "order", "description": "Orders.", "parameters": {
    "type": "object", "required": ["what"], "properties": {
        "what": {"type": "string", "description": "A thing.", "enum": ["tea", "rice"]},
        "Count": {"type": "integer", "nullable": True}, "fast": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}},
        "to": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}}}  # fmt: skip
DECLARED = (
    '<|tool>declaration:order{description:<|"|>Orders.<|"|>,parameters:{properties:{Count:{nullable:true,type:<|"|>'
    'INTEGER<|"|>},fast:{type:<|"|>BOOLEAN<|"|>},tags:{items:{maxLength:3,type:<|"|>STRING<|"|>},type:<|"|>ARRAY<|"|>},'
    'to:{properties:{city:{type:<|"|>STRING<|"|>}},required:[<|"|>city<|"|>],type:<|"|>OBJECT<|"|>},what:{description:'
    '<|"|>A thing.<|"|>,enum:[<|"|>tea<|"|>,<|"|>rice<|"|>],type:<|"|>STRING<|"|>}},required:[<|"|>what<|"|>],type:'
    '<|"|>OBJECT<|"|>}}<tool|>'
)
CALL = {
    "id": "c",
    "function": {"name": "order", "arguments": {"what": "tea", "Count": 2, "fast": True, "to": {"a": None}}},
}
CALLED = '<|tool_call>call:order{Count:2,fast:true,to:{a:null},what:<|"|>tea<|"|>}<tool_call|>'
ASKED = {"role": "user", "content": " Tea! "}
CALLING = {"role": "assistant", "content": "", "reasoning_content": "Order.", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c", "content": '{"ok": true}'}
RESPONDED = '<|tool_response>response:order{value:<|"|>{"ok": true}<|"|>}<tool_response|>'
HEAD = f"<bos><|turn>system\n<|think|>\n{DECLARED}<turn|>\n<|turn>user\nTea!<turn|>\n<|turn>model\n"
THOUGHT = "<|channel>thought\nOrder.\n<channel|>"
NATIVE = [{"name": "order", "response": {"b": "x", "a": 1.5}}]


@pytest.fixture(scope="module")
def calls():
    """The training's tools."""
    with training_modules("calls") as found:
        yield found["calls"]


@pytest.fixture(scope="module")
def source():
    return (demo.path() / "chat_template.jinja").read_text()


def written(source, messages, tools=None, thinking=False, prompt=False):
    return render(source, messages=messages, tools=tools, enable_thinking=thinking, bos_token="<bos>",
                  add_generation_prompt=prompt)  # fmt: skip


@pytest.mark.parametrize(
    ("messages", "prompt", "rest"),
    [
        ([ASKED], True, ""),
        ([ASKED, CALLING], True, THOUGHT + CALLED + "<|tool_response>"),
        ([ASKED, CALLING, RESULT], True, THOUGHT + CALLED + RESPONDED + "<|channel>thought\n"),
        ([ASKED, CALLING, RESULT, {"role": "assistant", "content": "Done."}], False,
         THOUGHT + CALLED + RESPONDED + "Done.<turn|>\n"),
        ([ASKED, CALLING, RESULT, CALLING, {**RESULT, "content": 3}, {"role": "assistant", "content": "Done."}], False,
         THOUGHT + CALLED + RESPONDED + THOUGHT + CALLED + RESPONDED.replace('<|"|>{"ok": true}<|"|>', "3")
         + "Done.<turn|>\n"),
        ([ASKED, CALLING, RESULT, {"role": "assistant", "content": "Done."}, ASKED], True,
         CALLED + RESPONDED + "Done.<turn|>\n<|turn>user\nTea!<turn|>\n<|turn>model\n"),
        ([ASKED, {**CALLING, "tool_responses": NATIVE}], False,
         THOUGHT + CALLED + '<|tool_response>response:order{a:1.5,b:<|"|>x<|"|>}<tool_response|>'),
    ],
)  # fmt: skip
def test_template_writes_tools_as_published(source, messages, prompt, rest):
    assert written(source, messages, [TOOL], True, prompt) == HEAD + rest


@pytest.mark.parametrize(
    ("thinking", "told", "head"),
    [
        (False, False, "<bos>"),
        (True, False, "<bos><|turn>system\n<|think|>\n<turn|>\n"),
        (False, True, "<bos><|turn>system\ns<turn|>\n"),
        (True, True, "<bos><|turn>system\n<|think|>\ns<turn|>\n"),
    ],
)
def test_template_writes_pictures_and_leaves_out_thoughts(source, thinking, told, head):
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    answer = {"role": "assistant", "content": "<|channel>thought\nx<channel|> y "}
    messages = [{"role": "system", "content": " s "}] * told + [{"role": "user", "content": parts}, answer, ASKED]
    tail = "<|turn>user\nTea!<turn|>\n<|turn>model\n"
    want = head + "<|turn>user\na<|image|>b<turn|>\n<|turn>model\ny<turn|>\n" + tail
    assert written(source, messages, None, thinking, True) == want


def test_template_refuses_arguments_as_text(source):
    call = {"function": {"name": "order", "arguments": "{}"}}
    with pytest.raises(TokenizerError, match="must be an object"):
        written(source, [ASKED, {"role": "assistant", "tool_calls": [call]}])


def test_training_sees_what_the_template_writes(calls, source):
    tokenizer = Tokenizer.from_folder(demo.path())

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    rng = random.Random(4)
    for i in range(300):
        talked = calls.example(rng, i % 3 == 0)
        text = written(source, talked.messages, talked.tools, talked.thinking)
        parts = list(calls.segments(talked))
        assert "".join(part for part, _ in parts) == text
        ids, own = calls.encode_example(talked, encode)
        assert ids == encode(text) and len(own) == len(ids)
        learnt = "".join(part for part, mine in parts if mine)
        assert learnt.endswith(("<turn|>", "<tool_call|><|tool_response>"))
        assert "response:" not in learnt and "<|tool>" not in learnt
    ids, own = next(calls.rows("x", 512, encode))
    assert len(ids) == len(own) == 512 and any(own) and not all(own)


def test_declarations_are_the_package_s(calls):
    rng = random.Random(5)
    for talked in (calls.example(rng, False, False, "call") for _ in range(100)):
        for tool in talked.tools:
            assert Tool.from_declaration(tool).declaration == tool


def test_test_side_is_not_in_the_training(calls):
    import toolbox

    rng = random.Random(6)

    def words(talked):
        return {t["function"]["name"].removeprefix("get_").removeprefix("find_") for t in talked.tools}

    names, wordings = set(), set()
    for _ in range(3000):
        talked = calls.example(rng, False)
        names |= words(talked)
        wordings |= {m["content"] for m in talked.messages if m["role"] == "user"}
    assert not names & toolbox.HELD_TOOLS
    pool = {t.name for t in toolbox.POOL}
    for kind in calls.KINDS:
        for talked in calls.test_set(kind, 60):
            assert not (words(talked) - pool) & names
            assert talked.messages[0]["content"] not in wordings


def test_tools_of_plain_words(calls):
    """Those of the test are made of nouns and verbs that no training tool has; a question leads to its arguments."""
    import invented
    import toolbox

    rng = random.Random(7)
    trained = [toolbox.named(rng, False) for _ in range(2000)]
    tested = [toolbox.named(rng, True) for _ in range(200)]
    words = {w for t in trained for w in (t.about + " " + t.name.replace("_", " ")).rstrip(".").lower().split()}
    kept = {w for w in invented.NOUNS + invented.VERBS if invented.held(w)}
    assert 15 < len(kept) < 50 and kept & words <= {"word"}  # a kind of value, too
    assert all(kept & set(t.name.split("_")) for t in tested)
    for tool in tested + trained:
        question, given = toolbox.asked(tool, rng, tool in tested)
        assert set(given) == set(tool.takes) and all(str(v) in question for v in given.values())


def test_where_words_are_copied_from(calls):
    import copying

    tokenizer = tokenizers.Tokenizer.from_file(str(demo.path() / "tokenizer.json"))
    texts = copying.texts_of([tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())])
    assert texts[2] == texts[106] == "\n"

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    def shown(*parts):
        ids = [i for text, _ in parts for i in encode(text)]
        own = [float(mine) for text, mine in parts for _ in encode(text)]
        found = copying.copies(ids, own, texts)
        assert all(own[at + 1] and max(sources) <= at for at, sources in found.items())
        return [(texts[ids[at + 1]], [texts[ids[s]] for s in sources]) for at, sources in found.items()]

    # A word in pieces comes from one place, piece by piece; one that is not there from nowhere.
    pieces = [texts[i] for i in encode("zorbakti")]
    assert len(pieces) > 2
    assert shown(("<bos>zorbakti, 31", False), ("zorbakti 4", True)) == [(p, [p]) for p in pieces]
    # Numbers only whole, digit by digit.
    assert shown(("<bos>12 and 21, 2 ", False), ("21", True)) == [("2", ["2"]), ("1", ["1"])]
    # Of several places the one behind the same word; words of every sentence nowhere else.
    assert shown(("<bos>Ada the box. Ben the bag. ", False), ("Ben the bike", True))[-1:] == [(" the", [" the"])]
    # Nothing from the conversation before.
    assert shown(("<bos>zorbakti", False), ("<bos>", False), ("zorbakti", True)) == []
    # All that a call says stands in its row, but for what stands for something else.
    rng = random.Random(8)
    for talked in (calls.example(rng, False, False, "call") for _ in range(100)):
        ids, own = calls.encode_example(talked, encode)
        copied = {at + 1 for at in copying.copies(ids, own, texts)}
        rest = "".join(texts[i] for n, i in enumerate(ids) if own[n] and n not in copied)
        function = talked.messages[-1]["tool_calls"][0]["function"]
        for word in (function["name"], *map(str, function["arguments"])):
            assert word.strip("_") not in rest.replace("call:", "") or len(word) < 3


def test_json_is_what_the_schema_says(calls):
    import forms
    import jsonschema

    for talked in calls.test_set("json", 80):
        wanted = json.loads(talked.answer)
        assert list(wanted.items()) == list(talked.notes["wanted"].items())
        jsonschema.validate(wanted, forms.schema_of(wanted))
