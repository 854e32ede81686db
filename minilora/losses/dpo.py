"""Direct preference optimisation: make the chosen answer likelier than the rejected one, as seen from a reference.

    delta = (log p(y_w|x) - log p_ref(y_w|x)) - (log p(y_l|x) - log p_ref(y_l|x))
    sigmoid    loss = -log sigmoid(beta delta)                                    DPO §4, eq. 7 (arXiv 2305.18290)
               where a preference is wrong with probability e ("conservative DPO", Mitchell 2023):
               loss = -(1-e) log sigmoid(beta delta) - e log sigmoid(-beta delta)
    ipo        loss = (h - 1 / (2 beta))^2                                        IPO, eq. 17 (arXiv 2310.12036)
               h: delta with each answer's part divided by its tokens, as TRL has it on its authors' word

The reference is the same model with its adapter off: no second model, and no gradient. What was merged into the base
before belongs to the reference. A row is {prompt, chosen, rejected}; prompts are masked as in supervised training.
Reported beside the loss, means over pairs: accuracy (delta > 0), margin (beta delta), and both answers' log p.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from minilora.common import check_options, option
from minilora.data import Example, encode_dataset, read_dataset
from minilora.data.dataset import Encoded
from minilora.data.formats import shape_of
from minilora.lora.active import disable_adapters, list_adapters
from minilora.losses.sft import labelled, padded
from minilora.models.padded_batch import inference
from minilora_kernels.ops.cross_entropy import head_logprobs


@dataclass(frozen=True)
class DPO:
    """Learn from preferences. ValueError for a row without two answers, or a model without an adapter."""

    better: ClassVar[tuple[str, ...]] = ("accuracy", "margin")

    beta: float = option(0.1, "how far the model may leave the reference: the smaller, the farther", above=0)
    loss_type: str = option("sigmoid", "sigmoid (DPO) or ipo (a squared distance)", choices=("sigmoid", "ipo"))
    label_smoothing: float = option(0.0, "probability that a preference is wrong (sigmoid)", low=0, below=0.5)

    def __post_init__(self):
        check_options(self)
        if self.label_smoothing and self.loss_type == "ipo":
            raise ValueError("label_smoothing does nothing in loss_type ipo: leave it at 0.")

    def encode(self, dataset: Any, tokenizer: Any, max_length: int | None) -> Encoded:
        rows = read_dataset(dataset)
        sides = [
            encode_dataset([_side(row, i, side) for i, row in enumerate(rows)], tokenizer, max_length)
            for side in ("chosen", "rejected")
        ]
        chosen, rejected = ({example.row: example for example in side} for side in sides)
        pairs = [Pair(chosen[row], rejected[row]) for row in chosen if row in rejected]
        if not pairs:
            raise ValueError(
                f"dataset: in none of {len(rows)} rows do both answers have a trained token: {sides[0].report}"
            )
        report = f"{len(pairs)} pairs of {len(rows)} rows\n  chosen: {sides[0].report}\n  rejected: {sides[1].report}"
        return Encoded(pairs, report)

    def collate(self, examples: Sequence["Pair"]) -> dict[str, Tensor]:
        return padded([pair.chosen for pair in examples] + [pair.rejected for pair in examples])

    def weight(self, batch: dict[str, Tensor]) -> int:
        return len(batch["labels"]) // 2  # pairs

    def loss(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if not list_adapters(model):
            raise ValueError("DPO's reference is the model without its adapter, and it has none: ml.inject one first.")
        with inference(model), disable_adapters(model):
            reference, _ = answer_logprobs(model, batch)
        answers, tokens = answer_logprobs(model, batch)  # (2B,) chosen, then rejected
        ratios = answers - reference  # (2B,) log p / p_ref
        chosen, rejected = (ratios / tokens if self.loss_type == "ipo" else ratios).chunk(2)
        delta = chosen - rejected  # (B,)
        if self.loss_type == "ipo":
            # (h - 1 / (2 beta))^2
            loss = (delta - 1 / (2 * self.beta)).square()
        else:
            # -(1-e) log sigmoid(beta delta) - e log sigmoid(-beta delta)
            e, margin = self.label_smoothing, self.beta * delta
            loss = -(1 - e) * F.logsigmoid(margin) - e * F.logsigmoid(-margin)
        likely, unlikely = answers.detach().chunk(2)
        margins = self.beta * (ratios.detach()[: len(delta)] - ratios.detach()[len(delta) :])
        return loss.sum(), {
            "accuracy": (margins > 0).float().sum(),
            "margin": margins.sum(),
            "chosen_logprob": likely.sum(),
            "rejected_logprob": unlikely.sum(),
        }


def answer_logprobs(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(log p of each row's trained tokens, summed; how many they are), both (B,) in fp32, logits in chunks."""
    found = labelled(model, batch)
    logprobs = head_logprobs(found.hidden, found.head, found.targets)  # (N,)
    rows = len(batch["labels"])
    sums = logprobs.new_zeros(rows).index_add(0, found.sample, logprobs)  # (B,)
    return sums, found.sample.bincount(minlength=rows)


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt; its length counts the tokens of both."""

    chosen: Example
    rejected: Example

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)


def _side(row: Mapping[str, Any], index: int, side: str) -> dict[str, Any]:
    """A preference row as the prompt/completion row of one answer; without a prompt, what two conversations share."""
    if (shape := shape_of(row, index)) != "preference":
        raise ValueError(f"row {index}: expected prompt, chosen and rejected, got a row of the shape {shape}.")
    prompt, answer = row.get("prompt"), row[side]
    if prompt is None:
        chosen, rejected = row["chosen"], row["rejected"]
        if isinstance(chosen, str) or isinstance(rejected, str):
            raise ValueError(f"row {index}: chosen and rejected are texts and need a prompt: put it under `prompt`.")
        size = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
        if size == 0:
            raise ValueError(f"row {index}: chosen and rejected do not begin with the same messages, the prompt.")
        prompt, answer = answer[:size], answer[size:]
    others = {key: value for key, value in row.items() if key not in ("chosen", "rejected")}
    return others | {"prompt": prompt, "completion": answer}
