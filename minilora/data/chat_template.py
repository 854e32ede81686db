"""Chat templates: messages → text, as transformers renders them, inside jinja2's immutable sandbox.

A checkpoint ships its chat format as a Jinja template, which is a program from a stranger: the sandbox lets it read
messages and write text, and touch nothing else. The environment offers what the templates on the Hub rely on:

    trim_blocks, lstrip_blocks      a tag alone on its line leaves no blank line
    loopcontrols                    {% break %}, {% continue %}
    tojson                          plain JSON: jinja2's own escapes < > & ' for HTML
    raise_exception, strftime_now   for templates that refuse a conversation, or print today's date
    {% generation %}…               transformers' mark of the assistant's words; here it only passes them through

Simpler than transformers: tools are JSON schemas (not Python functions), and no message key is renamed.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

# Formats a conversation for a checkpoint without a template of its own: `tokenizer.chat_template = ALPACA_TEMPLATE`.
# It needs no special token but EOS, and an answer begins behind a newline, which merges with no letter or digit.
ALPACA_TEMPLATE = r"""
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{{ message['content'] }}
    {%- elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] }}
    {%- elif message['role'] == 'assistant' %}{{ '### Response:\n' + message['content'] }}{{ eos_token }}
    {%- else %}{{ raise_exception('expected system, user or assistant, got ' + message['role']) }}
    {%- endif %}
    {{- '\n\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"""


def render(template: str, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """The text of a conversation. ValueError if the template is malformed, or refuses these messages."""
    try:
        return compile_template(template).render(messages=[dict(m) for m in messages], **variables)
    except template_errors() as error:
        roles = [m.get("role") for m in messages]
        raise ValueError(f"the chat template cannot render a conversation of roles {roles}: {error}") from error


def template_errors() -> tuple[type[Exception], ...]:
    """What rendering raises when a template and messages do not fit, here or in transformers."""
    import jinja2

    return jinja2.TemplateError, TypeError, ValueError  # TypeError: the template joined text and None, for example


@lru_cache(maxsize=32)
def compile_template(template: str):
    """A jinja2.Template in the sandbox described above."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)  # the word "generation"
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env.from_string(template)
