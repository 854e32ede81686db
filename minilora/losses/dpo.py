"""Direct preference optimisation: raise the chosen answer over the rejected one, from a reference.

    delta = (log p(y_w|x) − log p_ref(y_w|x)) − (log p(y_l|x) − log p_ref(y_l|x))

    sigmoid    loss = −log sigmoid(beta · delta)                DPO, eq. 7 (arXiv 2305.18290)
               If a preference is wrong with probability e ("conservative DPO", Mitchell 2023):
               loss = −(1−e) log sigmoid(beta · delta) − e log sigmoid(−beta · delta)
    ipo        loss = (h − 1/(2 beta))²                         IPO, eq. 17 (arXiv 2310.12036)
               h is delta with each answer's part divided by its number of tokens. TRL does the
               same, on the advice of the paper's authors.

y_w is the chosen ("won") answer, y_l the rejected ("lost") one. The reference p_ref is the same
model with its adapters disabled, so no second model is needed. It gets no gradient. Adapters that
were merged into the base before belong to the reference.

A row has a prompt and two answers; `losses/preference_rows.py` lists the forms. Prompts are masked
as in supervised fine-tuning. Means over the pairs are reported next to the loss: accuracy (share of
pairs with delta > 0), margin (beta · delta), and log p of both answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from minilora.common import check_options, option
from minilora.data import Example, encode_dataset, read_dataset
from minilora.data.dataset import Encoded
from minilora.data.report import numbers
from minilora.lora.active import disable_adapters, list_adapters
from minilora.losses.preference_rows import ANSWERS, preference_row
from minilora.losses.sft import labelled_positions, padded
from minilora.models.padded_batch import inference
from minilora_kernels.ops.cross_entropy import head_logprobs


@dataclass(frozen=True)
class DPO:
    """Train on preferences between two answers.

    Attributes:
        beta: Strength of the tie to the reference: a smaller value lets the model move farther.
        loss_type: "sigmoid" (DPO) or "ipo" (a squared distance).
        label_smoothing: e, the probability that a preference is wrong ("sigmoid" only).

    Raises:
        ValueError: If a field is out of its range, a row does not have two answers, or the model
            has no adapter.
    """

    better: ClassVar[tuple[str, ...]] = ("accuracy", "margin")

    beta: float = option(
        0.1, "tie to the reference: a smaller value lets the model move farther", above=0
    )
    loss_type: str = option(
        "sigmoid", "sigmoid (DPO) or ipo (a squared distance)", choices=("sigmoid", "ipo")
    )
    label_smoothing: float = option(
        0.0, "probability that a preference is wrong (sigmoid)", low=0, below=0.5
    )

    def __post_init__(self):
        check_options(self)
        if self.label_smoothing and self.loss_type == "ipo":
            raise ValueError(
                "label_smoothing does nothing with loss_type ipo: leave label_smoothing at 0."
            )

    def encode(self, dataset: Any, tokenizer: Any, max_length: int | None) -> Encoded:
        """Encode preference rows as pairs of answers.

        Args:
            dataset: Rows of a form of `losses/preference_rows.py`, or a path.
            tokenizer: The model's tokenizer.
            max_length: Largest number of tokens of prompt and answer; None for no limit.

        Returns:
            A `Pair` for each row in which both answers have a supervised token, with a report.

        Raises:
            ValueError: If a row is not a preference, no pair is left, or all pairs are equal.
        """
        rows = [preference_row(row, index) for index, row in enumerate(read_dataset(dataset))]
        encoded = {}
        for side in ANSWERS:
            answers = [row.side(side) for row in rows]
            encoded[side] = encode_dataset(answers, tokenizer, max_length)
        chosen = {example.row: example for example in encoded["chosen"]}
        rejected = {example.row: example for example in encoded["rejected"]}
        pairs = [Pair(chosen[row], rejected[row]) for row in chosen if row in rejected]
        if not pairs:
            raise ValueError(
                f"dataset: in none of {len(rows)} rows do both answers have a trained token: "
                f"{encoded['chosen'].report}"
            )
        equal = [pair.chosen.row for pair in pairs if pair.is_equal]
        if len(equal) == len(pairs):
            raise ValueError(
                f"dataset: both answers are equal in all {len(pairs)} pairs, as the model reads "
                "them, so there is nothing to learn. Check chosen and rejected, and raise "
                "max_length if they differ only behind it."
            )
        lines = [f"{len(pairs)} pairs of {len(rows)} rows"]
        if equal:
            lines.append(
                f"  {len(equal)} pairs have equal answers and teach nothing ({numbers(equal)})"
            )
        repeated = [index for index, row in enumerate(rows) if row.repeated]
        if repeated:
            lines.append(
                f"  {len(repeated)} rows repeat the prompt in both answers: it was taken off there "
                f"({numbers(repeated)})"
            )
        unused = sorted({key for row in rows for key in row.unused})
        if unused:
            lines.append(f"  keys not used: {', '.join(unused)}")
        for side in ANSWERS:
            lines.append(f"  {side}: {encoded[side].report}")
        return Encoded(pairs, "\n".join(lines))

    def collate(self, examples: Sequence["Pair"]) -> dict[str, Tensor]:
        """Return the batch of some pairs: all chosen answers, then all rejected ones.

        Args:
            examples: B pairs.

        Returns:
            Tensors (2B, T).
        """
        chosen = [pair.chosen for pair in examples]
        rejected = [pair.rejected for pair in examples]
        return padded(chosen + rejected)

    def weight(self, batch: dict[str, Tensor]) -> int:
        """Return the number of pairs in a batch.

        Args:
            batch: A batch of `collate`.
        """
        return len(batch["labels"]) // 2

    def loss(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch, summed over its pairs.

        Args:
            model: A model with an adapter.
            batch: A batch of `collate`.

        Returns:
            The sum, an fp32 scalar, and the sums of accuracy, margin and log p of both answers.

        Raises:
            ValueError: If the model has no adapter, and so no reference.

        Source:
            Rafailov et al. 2023, arXiv 2305.18290, eq. 7; Azar et al. 2023, arXiv 2310.12036,
            eq. 17.
        """
        if not list_adapters(model):
            raise ValueError(
                "DPO's reference is the model without its adapter, and this model has no adapter: "
                "ml.inject one first."
            )
        with inference(model), disable_adapters(model):
            reference, _ = answer_logprobs(model, batch)  # (2B,)
        answers, tokens = answer_logprobs(model, batch)  # (2B,) chosen, then rejected
        ratios = answers - reference  # (2B,) log p/p_ref
        if self.loss_type == "ipo":
            chosen, rejected = (ratios / tokens).chunk(2)  # (B,)
        else:
            chosen, rejected = ratios.chunk(2)  # (B,)
        delta = chosen - rejected  # (B,)
        losses = self._pair_losses(delta)  # (B,)

        chosen_logprob, rejected_logprob = answers.detach().chunk(2)  # (B,)
        chosen_ratio, rejected_ratio = ratios.detach().chunk(2)  # (B,)
        margins = self.beta * (chosen_ratio - rejected_ratio)  # (B,)
        return losses.sum(), {
            "accuracy": (margins > 0).float().sum(),
            "margin": margins.sum(),
            "chosen_logprob": chosen_logprob.sum(),
            "rejected_logprob": rejected_logprob.sum(),
        }

    def _pair_losses(self, delta: Tensor) -> Tensor:
        """Return the loss of each pair, (B,), from delta (B,)."""
        if self.loss_type == "ipo":
            # (h − 1/(2 beta))²
            return (delta - 1 / (2 * self.beta)).square()
        e = self.label_smoothing
        margin = self.beta * delta
        # −(1−e) log sigmoid(beta · delta) − e log sigmoid(−beta · delta)
        return -(1 - e) * F.logsigmoid(margin) - e * F.logsigmoid(-margin)


def answer_logprobs(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return log p of each row's supervised tokens, summed over the row.

    Logits exist for one chunk of positions at a time.

    Args:
        model: The model.
        batch: A batch with `input_ids` and `labels`, (B, T) each.

    Returns:
        The sums, fp32 (B,), and the number of supervised tokens of each row, (B,).
    """
    positions = labelled_positions(model, batch)
    logprobs = head_logprobs(positions.hidden, positions.head, positions.targets)  # (N,)
    rows = len(batch["labels"])
    sums = logprobs.new_zeros(rows).index_add(0, positions.sample, logprobs)  # (B,)
    return sums, positions.sample.bincount(minlength=rows)


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt. Its length is the number of tokens of both.

    Attributes:
        chosen: The preferred answer, behind its prompt.
        rejected: The other answer, behind the same prompt.
    """

    chosen: Example
    rejected: Example

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)

    @property
    def is_equal(self) -> bool:
        """True if both answers have the same tokens, so that the pair has no gradient."""
        same_tokens = self.chosen.input_ids == self.rejected.input_ids
        return same_tokens and self.chosen.labels == self.rejected.labels
