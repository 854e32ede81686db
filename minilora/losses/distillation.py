"""Distillation: learn a teacher's distribution over the next token, not only the token of the data.

    p = softmax(teacher logits / t)       q = softmax(student logits / t)       over the vocabulary

    forward    D = KL(p ‖ q) = Σ p (log p − log q)    q covers all tokens that the teacher considers
                                                      likely (arXiv 1503.02531, §2)
    reverse    D = KL(q ‖ p) = Σ q (log q − log p)    q stays within the tokens that the teacher
                                                      prefers (arXiv 2306.08543, §2.1)

    loss = Σ over supervised tokens of  alpha · t² · D + (1 − alpha) · (−log q_1(token))

q_1 is q at t = 1. t² keeps the size of the gradient when t changes. With `top_k`, p is restricted
to the teacher's k most likely tokens and renormalised. The forward divergence keeps q as it is, so
it grows with the probability that the student gives to other tokens. The reverse divergence
restricts q to the same k tokens and renormalises it, because p is 0 elsewhere and the divergence
would be infinite.

`KLToBase` is the same with the model's own base as the teacher:

    loss = Σ −log q(token) + kl_weight · KL(q ‖ p_base)

This is the penalty of learning from human feedback (arXiv 2203.02155, eq. 2), computed exactly
instead of from one sample.

Both models read the batch, the teacher without gradients. Logits exist for one chunk of positions
at a time. Teacher and student need the same tokenizer, because token i of one is compared with token
i of the other. Their heads may have different numbers of padding rows behind its tokens, as those of
Qwen2.5 0.5B and 7B: the divergence is then over the rows that both have.
"""

import sys
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.common import check_options, option
from minilora.data import EncodedDataset
from minilora.data.prompt import is_special
from minilora.data.tokenizer import load_tokenizer
from minilora.lora.active import disable_adapters, list_adapters
from minilora.losses.sft import SFT, LabelledPositions, labelled_positions
from minilora.models.loader import load_model
from minilora.models.padded_batch import inference
from minilora_kernels.ops.cross_entropy import in_chunks, rows_at_a_time

PADDING = 512  # rows of padding that a head may have, where the teacher's tokenizer is unknown


