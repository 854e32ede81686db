"""The text of one answer in pieces, while the model generates it.

The tokens are those of `ml.generate` (generate.py), and the pieces together are its text. A piece
holds complete characters only. Text that may be the beginning of a stop string waits until the next
tokens decide (`Text` in sequence.py, which the server uses too).
"""

from collections.abc import Generator, Mapping, Sequence
from typing import Any

from torch import nn

from minilora.common import unwrap_model
from minilora.data.chat_template import as_trained
from minilora.data.prompt import encode_prompt
from minilora.generation.generate import (
    Prompt,
    answer_steps,
    check_lengths,
    check_prompts,
    end_tokens,
    is_single,
    read_stops,
)
from minilora.generation.sampling import Decoding
from minilora.generation.sequence import Text


def stream_generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: str | int | Sequence[str | int] | None = None,
    seed: int | None = None,
    cuda_graph: bool | str = "auto",
    chat_template_kwargs: Mapping[str, Any] | None = None,
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
        max_new_tokens: longest answer in tokens.
        temperature: 0 is greedy.
        top_p: probability mass of the nucleus to sample from.
        stop: strings or token ids before which the answer ends. The model's own end tokens always
            end it.
        seed: seed of the sampling; None draws one.
        cuda_graph: on a GPU, start all the work of a token with one call, as in `generate`.
        chat_template_kwargs: variables of the chat template, such as `enable_thinking`. None takes
            those that the active adapter was trained with.

    Returns:
        A generator of texts, none of them empty.

    Raises:
        ValueError: there are several prompts, or one of the reasons in `generate`. It is raised by
            the call, before the first piece.
    """
    model = unwrap_model(model)
    if not is_single(prompt):
        raise ValueError(
            f"stream_generate answers one prompt, a text or a list of messages, got {prompt!r:.80}. "
            "Use generate for several prompts."
        )
    check_prompts([prompt])
    stop_texts, stop_ids = read_stops(stop)
    rule = Decoding(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        ends=end_tokens(model, tokenizer) | stop_ids,
        cuda_graph=cuda_graph,
    )
    ids = encode_prompt(prompt, as_trained(tokenizer, chat_template_kwargs, model))
    check_lengths(model, [ids], max_new_tokens)
    return _pieces(model, ids, rule, Text(tokenizer, stop_texts))


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
