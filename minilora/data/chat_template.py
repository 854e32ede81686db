"""Chat templates: messages → text, as transformers renders them, in jinja2's immutable sandbox.

A checkpoint ships its chat format as a Jinja template: a program from a stranger. The sandbox lets
it read messages and write text, and nothing else. The environment offers the features that
templates on the Hub use:

    trim_blocks, lstrip_blocks      a tag alone on its line leaves no blank line
    loopcontrols                    {% break %}, {% continue %}
    tojson                          plain JSON: jinja2's filter escapes < > & ' for HTML
    raise_exception, strftime_now   for templates that refuse a conversation, or print a date
    {% generation %}…               transformers' mark of the assistant's text; ignored here

Simplified: unlike in transformers, tools are JSON schemas (not Python functions), and no message
key is renamed.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

# A format for a checkpoint without a template: `tokenizer.chat_template = ALPACA_TEMPLATE`. It
# needs no special token but EOS. An answer begins after a newline, which merges with no letter or
# digit.
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
    """Return the text of a conversation.

    Args:
        template: the Jinja template.
        messages: the conversation.
        variables: further variables of the template.

    Raises:
        ValueError: the template is malformed, or refuses these messages.
    """
    try:
        compiled = compile_template(template)
        return compiled.render(messages=[dict(m) for m in messages], **variables)
    except template_errors() as error:
        roles = [m.get("role") for m in messages]
        raise ValueError(
            f"the chat template cannot render a conversation of roles {roles}: {error}"
        ) from error


def template_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of a template that does not fit its messages."""
    import jinja2

    # TypeError: for example, the template joined text and None.
    return jinja2.TemplateError, TypeError, ValueError


@lru_cache(maxsize=32)
def compile_template(template: str):
    """Return a jinja2.Template in the sandbox that this module describes.

    Args:
        template: the Jinja template.
    """
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

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def read_template(folder: Path, config: dict[str, Any]) -> str | dict[str, str] | None:
    """Return the template of a checkpoint, {name: template} if there are several, or None.

    Args:
        folder: the checkpoint.
        config: the content of its tokenizer_config.json.
    """
    template = config.get("chat_template")
    named = {}
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
    elif isinstance(template, str):
        named = {"default": template}
    file = folder / "chat_template.jinja"
    if file.is_file():
        named = {"default": file.read_text(encoding="utf-8")}
    for further in sorted(folder.glob("additional_chat_templates/*.jinja")):
        named[further.stem] = further.read_text(encoding="utf-8")
    return named.get("default") if set(named) <= {"default"} else named