@dataclass(frozen=True)
class Distill(SFT):
    """Train a student on a teacher's distribution; report mean divergence and cross-entropy.

    Attributes:
        teacher: A model, or a Hub id, folder or .gguf file for `load_model`.
        temperature: t; above 1, unlikely tokens count for more.
        alpha: Share of the divergence in the loss; the rest is cross-entropy.
        kind: "forward" or "reverse".
        top_k: Number of the teacher's most likely tokens that are compared; None: all.
        token_range: Smallest and largest size of a head that fits the tokenizer; `encode` sets it.
    """

    token_range: ClassVar[tuple[int, int] | None] = None
    teacher: nn.Module | str = field(
        repr=False,
        compare=False,
        metadata={"help": "model to learn from: Hub id, folder or .gguf file"},
    )
    temperature: float = option(1.0, "t: above 1, unlikely tokens count for more", above=0)
    alpha: float = option(
        1.0, "share of the divergence in the loss; the rest is cross-entropy", low=0, high=1
    )
    kind: str = option(
        "forward", "forward KL(teacher, student), or reverse", choices=("forward", "reverse")
    )
    top_k: int | None = option(
        None, "number of the teacher's most likely tokens to compare; None: all", low=1
    )

    def __post_init__(self):
        check_options(self)
        if isinstance(self.teacher, str):
            object.__setattr__(self, "teacher", load_model(self.teacher))

    def encode(
        self, dataset: Any, tokenizer: Any, max_length: int | None, cache: str | None = None
    ) -> EncodedDataset:
        """Encode the rows of a dataset, and compare the tokenizers of teacher and student.

        Args:
            dataset: Rows, or a path.
            tokenizer: The student's tokenizer.
            max_length: Largest number of tokens of an example; None for no limit.
            cache: Folder where tokenised dataset files are kept; None keeps none.

        Returns:
            The examples with at least one supervised token, and the report about all rows.

        Raises:
            ValueError: If the teacher is known to have another tokenizer.
        """
        teachers = teacher_tokenizer(self.teacher)
        known = teachers is not None and check_same_tokens(teachers, tokenizer)
        # Behind the tokens of the tokenizer, heads have rows of padding that no text uses.
        padding = sys.maxsize if known else PADDING
        object.__setattr__(self, "token_range", (len(tokenizer), len(tokenizer) + padding))
        return super().encode(dataset, tokenizer, max_length, cache)

    def loss(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch, summed over its supervised tokens.

        Args:
            model: The student.
            batch: A batch of `collate`.

        Returns:
            The sum, an fp32 scalar, and the sums of divergence ("kl") and cross-entropy.

        Raises:
            ValueError: If the vocabularies differ by more than padding.
        """
        teacher: Any = self.teacher
        with inference(teacher):
            target = labelled_positions(teacher, batch)
        student = labelled_positions(model, batch)
        kl, nll = divergences(
            student, target, self.kind, self.temperature, self.top_k, self.token_range
        )
        # alpha · t² · D + (1 − alpha) · (−log q_1)
        loss = self.alpha * self.temperature**2 * kl + (1 - self.alpha) * nll
        return loss, {"kl": kl.detach(), "cross_entropy": nll.detach()}


@dataclass(frozen=True)
class KLToBase(SFT):
    """Supervised fine-tuning with a penalty for leaving the base model.

    Attributes:
        kl_weight: Price of one nat of KL(adapted ‖ base).
    """

    kl_weight: float = option(
        0.1, "price of one nat of divergence from the model without its adapter", low=0
    )

    def __post_init__(self):
        check_options(self)

    def loss(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch, summed over its supervised tokens.

        Args:
            model: A model with an adapter.
            batch: A batch of `collate`.

        Returns:
            The sum, an fp32 scalar, and the sums of divergence ("kl") and cross-entropy.

        Raises:
            ValueError: If the model has no adapter.
        """
        if not list_adapters(model):
            raise ValueError(
                "KLToBase compares with the model without its adapter, and this model has no "
                "adapter: ml.inject one first."
            )
        with inference(model), disable_adapters(model):
            base = labelled_positions(model, batch)
        adapted = labelled_positions(model, batch)
        kl, nll = divergences(adapted, base, "reverse")
        # −log q(token) + kl_weight · KL(q ‖ p_base)
        return nll + self.kl_weight * kl, {"kl": kl.detach(), "cross_entropy": nll.detach()}


def divergences(
    student: LabelledPositions,
    teacher: LabelledPositions,
    kind: str,
    temperature: float = 1.0,
    top_k: int | None = None,
    token_range: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the sums of D and of −log q_1(token) over the positions; only q has gradients.

    Args:
        student: The student's output.
        teacher: The teacher's output at the same tokens.
        kind: "forward" or "reverse".
        temperature: t.
        top_k: Number of the teacher's most likely tokens that are compared; None: all.
        token_range: Smallest and largest size of a head that fits the tokenizer; None allows no
            difference in size.

    Returns:
        Both sums, fp32 scalars.
    """

    def chunk_values(student_hidden: Tensor, teacher_hidden: Tensor, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            p = teacher.head(teacher_hidden).float().to(student_hidden.device)  # (C, V) logits
        q = student.head(student_hidden).float()  # (C, V) logits
        nll = F.cross_entropy(q, tokens, reduction="none")  # (C,)
        common = _common_size(p.shape[1], q.shape[1], token_range)  # v
        p = p[:, :common]  # (C, v)
        q = q[:, :common]  # (C, v)
        kl = divergence(q / temperature, p / temperature, kind, top_k)  # (C,)
        return torch.stack([kl, nll], dim=1)  # (C, 2)

    chunk = rows_at_a_time(student.head)
    values = in_chunks(
        chunk_values, chunk, student.hidden, teacher.hidden, student.targets
    )  # (N, 2)
    kl, nll = values.sum(0)
    return kl, nll


def _common_size(teacher: int, student: int, token_range: tuple[int, int] | None) -> int:
    """Return the number of tokens that two heads share; ValueError if they differ by more."""
    smallest = min(teacher, student)
    if teacher == student:
        return smallest
    size = ""
    if token_range is not None:
        size = f", and the tokenizer {token_range[0]}"
        if token_range[0] <= smallest and max(teacher, student) <= token_range[1]:
            return smallest
    raise ValueError(
        f"teacher: its vocabulary has {teacher} tokens, the student's {student}{size}. Heads may "
        "differ by padding behind the tokens of a common tokenizer only. Choose a teacher with the "
        "student's tokenizer."
    )


def teacher_tokenizer(teacher: Any) -> Any:
    """Return the tokenizer of a teacher, or None if it is not on this machine.

    Args:
        teacher: A model; those of `load_model` and of transformers know their source.
    """
    name = getattr(teacher, "name_or_path", None)
    source = name or getattr(getattr(teacher, "config", None), "_name_or_path", None)
    if not source:
        return None
    try:
        return load_tokenizer(source, local_files_only=True)
    except (OSError, ValueError):  # a folder without a tokenizer, or a model that is not cached
        return None


def check_same_tokens(teacher: Any, student: Any) -> bool:
    """Refuse two tokenizers that give one id to different tokens.

    Special tokens may have other names: a chat model often renames reserved ones.

    Args:
        teacher: The teacher's tokenizer.
        student: The student's tokenizer.

    Returns:
        True if the tokens are known to be the same, False if they cannot be listed.

    Raises:
        ValueError: If an id stands for different tokens.
    """
    if not hasattr(student, "convert_ids_to_tokens"):
        return False
    ids = list(range(min(len(teacher), len(student))))
    both = zip(
        ids,
        teacher.convert_ids_to_tokens(ids),
        student.convert_ids_to_tokens(ids),
        strict=True,
    )
    different = []
    for token_id, theirs, ours in both:
        if theirs != ours and not (is_special(teacher, token_id) and is_special(student, token_id)):
            different.append((token_id, theirs, ours))
    if different:
        token_id, theirs, ours = different[0]
        raise ValueError(
            f"teacher: it has another tokenizer: id {token_id} is {theirs!r} there and {ours!r} for "
            f"the student ({len(different)} of {len(ids)} ids differ). Distillation compares token "
            "by token: choose a teacher with the student's tokenizer."
        )
    return True


def divergence(student: Tensor, teacher: Tensor, kind: str, top_k: int | None = None) -> Tensor:
    """Return the divergence of two distributions over the vocabulary.

    Args:
        student: Logits (C, V).
        teacher: Logits (C, V).
        kind: "forward" for KL(teacher ‖ student), else KL(student ‖ teacher).
        top_k: Number of the teacher's most likely tokens that are compared; None: all.

    Returns:
        The divergence in nats, (C,).

    Source:
        Hinton et al. 2015, arXiv 1503.02531, §2; Gu et al. 2023, arXiv 2306.08543, §2.1.
    """
    log_q = student.log_softmax(-1)  # (C, V)
    if top_k is not None and top_k < teacher.shape[1]:
        teacher, tokens = teacher.topk(top_k)  # (C, k)
        log_q = log_q.gather(1, tokens)  # (C, k)
        if kind == "reverse":
            log_q = log_q.log_softmax(-1)  # (C, k) renormalised
    log_p = teacher.log_softmax(-1)  # (C, V or k)
    if kind == "forward":
        # Σ p (log p − log q)
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    # Σ q (log q − log p)
    return (log_q.exp() * (log_q - log_p)).sum(-1)
