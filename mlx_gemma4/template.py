"""Chat templates: Jinja source that came with a checkpoint, rendered in a sandbox.

Owns the Jinja environment and the translation of its errors. Knows nothing about tokens; `tokenizer.py` finds
the source and encodes what comes out.

The environment offers what transformers 5.23 offers (`utils/chat_template_utils.py`), because templates are
written against that: trimmed blocks, `{% break %}`, `{% generation %}`, `tojson`, `raise_exception`,
`strftime_now`. A template is a stranger's program, so the sandbox is Jinja's immutable one, and its
namespaces refuse private names.
"""

import json
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from .errors import TokenizerError


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, which marks the model's own text for training; rendered as it
    stands."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as a plain class attribute)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _PublicNamespace(Namespace):
    """Jinja's namespace() without `_private` attributes, through which older sandboxes were left."""

    def __init__(*args: Any, **kwargs: Any):  # no named self: namespace(self=...) is allowed
        self, *rest = args
        for name in dict(*rest, **kwargs):
            _refuse_private(name)
        Namespace.__init__(self, *rest, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template may not use the namespace attribute {name!r}")


def _tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # Jinja's own filter escapes <, > and & for HTML; prompts must not be escaped.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


@lru_cache(maxsize=8)
def _compile(source: str):
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    env.filters["tojson"] = _tojson
    env.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_PublicNamespace)
    return env.from_string(source)


def render(source: str, **variables: Any) -> str:
    """The template's text for these variables (`messages`, `tools`, `add_generation_prompt`, `bos_token`,
    ...).

    Raises TokenizerError, in one line, when the template does not compile, refuses the messages
    (`raise_exception`), steps out of the sandbox, or trips over a value.
    """
    try:
        template = _compile(source)
    except TemplateSyntaxError as e:
        raise TokenizerError(f"the chat template has a syntax error in line {e.lineno}: {_line(e.message)}") from e
    try:
        return template.render(**variables)
    except SecurityError as e:
        raise TokenizerError(f"the chat template was stopped by the sandbox: {_line(e)}") from e
    except TemplateError as e:
        raise TokenizerError(f"the chat template refused these messages: {_line(e)}") from e
    except (
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        IndexError,
        ArithmeticError,
        RecursionError,
    ) as e:
        # What a template raises when a message has a shape it does not expect (a number as content, no role).
        raise TokenizerError(
            f"the chat template cannot render these messages ({type(e).__name__}: {_line(e)}); "
            "check their roles and content"
        ) from e


def _line(error: Any) -> str:
    return " ".join(str(error).split())
