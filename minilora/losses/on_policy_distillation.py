"""On-policy distillation: the student writes, and the teacher shows what it would have written.

    o ~ q           the student's own answer, sampled in training
    D = KL(q ‖ p) = Σ q (log q − log p)         over the vocabulary, at each token of o
    loss = Σ over the tokens of o of D

Off-policy distillation (losses/distillation.py) shows the student texts that it would not write
itself. Here it learns at the places where its own answers lead, mistakes included. The divergence
is computed exactly at each token; that o was sampled from q gets no gradient (arXiv 2306.13649,
§3).

The teacher p is one of three:

    teacher            another model with the same tokenizer
    None               the base: the model with its adapter off
    teacher_system     with either: a system message that only the teacher reads, such as rules. The
                       student learns to follow them without reading them ("context distillation").
                       A row may have its own `teacher_prompt` instead: a text or messages.

The loss is 0 at best, where the student answers as the teacher does.
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from minilora.common import option
from minilora.data import IGNORE, Example, RawText, encode_prompt
from minilora.data.dataset import Encoded
from minilora.lora.active import disable_adapters
from minilora.losses.distillation import (
    PADDING,
    check_same_tokens,
    divergences,
    teacher_tokenizer,
)
from minilora.losses.on_policy import Answer, OnPolicy, PromptRow
from minilora.losses.sft import labelled_positions, padded, trained_tokens
from minilora.models.loader import load_model
from minilora.models.padded_batch import inference

PREFIX = "teacher_"  # of the tensors that the teacher reads


@dataclass(frozen=True)
class TaughtPrompt(PromptRow):
    """A prompt, and the prompt that the teacher reads in its place.

    Attributes:
        teacher_ids: Token ids of the teacher's prompt.
    """

    teacher_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class OnPolicyDistill(OnPolicy):
    """Learn a teacher's distribution on the student's own answers.

    Attributes:
        teacher: A model, or a Hub id, folder or .gguf file; None is the base, without the adapter.
        teacher_system: A system message that only the teacher reads.
        top_k: Number of the teacher's most likely tokens that are compared; None: all.
        token_range: Smallest and largest size of a head that fits the tokenizer; `encode` sets it.
    """

    token_range: ClassVar[tuple[int, int] | None] = None
    num_generations: int = option(1, "G: answers that are sampled for each prompt", low=1)
    teacher: nn.Module | str | None = field(
        default=None,
        repr=False,
        compare=False,
        metadata={"help": "Hub id, folder or .gguf file; None is the model without its adapter"},
    )
    teacher_system: str | None = option(None, "system message that only the teacher reads")
    top_k: int | None = option(
        None, "number of the teacher's most likely tokens to compare; None: all", low=1
    )

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.teacher, str):
            object.__setattr__(self, "teacher", load_model(self.teacher))

    @property
    def needs_base(self) -> bool:
        """True if the base is the teacher."""
        return self.teacher is None

    def encode(self, dataset: Any, tokenizer: Any, max_length: int | None) -> Encoded:
        """Encode the prompts of a dataset, for the student and for the teacher.

        Args:
            dataset: Rows with a prompt, or a path.
            tokenizer: The model's tokenizer.
            max_length: Largest number of tokens of the student's prompt and answer; None for no
                limit.

        Returns:
            A `TaughtPrompt` for each row, with a report.

        Raises:
            ValueError: If a row has no prompt, the teacher is known to have another tokenizer, or
                the base is the teacher of every prompt and reads nothing else than the student.
        """
        teachers = None
        if self.teacher is not None:
            teachers = teacher_tokenizer(self.teacher)
        known = teachers is not None and check_same_tokens(teachers, tokenizer)
        padding = sys.maxsize if known else PADDING
        object.__setattr__(self, "token_range", (len(tokenizer), len(tokenizer) + padding))
        prompts = super().encode(dataset, tokenizer, max_length)
        taught = [self._taught(prompt, tokenizer) for prompt in prompts]
        different = [p for p in taught if list(p.teacher_ids) != p.input_ids]
        if self.teacher is None and not different:
            raise ValueError(
                "teacher: the base reads the same prompts as the student and would only undo its "
                "adapter. Give a teacher model, teacher_system, or rows with teacher_prompt."
            )
        return Encoded(taught, prompts.report)

    def _taught(self, prompt: PromptRow, tokenizer: Any) -> TaughtPrompt:
        """Return a prompt with the tokens that the teacher reads."""
        shown = prompt.source.get("teacher_prompt")
        given = prompt.prompt
        if isinstance(given, str):
            given = RawText(given)
        if shown is None and self.teacher_system is not None:
            shown = with_system(given, self.teacher_system)
        if shown is None:
            ids = prompt.input_ids
        else:
            if isinstance(shown, str):
                shown = RawText(shown)
            ids = encode_prompt(shown, tokenizer, place=f"row {prompt.row}, the teacher's prompt")
        return TaughtPrompt(
            prompt.input_ids,
            prompt.labels,
            row=prompt.row,
            prompt=prompt.prompt,
            source=prompt.source,
            content=prompt.content,
            teacher_ids=tuple(ids),
        )

    def collate(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """Return the batch of some answers, on the CPU.

        Args:
            examples: B answers, or prompts.

        Returns:
            The tensors of `padded` for the student, and with "teacher_" before their names those
            for the teacher.
        """
        batch = padded(examples)
        if not isinstance(examples[0], Answer):
            return batch
        taught = [_for_teacher(answer) for answer in examples]
        for name, tensor in padded(taught).items():
            batch[PREFIX + name] = tensor
        return batch

    def weight(self, batch: dict[str, Tensor]) -> int:
        """Return the number of sampled tokens in a batch.

        Args:
            batch: A batch of `collate`.
        """
        return trained_tokens(batch)

    def loss(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the divergence of a batch, summed over the tokens of its answers.

        Args:
            model: The student.
            batch: A batch of `collate`.

        Returns:
            The sum, an fp32 scalar, and the sum of "surprise": −log q of the sampled tokens.

        Source:
            Agarwal et al. 2023, arXiv 2306.13649, §3.
        """
        taught = {}
        for name, tensor in batch.items():
            if name.startswith(PREFIX):
                taught[name.removeprefix(PREFIX)] = tensor
        teacher: Any = self.teacher
        base = nullcontext()
        if teacher is None:
            teacher = model
            base = disable_adapters(model)
        with inference(teacher), base:
            target = labelled_positions(teacher, taught)
        student = labelled_positions(model, batch)
        # Σ KL(q ‖ p)
        kl, nll = divergences(
            student, target, "reverse", self.temperature, self.top_k, self.token_range
        )
        return kl, {"surprise": nll.detach()}


def with_system(prompt: Any, system: str) -> Any:
    """Return a prompt behind a system message; a plain text gets it as a first paragraph.

    Args:
        prompt: Messages or a text. Earlier system messages stay behind the new text.
        system: The message.
    """
    if isinstance(prompt, str):
        return f"{system}\n\n{prompt}"
    messages = list(prompt)
    if messages and messages[0].get("role") == "system":
        system = f"{system}\n\n{messages[0]['content']}"
        messages = messages[1:]
    return [{"role": "system", "content": system}, *messages]


def _for_teacher(answer: Answer) -> Example:
    """Return an answer behind the prompt of the teacher."""
    prompt = answer.prompt
    assert isinstance(prompt, TaughtPrompt)
    tokens = answer.input_ids[len(prompt) :]
    taught = list(prompt.teacher_ids)
    labels = [IGNORE] * len(taught) + answer.labels[len(prompt) :]
    return Example(taught + tokens, labels, row=answer.row)
