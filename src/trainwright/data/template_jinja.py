"""The Jinja that chat templates are written in: sandboxed, and equal to what transformers gives a template.

Owns the environment and the rendering of one conversation, with the places that the template itself marks as generated.
Knows nothing of tokens: which characters are trained, and their ids, are in `template.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trainwright.errors import UserError

Message = Mapping[str, Any]

# Templates read the model's reasoning under one of these names; data sets write it under any of them.
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")

_MARKS = "generation_marks"


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: text that the model writes. Renders its body, marked when asked."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it as an instance attribute)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    @jinja2.pass_context
    def _render(self, context: jinja2.runtime.Context, caller: Callable[[], str]) -> str:
        before, after = context.get(_MARKS) or ("", "")
        return f"{before}{caller()}{after}"


class _Namespace(jinja2.utils.Namespace):
    """`namespace()` without names that reach into Python."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a chat template may not store {name!r}")
        super().__setitem__(name, value)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON as a model reads it; Jinja's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


@lru_cache(maxsize=64)
def compile_template(source: str) -> jinja2.Template:
    """A template ready to render.

    Raises:
        UserError: `source` is no Jinja.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"chat template is no Jinja: {error.message} in its line {error.lineno}") from None


@lru_cache(maxsize=64)
def variables_of(source: str) -> frozenset[str]:
    """The names that a template reads from outside."""
    return frozenset(jinja2.meta.find_undeclared_variables(compile_template(source).environment.parse(source)))


def render(
    source: str,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any],
    *,
    add_generation_prompt: bool = False,
    marks: tuple[str, str] | None = None,
) -> str:
    """The text of a conversation.

    Args:
        variables: what the template may name besides the conversation: bos_token, eos_token, ...
        marks: characters to put around what the template marks as generated.

    Raises:
        UserError: the template refuses the conversation, or fails on it.
    """
    template = compile_template(source)
    try:
        return template.render(
            {**variables, _MARKS: marks},
            messages=[_as_templates_read(message) for message in messages],
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
        )
    except jinja2.TemplateError as error:
        raise UserError(f"chat template: {error.message or type(error).__name__}") from None
    except Exception as error:  # a template is a program of the user's: it may divide by zero or fill the memory
        said = f"chat template fails on this conversation: {type(error).__name__}: {error}"
        raise UserError(said.removesuffix(": ")) from None


def _as_templates_read(message: Message) -> dict[str, Any]:
    """A message without its null fields (templates would print `None`), its reasoning under the usual names."""
    read = {key: value for key, value in message.items() if value is not None}
    reasoning = next((read[field] for field in REASONING_FIELDS if field in read), None)
    if reasoning is not None:
        read["reasoning_content"] = reasoning
        read.setdefault("thinking", reasoning)
    return read
