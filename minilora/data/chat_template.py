"""Chat templates: messages → text, as transformers renders them, in jinja2's immutable sandbox.

A checkpoint ships its chat format as a Jinja template: a program from a stranger. The sandbox lets
it read messages and write text, and nothing else. The environment offers the features that
templates on the Hub use:

    trim_blocks, lstrip_blocks      a tag alone on its line leaves no blank line
    loopcontrols                    {% break %}, {% continue %}
    tojson                          plain JSON: jinja2's filter escapes < > & ' for HTML
    raise_exception, strftime_now   for templates that refuse a conversation, or print a date
    {% generation %}…               transformers' mark of the assistant's text; ignored here

Templates read further variables, such as Qwen3's `enable_thinking`. They are called
`chat_template_kwargs`, as in TRL and vLLM: a row can have them, `train`, `evaluate`, `generate`,
`preview` and the server take them, and the adapter's file keeps those that it was trained with.

Simplified: unlike in transformers, tools are JSON schemas (not Python functions), and no message
key is renamed.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from minilora.lora.registry import lora_configs, lora_layers

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
    return _environment().from_string(template)


@lru_cache(maxsize=32)
def template_variables(template: str) -> frozenset[str]:
    """Return the names of the variables that a template reads.

    Args:
        template: the Jinja template.
    """
    from jinja2 import meta

    return frozenset(meta.find_undeclared_variables(_environment().parse(template)))


def _environment():
    """Return the sandbox."""
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
    return environment


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


# ---- further variables of a template

RESERVED = ("messages", "tools", "add_generation_prompt", "tokenize", "chat_template")


class WithTemplateKwargs:
    """A tokenizer whose chat template gets some further variables.

    Everything else is that of the tokenizer.

    Args:
        tokenizer: the tokenizer.
        chat_template_kwargs: the variables.
    """

    def __init__(self, tokenizer: Any, chat_template_kwargs: Mapping[str, Any]):
        self.tokenizer = tokenizer
        self.chat_template_kwargs = dict(chat_template_kwargs)

    def apply_chat_template(self, messages: Any, *arguments: Any, **options: Any) -> Any:
        """Return a conversation as the tokenizer's `apply_chat_template` does.

        Args:
            messages: the conversation.
            arguments: further positional arguments.
            options: further options; they replace `chat_template_kwargs` of the same name.
        """
        options = self.chat_template_kwargs | options
        return self.tokenizer.apply_chat_template(messages, *arguments, **options)

    def __len__(self) -> int:
        return len(self.tokenizer)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "tokenizer":  # as copy and pickle ask before __init__
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    def __repr__(self) -> str:
        return f"{self.tokenizer!r} with {self.chat_template_kwargs}"


def with_template_kwargs(
    tokenizer: Any, chat_template_kwargs: Mapping[str, Any] | None, where: str = ""
) -> Any:
    """Return a tokenizer whose chat template gets some further variables.

    Args:
        tokenizer: a tokenizer of minilora or transformers.
        chat_template_kwargs: the variables; None or an empty mapping returns the tokenizer itself.
            A variable of None counts as absent: Arrow gives every row the keys of all others.
        where: beginning of error messages.

    Raises:
        ValueError: the template does not read one of the variables, or minilora sets it.
    """
    if not isinstance(chat_template_kwargs, Mapping | None):
        raise ValueError(
            f"{where}chat_template_kwargs: expected a dict of template variables, got "
            f"{chat_template_kwargs!r}."
        )
    given = {name: v for name, v in (chat_template_kwargs or {}).items() if v is not None}
    if not given:
        return tokenizer
    template = tokenizer.chat_template
    if not template:
        raise ValueError(
            f"{where}chat_template_kwargs {given}: this tokenizer has no chat template that could "
            "read them. Leave them out, or set tokenizer.chat_template."
        )
    known: set[str] = set()
    for text in template.values() if isinstance(template, dict) else [template]:
        known |= template_variables(text)
    for name in given:
        if name in RESERVED or name not in known:
            readable = ", ".join(sorted(known.difference(RESERVED))) or "no further variable"
            raise ValueError(
                f"{where}chat_template_kwargs: {name!r} is not a variable that can be set for this "
                f"chat template, which reads {readable}. Correct the name, or leave it out."
            )
    if isinstance(tokenizer, WithTemplateKwargs):
        given = tokenizer.chat_template_kwargs | given
        tokenizer = tokenizer.tokenizer
    return WithTemplateKwargs(tokenizer, given)


def as_trained(
    tokenizer: Any,
    chat_template_kwargs: Mapping[str, Any] | None,
    model: Any,
    adapters: Sequence[str | None] | None = None,
) -> Any:
    """Return a tokenizer whose chat template gets the given variables, or those of training.

    Args:
        tokenizer: the tokenizer.
        chat_template_kwargs: the variables; None takes those that the adapters were trained with,
            unless the tokenizer has some already.
        model: the model.
        adapters: names of the adapters that answer; None takes the active ones.

    Raises:
        ValueError: the template does not read one of the variables, or several adapters were
            trained with different ones.
    """
    if chat_template_kwargs is not None or getattr(tokenizer, "chat_template_kwargs", None):
        return with_template_kwargs(tokenizer, chat_template_kwargs)
    if adapters is None:
        adapters = sorted({name for layer in lora_layers(model).values() for name in layer.active})
    kwargs = []
    for name in adapters:
        hashes = lora_configs(model).tokenizers.get(name or "") or {}
        kwargs.append(hashes.get("chat_template_kwargs", {}))
    if not any(kwargs):
        return tokenizer
    if kwargs[1:] != kwargs[:-1]:
        raise ValueError(
            f"adapters {list(adapters)} were trained with different chat_template_kwargs {kwargs}: "
            "pass chat_template_kwargs, or use one adapter at a time."
        )
    return with_template_kwargs(tokenizer, kwargs[0])
