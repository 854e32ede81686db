"""Text from a model, many prompts at a time: greedy or sampled, through a KV cache.

Prompts of similar length go together, padded on the left. Tokens with which all prompts begin are
read once. A finished row leaves its batch. Each row has its own random generator, so a sampled
answer depends on (seed, row number, prompt), not on the other rows. sampling.py chooses the tokens.
On a GPU a token's step can be one CUDA graph (generation/cuda_graph.py).

stream.py returns the text of one answer in pieces while it grows. With a schema, answers are JSON
(structured.py).

Simplified: unlike transformers' generate, there are no beams.
"""

import random
import secrets
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypeVar, Unpack

import torch
from torch import Tensor, nn

from minilora.common import order_by_length, unwrap_model
from minilora.common.progress import ProgressBar
from minilora.data.chat_template import as_trained
from minilora.data.prompt import encode_prompt, end_of_turn
from minilora.generation.config import GenerationConfig, GenerationFields, with_fields
from minilora.generation.cuda_graph import graphs
from minilora.generation.sampling import Decoding, next_tokens
from minilora.generation.single_token import matrix_vector
from minilora.generation.structured import check_complete, grammar_of
from minilora.lora.batched import check_count, for_prompts
from minilora.models.padded_batch import Context, inference, shared_prefix

Prompt = str | Sequence[Mapping[str, Any]] | Mapping[str, Any]
T = TypeVar("T")


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt | Sequence[Prompt],
    config: GenerationConfig | None = None,
    *,
    adapters: Sequence[str | None] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **fields: Unpack[GenerationFields],
) -> Any:
    """Generate the model's answer to a prompt, or its answers to several prompts.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        prompt: a list of messages (`[{"role": "user", "content": ...}]`, in any form that a row of
            training may have) or a text, or a list of these. A text is one user message if the
            tokenizer has a chat template; otherwise, and always as `minilora.data.RawText`, the
            model continues it. Tools go with the messages, {"messages": …, "tools": …}
            (`ml.parse_tool_calls` reads the answer).
        config: length, sampling, penalties, stop strings and batches; None takes the defaults.
        adapters: for each prompt the name of the adapter that answers, or None for the base; None
            uses the active adapters for all.
        chat_template_kwargs: variables of the chat template, such as `enable_thinking`. None takes
            those that the answering adapter was trained with.
        **fields: fields of `GenerationConfig` that replace those of `config`, such as
            `max_new_tokens=64`, `temperature=0.7` or `stop=["###"]`.

    Returns:
        A string for one prompt, a list of strings for a list of prompts.

    Raises:
        ValueError: a prompt is empty or exceeds the model's context, a message is wrong or left out
            by the chat template, a number is out of range, or cuda_graph is True without a GPU; or
            the schema cannot be enforced, or an answer reached its largest length before its end.
    """
    model = unwrap_model(model)
    single = is_single(prompt)
    prompts: list[Any] = [prompt] if single else list(prompt)
    config = with_fields(config, fields)
    stop_texts = config.stop_texts
    ends = end_tokens(model, tokenizer)
    grammar = grammar_of(config, tokenizer, ends)
    rule = config.rule(ends, _stop_test(tokenizer, stop_texts), grammar)
    check_prompts(prompts)
    names = list(adapters or [])
    if adapters is not None:
        check_count(names, len(prompts))
    readers = {}
    for name in names:
        readers[name] = as_trained(tokenizer, chat_template_kwargs, model, [name])
    if adapters is None:
        readers[None] = as_trained(tokenizer, chat_template_kwargs, model)
        names = [None] * len(prompts)
    rows = []
    for number, (one, name) in enumerate(zip(prompts, names, strict=True)):
        rows.append(encode_prompt(one, readers[name], place=f"prompt {number}"))
    generated = generate_ids(model, rows, rule, adapters)
    check_complete(generated, rule)
    answers = []
    for ids in generated:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        for word in stop_texts:
            text, _, _ = text.partition(word)
        answers.append(text)
    return answers[0] if single else answers


def is_single(prompt: Any) -> bool:
    """Return True for one prompt: a text, a message or a list of messages.

    Args:
        prompt: one prompt, or a list of prompts.
    """
    if isinstance(prompt, str | Mapping):
        return True
    if not prompt:
        return False
    return _are_messages(prompt)


