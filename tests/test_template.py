"""Chat templates in the sandbox: identical to transformers' renderings, and harmless."""

import hashlib
import json
from pathlib import Path

import pytest

from mlx_gemma4.errors import TokenizerError
from mlx_gemma4.template import render

FOLDER = Path(__file__).parent / "fixtures" / "chat_template"
SOURCES = {
    "small": (FOLDER / "chat_template.E2B-E4B.jinja").read_text(encoding="utf-8"),
    "large": (FOLDER / "chat_template.12B-26B-31B.jinja").read_text(encoding="utf-8"),
}
HASHES = {
    "small": "0a2c8073c878ab1da004bee933a998606537bbb62016310352c7285c3f01c5b5",
    "large": "ae53464bf3be25802b3a5b37def7fd89667067d7577049b3b2d74c4d8de4c6d4",
}
# golden.json: of the templates' features; conversations.json: of the messages this package makes.
GOLDEN = [c for file in ("golden", "conversations") for c in json.loads((FOLDER / f"{file}.json").read_text("utf-8"))]


@pytest.mark.parametrize("name", SOURCES)
def test_fixtures_are_the_published_files(name):
    assert hashlib.sha256(SOURCES[name].encode()).hexdigest() == HASHES[name]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"{c['template']}-{c['name']}-{c['add_generation_prompt']}")
def test_renders_as_transformers_does(case):
    variables = {k: case[k] for k in ("messages", "tools", "add_generation_prompt", "bos_token")}

    def text():
        return render(SOURCES[case["template"]], documents=None, **variables, **case["kwargs"])

    if "raises" in case:
        with pytest.raises(TokenizerError) as e:
            text()
        said = case["raises"].split(": ", 1)[1]
        assert said in str(e.value) and "\n" not in str(e.value)
    else:
        assert text() == case["rendered"]


def test_extensions_and_helpers():
    source = (
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m }};{% endfor %}\n"
        "{% generation %}{{ {'a': '<é & \"q\">'} | tojson }}{% endgeneration %}{{ strftime_now('%Y') | length }}"
    )
    assert render(source, messages=[1, 2, 3]) == '1;2;{"a": "<é & \\"q\\">"}4'


def test_blocks_are_trimmed():
    assert render("  {% if true %}\nx\n  {% endif %}\ny") == "x\ny"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% if %}", "syntax error in line 1"),
        ("a\n{{ unclosed", "line 2"),
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError"),
        ("{{ missing.deeper }}", "refused"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
    ],
)
def test_errors_are_one_line(source, says):
    with pytest.raises(TokenizerError) as e:
        render(source, messages=[{"role": "user", "content": "hi"}])
    assert says in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{% set ns = namespace(__init__=1) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ range(99999999999) }}",
    ],
)
def test_the_sandbox_holds(source):
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(TokenizerError):
        render(source, messages=messages)
    assert messages == [{"role": "user", "content": "hi"}]
