"""The training's tools and JSON: the template that writes them, what is learnt from them, and what only the test asks.

Needs no model. The expected texts are those of the published E2B and E4B template, written out.
"""

import json
import random

import pytest
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


def test_json_is_what_the_schema_says(calls):
    import forms
    import jsonschema

    for talked in calls.test_set("json", 80):
        wanted = json.loads(talked.answer)
        assert list(wanted.items()) == list(talked.notes["wanted"].items())
        jsonschema.validate(wanted, forms.schema_of(wanted))
