"""Answers of a given form: valid whatever the model would rather say, after a thought or without, however few tokens
there are."""

import json
import random
import re
import sys
from pathlib import Path

import jsonschema
import mlx.core as mx
import numpy as np
import pytest
from llguidance import LLMatcher
from schemas import NODE, SCHEMAS, tell, thing
from scripted import ScriptedModel
from tiny import make_tiny

from mlx_gemma4 import Chat, load
from mlx_gemma4.endings import Endings
from mlx_gemma4.errors import Gemma4Error, UsageError
from mlx_gemma4.events import Done, Text, Thought, ToolCall
from mlx_gemma4.generation import generate_step
from mlx_gemma4.guides import mask_rows
from mlx_gemma4.sampling import Sampling
from mlx_gemma4.structured import GrammarGuide, grammar_for
from mlx_gemma4.tokenizer import Tokenizer

TEMPLATES = Path(__file__).parent / "fixtures" / "chat_template"
LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks.",
        "parameters": thing({"what": {"type": "string", "maxLength": 9}}),
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny(folder, layer_types=["sliding_attention", "full_attention"], num_kv_shared_layers=0)
    return load(str(folder), dtype="float32")[0], (folder / "tokenizer.json").read_text()


@pytest.fixture(scope="module", params=["E2B-E4B", "12B-26B-31B"])
def loaded(model, request):
    template = (TEMPLATES / f"chat_template.{request.param}.jinja").read_text(encoding="utf-8")
    return model[0], Tokenizer(model[1], chat_template=template, eos_token_ids=[1, 106, 50])


@pytest.fixture
def tokenizer(loaded):
    return loaded[1]


def prompt_for(tokenizer, thinks):
    return tokenizer.apply_chat_template([{"role": "user", "content": "the model"}], enable_thinking=thinks)


def said(events, kind=Text):
    return "".join(e.text for e in events if isinstance(e, kind))


# JSON of a schema


@pytest.mark.parametrize("thinks", [False, True])
@pytest.mark.parametrize("name", SCHEMAS)
def test_answers_of_a_random_model_are_valid(model, name, thinks):
    kind = "E2B-E4B" if len(name) % 2 else "12B-26B-31B"
    template = (TEMPLATES / f"chat_template.{kind}.jinja").read_text(encoding="utf-8")
    tokenizer = Tokenizer(model[1], chat_template=template, eos_token_ids=[1, 106, 50])
    most = 100 + 20 * (len(name) % 4)
    events, tokens = tell(
        model[0], tokenizer, prompt_for(tokenizer, thinks), SCHEMAS[name], thinks=thinks, budget=12, most=most
    )
    assert len(tokens) <= most
    assert bool(said(events, Thought)) == thinks and {type(e) for e in events} <= {Text, Thought}
    if thinks:
        assert tokens.index(101) - tokens.index(100) <= 12 + 8
    jsonschema.validate(json.loads(said(events)), SCHEMAS[name])


def test_a_thought_without_a_budget_leaves_room_for_the_answer(loaded):
    model, tokenizer = loaded
    events, tokens = tell(model, tokenizer, prompt_for(tokenizer, True), SCHEMAS["form"], thinks=True, most=300)
    jsonschema.validate(json.loads(said(events)), SCHEMAS["form"])
    assert 150 < tokens.index(101) <= 300 - 75  # a random model closes nothing by itself


def test_too_few_tokens_for_any_answer_are_refused_before_the_prompt_is_read(loaded):
    model, tokenizer = loaded
    with pytest.raises(UsageError, match=r"takes \d+ tokens and 20 are allowed; raise max_tokens"):
        tell(model, tokenizer, prompt_for(tokenizer, False), SCHEMAS["form"], most=20)


def test_an_answer_that_is_complete_stops_by_itself(loaded):
    model, tokenizer = loaded
    events, tokens = tell(model, tokenizer, prompt_for(tokenizer, False), {"enum": ["red", "green"]}, most=50)
    assert json.loads(said(events)) in ("red", "green") and tokens[-1] in tokenizer.eos_token_ids


# Ways to the end


