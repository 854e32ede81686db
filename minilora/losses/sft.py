"""What is learned from a row. Supervised fine-tuning is here, losses/ holds other values of the same form.

    loss_sum = sum over t with labels[t+1] != -100 of  -log p(labels[t+1] | tokens <= t)

Sum and count are returned apart, because only they can be added up over micro-batches, eval batches or processes
without a weighting error. Positions that carry no label never reach the head. The training loop and `evaluate` share
these functions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from minilora.data import IGNORE, EncodedDataset, Example, collate, encode_dataset
from minilora.lora.layer import LoRALayer
from minilora.models.padded_batch import inference
from minilora_kernels.ops.cross_entropy import head_cross_entropy

_INPUTS = ("input_ids", "attention_mask", "position_ids", "document_ids")  # of a batch, what a model reads


class Objective(Protocol):
    """From rows to a loss. All sums are over what `weight` counts (trained tokens, preference pairs, ...)."""

    better: ClassVar[tuple[str, ...]]  # further sums of which more is better: by them the best step may be chosen

    def encode(self, dataset: Any, tokenizer: Any, max_length: int | None) -> Any:
        """A sequence of examples, each with a `len` in tokens, and a printable `report` of what became of the rows."""
        ...

    def collate(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """The batch of some examples, on the CPU."""
        ...

    def weight(self, batch: dict[str, Tensor]) -> int:
        """How many a batch counts, without running the model."""
        ...

    def loss(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """(the summed loss, fp32 scalar; further sums to report, by name)."""
        ...


@dataclass(frozen=True)
class SFT:
    """Supervised fine-tuning: cross-entropy on the tokens with a label."""

    better: ClassVar[tuple[str, ...]] = ()

    def encode(self, dataset: Any, tokenizer: Any, max_length: int | None, cache: str | None = None) -> EncodedDataset:
        """`cache`: a folder in which tokenised dataset files are kept, as in `encode_dataset`."""
        return encode_dataset(dataset, tokenizer, max_length, cache=cache)

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        return padded(examples)

    def weight(self, batch: dict[str, Tensor]) -> int:
        return trained_tokens(batch)

    def loss(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return token_loss(model, batch)[0], {}


def check_supervised(objective: Objective, asked: dict[str, Any]) -> None:
    """ValueError if something is asked for (by name) that only supervised fine-tuning and its kin can do."""
    if any(asked.values()) and not isinstance(objective, SFT):
        raise ValueError(
            f"{' and '.join(asked)} belong to supervised fine-tuning; {type(objective).__name__} has samples of "
            "another form. Leave packing False and dataset_cache None."
        )


def lengths_of(examples: Sequence[Any]) -> list[int]:
    """Tokens of each example, without reading examples that lie in a file."""
    return examples.lengths if isinstance(examples, EncodedDataset) else [len(example) for example in examples]


def token_loss(model: Any, batch: dict[str, Tensor], chunk: int | None = None) -> tuple[Tensor, int]:
    """(summed loss, fp32 scalar; number of trained tokens) of a batch, as in `labelled`."""
    found = labelled(model, batch)
    return head_cross_entropy(found.hidden, found.head, found.targets, chunk), len(found.targets)


class Labelled(NamedTuple):
    """What a model says at the N positions of a batch whose next token has a label; nothing else reaches the head."""

    hidden: Tensor  # (N, D) what goes into the head
    head: nn.Module  # (N, D) -> logits (N, V)
    targets: Tensor  # (N,) the next token
    sample: Tensor  # (N,) the row of the batch


def labelled(model: Any, batch: dict[str, Tensor]) -> Labelled:
    """Run `model` on a batch with `input_ids` and `labels`, both (B, T).

    `labels` stand at their own token (not shifted). Optional: `attention_mask`, `position_ids`, `document_ids`.
    A batch on the CPU is moved to the model's device; finding the labelled positions there first costs no GPU sync.
    """
    device = next(model.parameters()).device
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE).flatten()  # (B*T,) position t predicts token t + 1
    positions = (targets != IGNORE).nonzero().squeeze(1)  # (N,)
    targets, rows = targets[positions].to(device), positions.to(device)
    inputs = {key: value.to(device) for key, value in batch.items() if key in _INPUTS}
    if hasattr(model, "hidden"):  # our decoder needs no mask for padding on the right
        inputs.pop("attention_mask", None)
        hidden, head = model.hidden(**inputs), model.get_output_embeddings()  # (B, T, D)
        if isinstance(head, LoRALayer) and not head.active:
            head = head.base_layer  # which it stays, also when its adapters are switched on again
    else:
        packed = inputs.pop("document_ids", None) is not None  # models that pass guard.check_packing go by position_ids
        logits = model(**inputs, **({"use_cache": False} if packed else {})).logits
        hidden, head = logits, nn.Identity()  # (B, T, V) its own logits
    return Labelled(hidden.flatten(0, 1)[rows], head, targets, rows // batch["labels"].shape[1])


def trained_tokens(batch: dict[str, Tensor]) -> int:
    """The N of `labelled`, without running the model."""
    return int((batch["labels"][:, 1:] != IGNORE).sum())


def padded(examples: Sequence[Example]) -> dict[str, Tensor]:
    """The batch of some examples. Any id pads, for nothing sees what stands on its right.

    Widths are multiples of 8: each new shape costs the matmul library a kernel to build and to keep (docs/LOG.md).
    """
    return collate(examples, pad_id=0, pad_to_multiple_of=8)


def mean_loss(
    model: nn.Module, examples: Sequence[Any], batch_size: int, objective: Objective | None = None
) -> tuple[float, int]:
    """(loss per trained token, number of trained tokens); one division at the end, so any batch size gives the same."""
    found, count = means(model, examples, batch_size, objective or SFT())
    return found["loss"], count


def means(
    model: nn.Module, examples: Sequence[Any], batch_size: int, objective: Objective
) -> tuple[dict[str, float], int]:
    """({"loss": its mean, and what else the objective sums up: its mean}, the number that they are means over)."""
    sums: dict[str, float] = {}
    count = 0
    lengths = lengths_of(examples)
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)  # little padding, longest first
    with inference(model):
        for start in range(0, len(order), batch_size):
            batch = objective.collate([examples[i] for i in order[start : start + batch_size]])
            loss, further = objective.loss(model, batch)
            for name, value in {"loss": loss, **further}.items():
                sums[name] = sums.get(name, 0.0) + value.item()
            count += objective.weight(batch)
    return {name: value / count for name, value in sums.items()}, count
