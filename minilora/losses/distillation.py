"""Distillation: learn a teacher's whole distribution over the next token, not only the token that came.

    p = softmax(teacher's logits / t)      q = softmax(student's logits / t)         over the vocabulary
    forward    D = KL(p || q) = sum p (log p - log q)      covers all that the teacher may say (arXiv 1503.02531, §2)
    reverse    D = KL(q || p) = sum q (log q - log p)      keeps to what the teacher likes (arXiv 2306.08543, §2.1)
    loss = sum over the trained tokens of  alpha t^2 D + (1 - alpha) (-log q_1(token)),      q_1 at t = 1

t^2 keeps the gradient's size when t changes. With top_k, p is the teacher's k likeliest tokens, renormalised. Forward
leaves q whole, so that what the student puts elsewhere costs; reverse takes q's share of the same k tokens and
renormalises that, for elsewhere p is 0 and the divergence would be infinite.

`KLToBase` is the same with the model's own base as teacher: loss = sum of -log q(token) + kl_weight KL(q || p_base),
the penalty of learning from human feedback (arXiv 2203.02155, eq. 2; here in full, not one sample of it).

Both models read the batch, the teacher without gradient; logits exist for one chunk of positions at a time. Teacher and
student need one vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.common import check_options, option
from minilora.lora.active import disable_adapters, list_adapters
from minilora.losses.sft import SFT, Labelled, labelled
from minilora.models.loader import load_model
from minilora.models.padded_batch import inference
from minilora_kernels.ops.cross_entropy import in_chunks, rows_at_a_time


@dataclass(frozen=True)
class Distill(SFT):
    """Learn what `teacher` would say: a model, or what load_model takes. Reports mean divergence and cross-entropy."""

    teacher: nn.Module | str = field(
        repr=False, compare=False, metadata={"help": "whom to learn from: Hub id, folder or .gguf file"}
    )
    temperature: float = option(1.0, "t: above 1, unlikely tokens count for more", above=0)
    alpha: float = option(1.0, "share of the divergence in the loss; the rest is cross-entropy", low=0, high=1)
    kind: str = option("forward", "forward KL(teacher, student), or reverse", choices=("forward", "reverse"))
    top_k: int | None = option(None, "look at the teacher's k likeliest tokens only; None: at all", low=1)

    def __post_init__(self):
        check_options(self)
        if isinstance(self.teacher, str):
            object.__setattr__(self, "teacher", load_model(self.teacher))

    def loss(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        guide: Any = self.teacher
        with inference(guide):
            teacher = labelled(guide, batch)
        student = labelled(model, batch)
        kl, nll = divergences(student, teacher, self.kind, self.temperature, self.top_k)
        # alpha t^2 D + (1 - alpha) (-log q_1)
        loss = self.alpha * self.temperature**2 * kl + (1 - self.alpha) * nll
        return loss, {"kl": kl.detach(), "cross_entropy": nll.detach()}


@dataclass(frozen=True)
class KLToBase(SFT):
    """Supervised fine-tuning that pays for leaving the base: cross-entropy + kl_weight · KL(adapted || base)."""

    kl_weight: float = option(0.1, "price of a nat of divergence from the model without its adapter", low=0)

    def __post_init__(self):
        check_options(self)

    def loss(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if not list_adapters(model):
            raise ValueError(
                "KLToBase compares with the model without its adapter, and it has none: ml.inject one first."
            )
        with inference(model), disable_adapters(model):
            base = labelled(model, batch)
        adapted = labelled(model, batch)
        kl, nll = divergences(adapted, base, "reverse")
        return nll + self.kl_weight * kl, {"kl": kl.detach(), "cross_entropy": nll.detach()}


def divergences(
    student: Labelled, teacher: Labelled, kind: str, temperature: float = 1.0, top_k: int | None = None
) -> tuple[Tensor, Tensor]:
    """(sum of D, sum of -log q_1(token)) over the positions, fp32; the gradient flows into the student's side."""

    def rows(mine: Tensor, theirs: Tensor, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            p = teacher.head(theirs).float().to(mine.device)  # (C, V) logits
        q = student.head(mine).float()  # (C, V)
        if p.shape != q.shape:
            raise ValueError(
                f"teacher: its vocabulary has {p.shape[1]} tokens, the student's {q.shape[1]}: no common one."
            )
        nll = F.cross_entropy(q, tokens, reduction="none")  # (C,)
        return torch.stack([divergence(q / temperature, p / temperature, kind, top_k), nll], dim=1)  # (C, 2)

    both = in_chunks(rows, rows_at_a_time(student.head), student.hidden, teacher.hidden, student.targets)  # (N, 2)
    kl, nll = both.sum(0)
    return kl, nll


def divergence(student: Tensor, teacher: Tensor, kind: str, top_k: int | None = None) -> Tensor:
    """D of logits (C, V) each -> (C,)."""
    p, q = teacher, student.log_softmax(-1)  # (C, V) log q
    if top_k is not None and top_k < p.shape[1]:
        p, kept = p.topk(top_k)  # (C, k)
        q = q.gather(1, kept)  # (C, k)
        q = q.log_softmax(-1) if kind == "reverse" else q  # which renormalises
    p = p.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1) if kind == "forward" else (q.exp() * (q - p)).sum(-1)