def _are_messages(prompt: Any) -> bool:
    """Return True if every element is a mapping."""
    for message in prompt:
        if not isinstance(message, Mapping):
            return False
    return True


def _stop_test(tokenizer: Any, words: Sequence[str]) -> Callable[[list[int]], bool] | None:
    """Return a function that finds a stop string in an answer, or None without stop strings."""
    if not words:
        return None

    def stopped(answer: list[int]) -> bool:
        text = tokenizer.decode(answer, skip_special_tokens=False)
        for word in words:
            if word in text:
                return True
        return False

    return stopped


def check_prompts(prompts: Sequence[Any]) -> None:
    """Raise ValueError for an empty prompt, and for one that is neither text nor messages.

    Args:
        prompts: the prompts.

    Raises:
        ValueError: a prompt is empty or of another type.
    """
    empty = [number for number, prompt in enumerate(prompts) if not prompt]
    if empty:
        raise ValueError(f"prompts {empty[:8]} are empty: give a text or at least one message")
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            continue
        if isinstance(prompt, Mapping) and "messages" in prompt:
            continue
        if not isinstance(prompt, Sequence) or not _are_messages(prompt):
            raise ValueError(
                f"prompt {number}: expected a text or a list of messages (dicts), "
                f"got {prompt!r:.80}"
            )