ENDED = {
    "in a text": (SCHEMAS["flat"], '{"name":"ab'),
    "in an object of any kind": ({"type": "object"}, '{"a":{"b":[1,2,{"x":"y'),
    "sixty deep": ({"type": "object"}, '{"a":' * 60),
    "in a list": (SCHEMAS["list"], '{"v":1,"next":{"v":2,"next":'),
    "in a number": (SCHEMAS["numbers"], '{"p":0.'),
    "an address": (SCHEMAS["pattern"], '{"mail":"abc'),
    "a multiple": (SCHEMAS["multiple"], '{"cents":12'),
    "inside a pattern": (SCHEMAS["pattern inside"], '{"code":"ab'),
    "items to come": ({"type": "array", "items": NODE | {"$defs": {"node": NODE}}, "minItems": 9}, "["),
}


@pytest.mark.parametrize("name", [n for n in ENDED if n != "items to come"])
def test_ways_to_an_end_are_found_and_short(tokenizer, name):
    schema, begun = ENDED[name]
    guide = grammar_for(tokenizer, schema)
    ids = tokenizer.encode(begun, add_special_tokens=False)
    limit = len(ids) + 110
    guide.begin(limit)
    for token in ids:
        assert guide.advance(token) == token
    answer, steps = list(ids), 0
    while len(answer) < limit and not (guide.mask()[106] and guide.forced() is None):
        # What a model that never ends anything would say: the last thing allowed.
        token = guide.forced()
        token = int(np.flatnonzero(guide.mask())[-1]) if token is None else token
        answer.append(guide.advance(token))
        steps += 1
    jsonschema.validate(json.loads(tokenizer.decode([t for t in answer if t != 106])), schema)


def test_recursion_is_left(tokenizer):
    leaf = thing({"kind": {"const": "leaf"}}, additionalProperties=False)
    both = thing({"kind": {"const": "node"}, "a": {"$ref": "#/$defs/t"}, "b": {"$ref": "#/$defs/t"}})
    both["additionalProperties"] = False
    schema = {"$ref": "#/$defs/t", "$defs": {"t": {"anyOf": [both, leaf]}}}
    ends = Endings(tokenizer, LLMatcher.grammar_from_json_schema(schema))
    begun = tokenizer.encode('{"kind":"node","a":{"kind":"node","a":', add_special_tokens=False)
    ends.follow(begun)
    way = ends.find()
    jsonschema.validate(json.loads(tokenizer.decode([*begun, *way])), schema)


def test_a_token_that_leads_too_far_is_replaced(tokenizer):
    names = [f"property_{i}" for i in range(12)]
    far = thing({name: {"type": "integer"} for name in names}, additionalProperties=False)
    schema = thing({"a": {"type": "integer"}, "far": far}, "a", additionalProperties=False)
    guide = grammar_for(tokenizer, schema)
    needed = guide.begin(40)
    begun = tokenizer.encode('{"a":1', add_special_tokens=False)
    answer = [guide.advance(t) for t in begun]
    comma, brace = tokenizer.token_id(","), tokenizer.token_id("}")
    assert needed < 12 and guide.mask()[comma]
    assert guide.advance(comma) == brace
    assert json.loads(tokenizer.decode([*answer, brace])) == {"a": 1}


# Other forms


def test_a_regular_expression(loaded):
    model, tokenizer = loaded
    regex = "[a-z]+ ([0-9]{4}|no)!"
    form = {"type": "regex", "regex": regex}
    for seed, most in enumerate((40, 9, 60)):
        events, tokens = tell(model, tokenizer, prompt_for(tokenizer, False), form, most=most, seed=seed)
        assert re.fullmatch(regex, said(events)) and len(tokens) <= most


def test_a_grammar(loaded):
    model, tokenizer = loaded
    grammar = {"type": "grammar", "grammar": 'start: sum\nsum: n ("+" n)*\nn: /[0-9]{1,3}/ | "(" sum ")"'}
    for seed in range(3):
        events, _ = tell(model, tokenizer, prompt_for(tokenizer, False), grammar, most=40, seed=seed)
        assert eval(re.sub(r"\b0+(?=\d)", "", said(events))) >= 0


@pytest.mark.parametrize("form", ["json", "json_object", {"type": "json_object"}])
def test_a_json_object(loaded, form):
    model, tokenizer = loaded
    events, _ = tell(model, tokenizer, prompt_for(tokenizer, False), form, most=50)
    assert isinstance(json.loads(said(events)), dict)


def test_a_pydantic_model(loaded):
    import pydantic

    City = pydantic.create_model("City", name=(str, ...), people=(int, ...), near=(list[str], []))
    model, tokenizer = loaded
    events, _ = tell(model, tokenizer, prompt_for(tokenizer, False), City, most=80)
    assert City.model_validate_json(said(events)).people is not None


