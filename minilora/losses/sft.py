"""Supervised fine-tuning, and the protocol of every objective.

    loss_sum = Σ_t −log p(labels[t+1] | tokens ≤ t)        over t with labels[t+1] ≠ −100

Sum and count are returned separately, because only they can be added up over micro-batches, eval
batches or processes without a weighting error. Positions without a label never reach the head. The
training loop and `evaluate` share these functions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from minilora.common import batch_tokens, batches_by_tokens, output_layer, unwrap_model
from minilora.common.progress import ProgressBar
from minilora.common.wrappers import is_compiled
from minilora.data import IGNORE, EncodedDataset, Example, collate, encode_dataset
from minilora.lora.layer import LoRALayer
from minilora.models.padded_batch import check_positions, inference
from minilora_kernels.ops.cross_entropy import head_cross_entropy

_MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "document_ids")


class Objective(Protocol):
    """A loss and the data that it needs.

    All sums are over the units that `weight` counts: supervised tokens, preference pairs, rows.

    Attributes:
        better: Names of further sums of which a higher value is better; the best step may be
            chosen by them.
    """

    better: ClassVar[tuple[str, ...]]

    def encode(self, dataset: Any, tokenizer: Any, max_length: int | None) -> Any:
        """Encode the rows of a dataset.

        Args:
            dataset: Rows, or a path.
            tokenizer: The model's tokenizer.
            max_length: Largest number of tokens of an example; None for no limit.

        Returns:
            A sequence of examples, each with a `len` in tokens. Its `report` describes the rows
            and can be printed.
        """
        ...

    def collate(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """Return the batch of some examples, on the CPU.

        Args:
            examples: Examples of `encode`.
        """
        ...

    def weight(self, batch: dict[str, Tensor]) -> int:
        """Return the number of units in a batch, without running the model.

        Args:
            batch: A batch of `collate`.
        """
        ...

    def loss(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch, summed over its units.

        Args:
            model: The model.
            batch: A batch of `collate`.

        Returns:
            The sum, an fp32 scalar, and further sums to report, by name.
        """
        ...


@dataclass(frozen=True)
class SFT:
    """Supervised fine-tuning: cross-entropy of the tokens that have a label."""

    better: ClassVar[tuple[str, ...]] = ()

    def encode(
        self, dataset: Any, tokenizer: Any, max_length: int | None, cache: str | None = None
    ) -> EncodedDataset:
        """Encode the rows of a dataset.

        Args:
            dataset: Rows, or a path.
            tokenizer: The model's tokenizer.
            max_length: Largest number of tokens of an example; longer ones are cut. None for no
                limit.
            cache: Folder where tokenised dataset files are kept; None keeps none.

        Returns:
            The examples with at least one supervised token, and the report about all rows.
        """
        return encode_dataset(dataset, tokenizer, max_length, cache=cache)

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Return the batch of some examples, on the CPU.

        Args:
            examples: Examples of `encode`.
        """
        return padded(examples)

    def weight(self, batch: dict[str, Tensor]) -> int:
        """Return the number of supervised tokens in a batch.

        Args:
            batch: A batch of `collate`.
        """
        return trained_tokens(batch)

    def loss(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the cross-entropy of a batch, summed over its supervised tokens.

        Args:
            model: The model.
            batch: A batch of `collate`.

        Returns:
            The sum, an fp32 scalar, and no further sums.
        """
        loss_sum, _ = token_loss(model, batch)
        return loss_sum, {}


def check_supervised(objective: Objective, asked: dict[str, Any]) -> None:
    """Refuse options that only supervised fine-tuning and its subclasses support.

    Args:
        objective: The objective of the run.
        asked: Options by name; a true value is a request.

    Raises:
        ValueError: If an option is requested with another objective.
    """
    if any(asked.values()) and not isinstance(objective, SFT):
        raise ValueError(
            f"{' and '.join(asked)} belong to supervised fine-tuning; {type(objective).__name__} "
            "has samples of another form. Leave packing False and dataset_cache None."
        )


def lengths_of(examples: Sequence[Any]) -> list[int]:
    """Return the tokens of each example, without reading examples that are stored in a file.

    Args:
        examples: Examples of an objective.
    """
    if isinstance(examples, EncodedDataset):
        return examples.lengths
    return [len(example) for example in examples]


def token_loss(
    model: Any, batch: dict[str, Tensor], chunk: int | None = None
) -> tuple[Tensor, int]:
    """Return the cross-entropy of a batch, summed over its supervised tokens.

    Args:
        model: A minilora or transformers model.
        batch: A batch as in `labelled_positions`.
        chunk: Positions whose logits exist at a time; None chooses by size.

    Returns:
        The sum, an fp32 scalar, and the number of supervised tokens.
    """
    positions = labelled_positions(model, batch)
    loss = head_cross_entropy(positions.hidden, positions.head, positions.targets, chunk)
    return loss, len(positions.targets)


class LabelledPositions(NamedTuple):
    """The model's output at the N positions of a batch whose next token has a label.

    Attributes:
        hidden: Input of the head, (N, D).
        head: Module that maps (N, D) to logits (N, V).
        targets: The next token, (N,).
        sample: Row of the batch that a position belongs to, (N,).
    """

    hidden: Tensor
    head: nn.Module
    targets: Tensor
    sample: Tensor