def end_tokens(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """Return every token id that ends an answer.

    These are the tokenizer's EOS, those of the model's configs, and the template's end of turn.

    Args:
        model: the model.
        tokenizer: its tokenizer.
    """
    entries = [tokenizer.eos_token_id, end_of_turn(tokenizer)]
    for name in ("config", "generation_config"):
        entries.append(getattr(getattr(model, name, None), "eos_token_id", None))
    ids: set[int] = set()
    for entry in entries:
        if isinstance(entry, list | tuple):
            ids.update(entry)
        elif entry is not None:
            ids.add(entry)
    return frozenset(ids)


def generate_ids(
    model: nn.Module,
    prompts: Sequence[list[int]],
    rule: Decoding,
    adapters: Sequence[str | None] | None = None,
) -> list[list[int]]:
    """Generate the answers as token ids.

    Args:
        model: the model.
        prompts: token ids of each prompt.
        rule: rules for choosing tokens and ending answers.
        adapters: for each prompt the name of its adapter, or None for the base; None uses the
            active adapters for all.

    Returns:
        The new tokens of each prompt, without end tokens.

    Raises:
        ValueError: a prompt is empty or exceeds the model's context, or an adapter is unknown.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    with ProgressBar("generate", len(prompts), "answer") as bar:
        for ended in answer_steps(model, prompts, rule, answers, adapters):
            bar.update(ended)
    return answers


@torch.no_grad()  # on a generator: gradients are on again in the caller between two steps
def answer_steps(
    model: nn.Module,
    prompts: Sequence[list[int]],
    rule: Decoding,
    answers: Sequence[list[int]],
    adapters: Sequence[str | None] | None = None,
) -> Generator[int, None, None]:
    """Generate the answers, and pause after each token of a batch.

    The model stays in eval mode until the iterator ends or is closed.

    Args:
        model: the model.
        prompts: token ids of each prompt.
        rule: rules for choosing tokens and ending answers.
        answers: an empty list for each prompt, which receives the new tokens.
        adapters: as in `generate_ids`.

    Yields:
        The number of answers that ended with the token.

    Raises:
        ValueError: as in `generate_ids`.
    """
    check_lengths(model, prompts, rule.max_new_tokens)
    row_adapters = None
    if adapters is not None:
        row_adapters = for_prompts(model, adapters, len(prompts), rule)
        rule = replace(rule, cuda_graph=False)
    draws = _random_generators(rule.seed, len(prompts))
    order = order_by_length(prompts)
    steps = step_by_step(model, rule, min(rule.batch_size, len(prompts)))
    with inference(model), matrix_vector(model), row_adapters or nullcontext() as loaded:
        # A prefix is shared only if one adapter reads all prompts.
        sharing = prompts if adapters is None else []
        prefix, size = shared_prefix(model, sharing)
        for start in range(0, len(order), rule.batch_size):
            batch = order[start : start + rule.batch_size]
            context = prefix.select([0] * len(batch))
            context.adapters = None
            if adapters is not None:
                batch_adapters = _take(adapters, batch)
                context.adapters = (loaded, batch_adapters)
            batch_prompts = _take(prompts, batch)
            rests = [prompt[size:] for prompt in batch_prompts]
            logits = context.extend(rests)  # (B, V)
            batch_answers = _take(answers, batch)
            batch_draws = _take(draws, batch)
            yield from continue_answers(
                steps(context), logits, rule, batch_answers, batch_prompts, batch_draws
            )


def _random_generators(seed: int | None, rows: int) -> list[random.Random]:
    """Return a generator for each row, which depends on the seed and the number of the row."""
    if seed is None:
        seed = secrets.randbits(64)
    generators = []
    for number in range(rows):
        generators.append(random.Random(f"{seed}, row {number}"))
    return generators


def _take(values: Sequence[T], indices: Sequence[int]) -> list[T]:
    """Return the values at some indices."""
    return [values[index] for index in indices]


def step_by_step(model: nn.Module, rule: Decoding, rows: int) -> Callable[[Context], Any]:
    """Return a function that prepares a batch's context for reading single tokens.

    Args:
        model: the model.
        rule: its `cuda_graph` decides.
        rows: rows of the largest batch.

    Returns:
        A function of the context: its result is the context, or the context as CUDA graphs.
    """
    use_graphs = rule.cuda_graph
    if use_graphs == "auto" and not next(model.parameters()).is_cuda:
        use_graphs = False
    if use_graphs is False:
        return lambda context: context
    return graphs(model, use_graphs, rows, rule.max_new_tokens)


def continue_answers(
    context: Any,
    logits: Tensor,
    rule: Decoding,
    answers: Sequence[list[int]],
    prompts: Sequence[list[int]],
    draws: Sequence[random.Random] = (),
) -> Iterator[int]:
    """Continue the answers of one batch to their ends, and pause after each token.

    Args:
        context: prompts and answers so far, a Context or its CUDA graphs.
        logits: logits of the next token of each answer, (B, V).
        rule: rules for choosing tokens and ending answers; a grammar starts here.
        answers: tokens of each answer so far, fewer than `max_new_tokens`. They receive the new
            tokens.
        prompts: token ids of each prompt.
        draws: random generator of each answer; none are needed for greedy answers.

    Yields:
        The number of answers that ended with the token.
    """
    active = list(range(len(answers)))  # the answers whose rows are in `context`
    constraints = []
    if rule.grammar is not None:
        constraints = [rule.grammar.start() for _ in answers]
    while True:
        uniform = []
        if rule.temperature:
            uniform = [draws[i].random() for i in active]
        masks = None
        if constraints:
            masks = _take(constraints, active)
        active_prompts = _take(prompts, active)
        active_answers = _take(answers, active)
        tokens = next_tokens(logits, rule, uniform, active_prompts, active_answers, masks)
        unfinished = []
        for place, token in enumerate(tokens):
            answer = active_answers[place]
            if token in rule.ends:
                continue
            answer.append(token)
            if masks is not None:
                masks[place].push(token)
                if masks[place].is_finished:
                    continue
            if not rule.is_complete(answer):
                unfinished.append(place)
        yield len(active) - len(unfinished)
        if not unfinished:
            return
        if len(unfinished) < len(active):
            context = context.select(unfinished)
            active = _take(active, unfinished)
        last_tokens = [answers[i][-1:] for i in active]
        logits = context.extend(last_tokens)  # (B, V)


def check_lengths(model: nn.Module, prompts: Sequence[list[int]], new_tokens: int) -> None:
    """Raise ValueError for an empty prompt, or one that leaves too little of the context.

    Args:
        model: the model.
        prompts: token ids of each prompt.
        new_tokens: tokens that the answer may need.

    Raises:
        ValueError: a prompt is empty, or prompt and answer exceed the context.
    """
    context_length = getattr(model.config, "max_position_embeddings", None)
    if context_length is None:
        context_length = float("inf")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {number} is empty: a model needs at least one token")
        if len(prompt) + new_tokens > context_length:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens, which with {new_tokens} new ones "
                f"exceed the model's context of {context_length}: shorten it or lower max_new_tokens"
            )