@pytest.mark.parametrize("form", [{"schema": SCHEMAS["flat"]}, {"json_schema": {"schema": SCHEMAS["flat"]}}])
def test_a_schema_as_servers_spell_it(tokenizer, form):
    guide = grammar_for(tokenizer, {"type": "json_schema", **form})
    text = '{\n  "name": "é",\n  "age": 3\n}'
    for token in tokenizer.encode(text, add_special_tokens=False):
        assert guide.mask()[token]
        guide.advance(token)
    assert np.flatnonzero(guide.mask()).tolist() == [1, 50, 106]  # nothing but the stop tokens


def test_blanks_are_few(tokenizer):
    guide = grammar_for(tokenizer, SCHEMAS["flat"])
    for token in tokenizer.encode('{"name": "a", ', add_special_tokens=False):
        guide.advance(token)
    assert not guide.mask()[tokenizer.encode("a ", add_special_tokens=False)[-1]]
    assert not guide.mask()[tokenizer.token_id("\n")]


def test_half_characters_and_lone_surrogates_do_not_pass(tokenizer):
    guide = grammar_for(tokenizer, SCHEMAS["array"])
    for token in tokenizer.encode('["', add_special_tokens=False):
        guide.advance(token)
    guide.advance(tokenizer.token_id("<0xE6>"))
    assert not guide.mask()[tokenizer.token_id('"')] and guide.mask()[tokenizer.token_id("<0xBC>")]
    for token in ("<0xBC>", "<0xA2>"):
        guide.advance(tokenizer.token_id(token))
    for token in tokenizer.encode("\\u", add_special_tokens=False):
        guide.advance(token)
    assert not guide.mask()[tokenizer.token_id("d")]


# Calls


def test_a_call_is_made_when_one_is_asked_for(loaded):
    model, tokenizer = loaded
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tools=[LOOK], enable_thinking=True)
    events, _ = tell(
        model, tokenizer, prompt, {"type": "tool_call"}, thinks=True, budget=8, most=2000, tools=[LOOK], seed=3
    )
    [call] = [e for e in events if not isinstance(e, Thought)]
    assert isinstance(call, ToolCall) and call.name == "look" and call.notes == () and set(call.arguments) == {"what"}


def test_with_tools_an_answer_is_of_its_form_or_calls(tokenizer):
    for text in ('{"name": "a", "age": 1}', '<|tool_call>call:look{what:<|"|>a<|"|>}<tool_call|>' * 2):
        guide = grammar_for(tokenizer, SCHEMAS["flat"], [LOOK])
        guide.begin(200)
        for token in tokenizer.encode(text, add_special_tokens=False):
            assert guide.mask()[token]
            assert guide.advance(token) == token
        assert guide.mask()[106]


# In a conversation


REPLIES = ['{"name": "ann", "age": 3}', "anything at all"]


@pytest.mark.parametrize("thinking", [False, True])
def test_a_chat_streams_the_form_after_the_thought(tokenizer, thinking):
    opening = "<|channel>thought\nlet me see\n<channel|>" if thinking else ""
    model = ScriptedModel(tokenizer, [opening + REPLIES[0]])
    chat = Chat(model, tokenizer, sampling=Sampling(temperature=0.0), thinking=thinking)
    events = list(chat.stream("who?", response_format=SCHEMAS["flat"]))
    assert json.loads(said(events)) == {"name": "ann", "age": 3}
    assert sum(isinstance(e, Text) for e in events) > 5  # streamed, not told at once
    assert "{" not in said(events, Thought) and bool(said(events, Thought)) == bool(thinking)
    assert events[-1].reason == "stop"


def test_a_chat_that_may_say_little_ends_in_form_and_says_why(loaded):
    model, tokenizer = loaded
    chat = Chat(model, tokenizer, sampling=Sampling(temperature=1.0, seed=1, max_tokens=25))
    events = list(chat.stream("x", response_format=SCHEMAS["flat"]))
    jsonschema.validate(json.loads(said(events)), SCHEMAS["flat"])
    assert isinstance(events[-1], Done) and events[-1].reason == "length"


def test_a_refused_form_leaves_the_chat_as_it_was(loaded):
    chat = Chat(*loaded)
    with pytest.raises(UsageError):
        list(chat.stream("x", response_format={"type": "text"}))
    assert chat.messages == []


# Rows of a batch