def labelled_positions(model: Any, batch: dict[str, Tensor]) -> LabelledPositions:
    """Run a model on a batch and select the positions whose next token has a label.

    The positions are found where the batch is, before it moves to the model's device; on a CPU this
    needs no synchronisation with the GPU.

    Args:
        model: A minilora or transformers model.
        batch: `input_ids` and `labels`, both (B, T), and optionally `attention_mask`,
            `position_ids` and `document_ids`. Labels are at their own token (not shifted).

    Returns:
        The selected positions, on the model's device.
    """
    device = next(model.parameters()).device
    width = batch["labels"].shape[1]  # T
    # Position t predicts token t + 1.
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE).flatten()  # (B*T,)
    positions = (targets != IGNORE).nonzero().squeeze(1)  # (N,)
    targets = targets[positions].to(device)  # (N,)
    positions = positions.to(device)  # (N,)
    inputs = {key: value.to(device) for key, value in batch.items() if key in _MODEL_INPUTS}
    if hasattr(unwrap_model(model), "hidden"):
        hidden, head = _run_decoder(model, inputs)  # (B, T, D)
    else:
        hidden, head = _run_transformers(model, inputs)  # (B, T, V)
    selected = hidden.flatten(0, 1)[positions]  # (N, D or V)
    return LabelledPositions(selected, head, targets, positions // width)


def _run_decoder(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, nn.Module]:
    """Return the hidden states (B, T, D) of minilora's decoder, and its head."""
    inputs.pop("attention_mask", None)  # padding is on the right, where no token attends to it
    hidden = run_hidden(model, **inputs)  # (B, T, D)
    head = output_layer(model)
    assert head is not None
    if isinstance(head, LoRALayer) and not head.active:
        # The base layer stays the head when its adapters are enabled again before backward.
        head = head.base_layer
    return hidden, head


def run_hidden(model: Any, input_ids: Tensor, **inputs: Tensor) -> Tensor:
    """Return the output of minilora's `hidden`, (B, T, D), through the wrappers of the model.

    The work of torch.compile and of DDP is done in the wrapper's `forward`, which then computes it.

    Args:
        model: A decoder of minilora, or a wrapper of one.
        input_ids: Token ids, (B, T).
        **inputs: `position_ids` and `document_ids` of `hidden`.
    """
    if model is unwrap_model(model) and not is_compiled(model):
        return model.hidden(input_ids, **inputs)
    return model(input_ids, **inputs, logits=False)


def _run_transformers(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, nn.Module]:
    """Return the logits (B, T, V) of a transformers model, and the identity as its head."""
    options = {}
    if inputs.pop("document_ids", None) is not None:
        # A model that passed `check_packing` separates packed documents by position_ids.
        options["use_cache"] = False
    logits = model(**inputs, **options).logits  # (B, T, V)
    check_positions(model, logits, inputs["input_ids"])
    return logits, nn.Identity()


def trained_tokens(batch: dict[str, Tensor]) -> int:
    """Return the number of supervised tokens in a batch, without running the model.

    Args:
        batch: A batch with `labels` (B, T).
    """
    return int((batch["labels"][:, 1:] != IGNORE).sum())


def padded(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Return the batch of some examples, padded on the right.

    Any id can pad, because no token attends to its right. Widths are multiples of 8: the matmul
    library builds and keeps a kernel for every new shape (docs/LOG.md).

    Args:
        examples: Examples with token ids and labels.

    Returns:
        The tensors of `minilora.data.collate`, (B, T) each.
    """
    return collate(examples, pad_id=0, pad_to_multiple_of=8)


def mean_loss(
    model: nn.Module,
    examples: Sequence[Any],
    batch_size: int | None,
    objective: Objective | None = None,
) -> tuple[float, int]:
    """Return the mean loss of some examples.

    Sums are divided once, at the end, so every batch size gives the same loss.

    Args:
        model: The model.
        examples: Examples of the objective.
        batch_size: Examples of the greatest length in one forward pass. Of shorter ones a pass has
            more, with as many tokens. None: examples of 4,096 tokens together.
        objective: The objective; None is supervised fine-tuning.

    Returns:
        The loss per unit (supervised token), and the number of units.
    """
    lengths = lengths_of(examples)
    batches = batches_by_tokens(lengths, batch_tokens(lengths, batch_size))
    figures, count = _means(model, examples, batches, objective or SFT())
    return figures["loss"], count


def means(
    model: nn.Module, examples: Sequence[Any], batch_size: int, objective: Objective
) -> tuple[dict[str, float], int]:
    """Return the means of an objective's sums over some examples.

    The number of forward passes depends on the number of examples alone, so it is the same in all
    processes of FSDP2.

    Args:
        model: The model.
        examples: Examples of the objective.
        batch_size: Examples in one forward pass.
        objective: The objective.

    Returns:
        The mean of "loss" and of each further sum, and the number of units they are means over.
    """
    lengths = lengths_of(examples)
    # Longest first: examples of similar length share a batch, which saves padding.
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return _means(model, examples, batches, objective)


def _means(
    model: nn.Module,
    examples: Sequence[Any],
    batches: Sequence[Sequence[int]],
    objective: Objective,
) -> tuple[dict[str, float], int]:
    """Return the means of `means`, over batches of the numbers of examples."""
    sums: dict[str, float] = {}
    count = 0
    with inference(model), ProgressBar("loss", len(examples), "row") as bar:
        for indices in batches:
            batch = objective.collate([examples[index] for index in indices])
            loss, other_sums = objective.loss(model, batch)
            for name, value in {"loss": loss, **other_sums}.items():
                sums[name] = sums.get(name, 0.0) + value.item()
            count += objective.weight(batch)
            bar.update(len(indices))
    return {name: value / count for name, value in sums.items()}, count
