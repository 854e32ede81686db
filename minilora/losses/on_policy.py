"""Objectives whose answers are sampled from the model in training: prompts, answers, log p.

    rows → prompts → G answers each (training/on_policy) → the loss of these answers

A row holds a prompt and whatever else the reward reads. Its forms:

    prompt                             a text, or a list of messages
    messages, prompt/completion, …     any form of supervised fine-tuning; the last answer is left
                                       out of the prompt, and the reward finds it in the row

Plain texts do not pass through the chat template, as in supervised fine-tuning.

log p is that of the sampling distribution: softmax(logits / temperature). The end token belongs to
the answer, because the policy has to learn when to stop.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from minilora.common import check_options, option
from minilora.data import IGNORE, Chat, Example, RawText, as_messages, encode_prompt, read_dataset
from minilora.data.chat.messages import is_message_list
from minilora.data.chat.values import parse
from minilora.data.chat_template import with_template_kwargs
from minilora.data.dataset import Encoded
from minilora.losses.sft import LabelledPositions, padded
from minilora_kernels.ops.cross_entropy import in_chunks, rows_at_a_time


@dataclass(frozen=True)
class PromptRow(Example):
    """A prompt as token ids, without supervised tokens, and the row that it comes from.

    Attributes:
        prompt: The prompt as the reward receives it: a text or messages.
        source: The row.
        content: Hash of the row: a run is resumed with the same rows only.
    """

    prompt: Any = None
    source: Mapping[str, Any] = field(default_factory=dict)
    content: str = ""


@dataclass(frozen=True)
class Answer(Example):
    """A sampled answer behind its prompt; the tokens of the answer have labels.

    `truncated` is True if the answer reached the largest length without an end token.

    Attributes:
        prompt: The row of the prompt.
        text: The answer as text, without the end token.
        sampler_logprobs: log p of its tokens as the sampler computed them, (T,).
        reward: Reward of the answer.
        advantage: Advantage of the answer.
        old_logprobs: log p of its tokens before the first update of the step, (T,).
        base_logprobs: log p of its tokens under the base model, (T,).
    """

    prompt: PromptRow | None = None
    text: str = ""
    sampler_logprobs: tuple[float, ...] = ()
    reward: float = 0.0
    advantage: float = 0.0
    old_logprobs: tuple[float, ...] = ()
    base_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class OnPolicy:
    """Base class of the objectives on sampled answers.

    Attributes:
        num_iterations: Updates on the answers of one step.
        num_generations: G, the number of answers of each prompt in a step.
        max_completion_length: Longest answer in tokens, with its end token.
        temperature: Temperature of the sampling, and of log p.
        generation_batch_size: Answers that are sampled at a time.
        log_completions_steps: Steps between two tables of answers; None shows none.
    """

    better: ClassVar[tuple[str, ...]] = ()

    num_iterations: int = option(1, "updates on the answers of one step", low=1)
    num_generations: int = option(8, "G: answers that are sampled for each prompt", low=1)
    max_completion_length: int = option(256, "longest sampled answer in tokens", low=1)
    temperature: float = option(1.0, "temperature of the sampling and of log p", above=0)
    generation_batch_size: int = option(
        64, "answers that are sampled at a time; changes no answer, up to rounding", low=1
    )
    log_completions_steps: int | None = option(
        10, "steps between two tables of sampled answers; None shows none", low=1
    )

    def __post_init__(self):
        check_options(self)

    @property
    def needs_base(self) -> bool:
        """True if the loss compares with the base model."""
        return False

    def encode(self, dataset: Any, tokenizer: Any, max_length: int | None) -> Encoded:
        """Encode the prompts of a dataset.

        Args:
            dataset: Rows with a prompt, or a path.
            tokenizer: The model's tokenizer.
            max_length: Largest number of tokens of prompt and answer; None for no limit.

        Returns:
            A `PromptRow` for each row, with a report.

        Raises:
            ValueError: If a row has no prompt, or prompt and answer may exceed `max_length`.
        """
        prompts = []
        for index, row in enumerate(read_dataset(dataset)):
            prompts.append(encode_prompt_row(row, tokenizer, index))
        if not prompts:
            raise ValueError("dataset: expected rows with a prompt, got none.")
        longest = max(prompts, key=len)
        needed = len(longest) + self.max_completion_length
        if max_length is not None and needed > max_length:
            raise ValueError(
                f"row {longest.row}: the prompt has {len(longest)} tokens, which with "
                f"max_completion_length {self.max_completion_length} exceed max_length "
                f"{max_length}: raise max_length, or shorten the prompt or the answers."
            )
        tokens = sum(map(len, prompts))
        report = f"{len(prompts)} prompts, {tokens} tokens, longest {len(longest)}"
        return Encoded(prompts, report)

    def collate(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """Return the batch of some prompts or answers, on the CPU.

        Args:
            examples: Examples of `encode`, or answers.
        """
        return padded(examples)

    def judge(self, answers: Sequence[Answer]) -> tuple[list[Answer], dict[str, float]]:
        """Return the answers of a step with their rewards, and figures about them.

        Args:
            answers: G answers of each prompt, prompt by prompt.

        Returns:
            The answers, and figures by name. This base class changes nothing.
        """
        return list(answers), {}


def encode_prompt_row(row: Mapping[str, Any], tokenizer: Any, index: int) -> PromptRow:
    """Return the prompt of a row as token ids.

    Args:
        row: The row.
        tokenizer: The model's tokenizer.
        index: Number of the row, for errors.

    Raises:
        ValueError: If the row has no prompt.
    """
    place = f"row {index}"
    prompt, tools = _prompt_of(row, index)
    reader = with_template_kwargs(tokenizer, row.get("chat_template_kwargs"), f"{place}: ")
    given = prompt
    if tools is not None:
        given = {"messages": prompt, "tools": tools}
    ids = encode_prompt(given, reader, place=place)
    if isinstance(prompt, str):
        prompt = str(prompt)
    written = repr(sorted(row.items()))
    content = hashlib.blake2b(written.encode(), digest_size=8).hexdigest()
    return PromptRow(
        ids,
        [IGNORE] * len(ids),
        row=index,
        prompt=prompt,
        source=row,
        content=content,
    )


def _prompt_of(row: Mapping[str, Any], index: int) -> tuple[Any, Any]:
    """Return the prompt of a row, as messages or RawText, and its tools."""
    prompt = row.get("prompt")
    if prompt is not None and row.get("completion") is None:
        if is_message_list(prompt):
            prompt = parse(prompt, f"row {index}")
        if isinstance(prompt, str):
            prompt = RawText(prompt)
        return prompt, row.get("tools")
    sample = as_messages(row, index)
    if not isinstance(sample, Chat):
        if not sample.prompt:
            raise ValueError(
                f"row {index}: expected a prompt to answer, got plain text. Give `prompt`, or "
                "messages."
            )
        return RawText(sample.prompt), None
    messages = sample.messages
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return messages, sample.tools


def with_answer(prompt: PromptRow, tokens: Sequence[int], **values: Any) -> Answer:
    """Return an answer behind its prompt.

    Args:
        prompt: The prompt.
        tokens: Token ids of the answer, with its end token if it has one.
        **values: Further fields of `Answer`.
    """
    ids = prompt.input_ids + list(tokens)
    labels = [IGNORE] * len(prompt) + list(tokens)
    return Answer(ids, labels, row=prompt.row, prompt=prompt, **values)


def answer_tensor(answers: Sequence[Answer], name: str) -> Tensor:
    """Return a value of every token of some answers, in the order of the labelled positions.

    Args:
        answers: The answers of a batch.
        name: A field of `Answer` with one value a token.

    Returns:
        The values, fp32 (N,).
    """
    values: list[float] = []
    for answer in answers:
        values += getattr(answer, name)
    return torch.tensor(values, dtype=torch.float32)


def token_logprobs(positions: LabelledPositions, temperature: float) -> Tensor:
    """Return log p of each labelled token.

    Args:
        positions: The output of the model.
        temperature: Temperature of the distribution.

    Returns:
        fp32 (N,).
    """

    def chunk_values(hidden: Tensor, tokens: Tensor) -> Tensor:
        logits = positions.head(hidden).float() / temperature  # (C, V)
        log_p = logits.log_softmax(-1)  # (C, V)
        return log_p.gather(1, tokens[:, None]).squeeze(1)  # (C,)

    return _chunked(chunk_values, positions)


def token_figures(positions: LabelledPositions, temperature: float) -> Tensor:
    """Return log p of each labelled token, the entropy at its place, and the size of the logits.

    log p has the bits of `token_logprobs`.

    Args:
        positions: The output of the model.
        temperature: Temperature of the distribution.

    Returns:
        fp32 (N, 4): log p, the entropy in nats, and of logits / temperature the standard deviation
        and the largest magnitude.
    """

    def chunk_values(hidden: Tensor, tokens: Tensor) -> Tensor:
        logits = positions.head(hidden).float() / temperature  # (C, V)
        log_p = logits.log_softmax(-1)  # (C, V)
        chosen = log_p.gather(1, tokens[:, None]).squeeze(1)  # (C,)
        # H = −Σ p log p
        entropy = -(log_p.exp() * log_p).sum(-1)  # (C,)
        sizes = [logits.std(-1), logits.abs().amax(-1)]  # (C,) each
        return torch.stack([chosen, entropy, *sizes], dim=1)  # (C, 4)

    return _chunked(chunk_values, positions)


def _chunked(function: Callable[..., Tensor], positions: LabelledPositions) -> Tensor:
    """Apply a function of hidden states and tokens to some positions at a time."""
    chunk = rows_at_a_time(positions.head)
    return in_chunks(function, chunk, positions.hidden, positions.targets)
