"""The text of one answer in pieces, while the model generates it.

The tokens are those of `ml.generate` (generate.py), and the pieces together are its text. A piece
holds complete characters only. Text that may be the beginning of a stop string waits until the next
tokens decide (`Text` in sequence.py, which the server uses too).
"""

from collections.abc import Generator, Mapping
from typing import Any, Unpack

from torch import nn

from minilora.common import unwrap_model
from minilora.data.chat_template import as_trained
from minilora.data.prompt import encode_prompt
from minilora.generation.config import GenerationConfig, GenerationFields, with_fields
from minilora.generation.generate import (
    Prompt,
    answer_steps,
    check_lengths,
    check_prompts,
    end_tokens,
    is_single,
)
from minilora.generation.sampling import Decoding
from minilora.generation.sequence import Text
from minilora.generation.structured import check_complete, grammar_of


def stream_generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    config: GenerationConfig | None = None,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **fields: Unpack[GenerationFields],
) -> Generator[str, None, None]:
    """Generate the model's answer to one prompt, piece by piece.

    The pieces together are the text that `generate` returns for the same arguments. Until the
    generator ends or is closed, the model stays in eval mode.

        for piece in ml.stream_generate(model, tokenizer, "Why is the sky blue?"):
            print(piece, end="", flush=True)

    Args:
        model: the model.
        tokenizer: its tokenizer.
        prompt: a text or a list of messages, as in `generate`.
        config: length, sampling, penalties and stop strings; None takes the defaults.
        chat_template_kwargs: variables of the chat template, such as `enable_thinking`. None takes
            those that the active adapter was trained with.
        **fields: fields of `GenerationConfig` that replace those of `config`.

    Returns:
        A generator of texts, none of them empty.

    Raises:
        ValueError: there are several prompts, or one of the reasons in `generate`. It is raised by
            the call, before the first piece. With a schema, an answer that reached its largest
            length before its end raises after the last piece.
    """
    model = unwrap_model(model)
    if not is_single(prompt):
        raise ValueError(
            f"stream_generate answers one prompt, a text or a list of messages, got {prompt!r:.80}. "
            "Use generate for several prompts."
        )
    check_prompts([prompt])
    config = with_fields(config, fields)
    ends = end_tokens(model, tokenizer)
    rule = config.rule(ends, None, grammar_of(config, tokenizer, ends))
    ids = encode_prompt(prompt, as_trained(tokenizer, chat_template_kwargs, model))
    check_lengths(model, [ids], config.max_new_tokens)
    return _pieces(model, ids, rule, Text(tokenizer, config.stop_texts))


def _pieces(
    model: nn.Module, ids: list[int], rule: Decoding, text: Text
) -> Generator[str, None, None]:
    """Yield the text that each token completes, and at the end the text that still waits."""
    answer: list[int] = []
    stopped = False
    steps = answer_steps(model, [ids], rule, [answer])
    try:
        for _ in steps:
            if len(answer) == len(text.ids):  # the token was an end token
                continue
            piece, stopped = text.push(answer[-1])
            if piece:
                yield piece
            if stopped:
                return
    finally:
        steps.close()  # the model gets its own mode back at once
    rest = text.rest()
    if rest:
        yield rest
    check_complete([answer], rule)