def test_rows_of_a_batch_have_masks_of_their_own(loaded):
    model, tokenizer = loaded
    forms = [SCHEMAS["flat"], {"type": "regex", "regex": "[0-9]{4} (yes|no)"}]
    guides = [grammar_for(tokenizer, form) for form in forms]
    for guide in guides:
        guide.begin(40)
    ids = tokenizer.encode("<|turn>user\nx<turn|>\n<|turn>model\n")
    cache, rows = model.make_cache(), [[], []]
    tokens, rng = mx.array([ids, ids]), random.Random(0)
    for _ in range(40):
        logits = model(tokens, cache=cache)[:, -1, :]
        allowed = mask_rows(guides, logits.shape[-1])
        assert allowed.shape == (2, logits.shape[-1]) and allowed.any(axis=1).all()
        scaled = mx.where(mx.array(allowed), logits, -mx.inf)
        chosen = mx.random.categorical(scaled, key=mx.random.key(rng.randrange(1 << 30))).tolist()
        chosen = [c if g is None else g.advance(c) for g, c in zip(guides, chosen, strict=True)]
        for i, token in enumerate(chosen):
            if token in tokenizer.eos_token_ids:
                guides[i] = None
            if guides[i] is not None:
                rows[i].append(token)
        if guides == [None, None]:
            break
        tokens = mx.array(chosen)[:, None]
    jsonschema.validate(json.loads(tokenizer.decode(rows[0])), SCHEMAS["flat"])
    assert re.fullmatch(forms[1]["regex"], tokenizer.decode(rows[1]))


# Refusals


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ({"name": "string"}, "no JSON schema"),
        ({"type": "text"}, "leave it out"),
        ({}, "leave it out"),
        ("yaml", "a response format is"),
        (7, "a response format is"),
        ({"type": "regex"}, 'lacks its "regex"'),
        ({"type": "regex", "regex": "(?=a)b"}, "look-around"),
        ({"type": "regex", "regex": "["}, "cannot be used"),
        ({"type": "grammar", "grammar": "start: nowhere"}, "nowhere"),
        ({"type": "json_schema"}, 'lacks its "schema"'),
        ({"type": "json_schema", "json_schema": 3}, 'lacks its "schema"'),
        ({"type": "colour"}, "Invalid type: colour"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "Unsatisfiable"),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "object", "properties": {"a": {"not": {}}}}, '"not"'),
        ({"$ref": "https://example.com/schema"}, "not present"),
        ({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(20_000)}}, "too large"),
    ],
)
def test_forms_that_cannot_be_used_are_refused_in_a_line(tokenizer, form, says):
    with pytest.raises(UsageError, match=re.escape(says)) as e:
        grammar_for(tokenizer, form)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400


def test_without_llguidance_a_line_says_what_to_install(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UsageError, match="pip install llguidance"):
        grammar_for(tokenizer, "json")


def test_a_form_that_becomes_too_complex_says_so(model):
    tokenizer = Tokenizer(model[1], eos_token_ids=[1])
    guide = grammar_for(tokenizer, {"type": "regex", "regex": "((a{900}){900}){900}"})
    with pytest.raises(Gemma4Error, match="became too complex"):
        for _ in range(30):
            guide.advance(int(np.flatnonzero(guide.mask())[0]))


def test_a_sampler_that_ignores_the_mask_is_told(loaded):
    model, tokenizer = loaded
    guide, letter = GrammarGuide(tokenizer, LLMatcher.grammar_from_regex("[0-9]+x")), tokenizer.token_id("a")
    steps = generate_step(mx.array([2, 107]), model, max_tokens=5, sampler=lambda p: mx.array([letter]), guide=guide)
    with pytest.raises(Gemma4Error, match="ignored the mask"):
        list(steps)


def test_vocabularies_follow_the_stop_ids():
    from mlx_gemma4 import demo
    from mlx_gemma4.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(demo.path())
    first, few = tokenizer.constraint_vocabulary, tokenizer.byte_vocabulary
    assert tokenizer.constraint_vocabulary is first and tokenizer.byte_vocabulary is few
    tokenizer.eos_token_ids = {107}
    assert tokenizer.constraint_vocabulary.eos_token == tokenizer.byte_vocabulary.eos_token == 107
    assert first.eos_token != 107
    tokenizer.eos_token_ids = set()
    with pytest.raises(UsageError, match="no token ends an answer"):
        _ = tokenizer.constraint_vocabulary
