"""Errors that are raised before training starts or in a step, before anything has changed.

A run that would be meaningless is refused with a remedy: a model that does not read text from left
to right, a token without an embedding, packed documents that attend to each other, a parameter
that the forward pass cuts off, a loss that is not finite.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minilora.common import named_modules, named_parameters
from minilora.common.wrappers import is_compiled, replicating_wrapper
from minilora.data.report import numbers
from minilora.lora.layer import LoRALayer
from minilora.models.padded_batch import inference
from minilora.training.config import TrainConfig


def check_causal(model: Any) -> None:
    """Refuse a model that does not read token ids from left to right.

    Args:
        model: Any model; encoder-decoders such as T5 and image encoders are refused.

    Raises:
        ValueError: If the model is not a causal language model.
    """
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    main_input = getattr(model, "main_input_name", "input_ids")
    if is_encoder_decoder or main_input != "input_ids":
        raise ValueError(
            f"train trains causal language models, and {type(model).__name__} is not one. An "
            "adapter can still be injected into it and saved: train it with your own loop over "
            "the parameters that require grad."
        )


def check_wrappers(model: nn.Module, config: TrainConfig) -> nn.Module:
    """Return the model that the steps run: compiled if it was, without the caller's DDP around it.

    Args:
        model: The model that was passed to `train`.
        config: The run.

    Raises:
        ValueError: If another wrapper spreads the model over devices, or if a compiled model is to
            be sharded.
    """
    kind = type(model)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module  # `Process.wrap` adds DDP around the loss
    wrapper = replicating_wrapper(model)
    if wrapper is not None:
        raise ValueError(
            f"train: got {kind.__name__} with a {wrapper}. `train` divides the work of a step itself: "
            "give it the model without this wrapper, and start it with torchrun; "
            "TrainConfig(fsdp=True) shards the model."
        )
    if config.fsdp and any(is_compiled(module) for module in model.modules()):
        raise ValueError(
            "fsdp: a compiled model cannot be sharded here, since shards replace its layers. Give "
            "the model without torch.compile, or leave fsdp False."
        )
    return model


def check_vocabulary(model: Any, tokenizer: Any, sets: Mapping[str, tuple[Any, Any]]) -> None:
    """Refuse data with a token that has no row in the model's embedding.

    Args:
        model: The model; its input embedding has shape (V, D).
        tokenizer: The tokenizer of the data. If it has at most V tokens, nothing is read.
        sets: For each name of a dataset, its objective and its examples.

    Raises:
        ValueError: If an example contains a token id of V or more.
    """
    vocabulary = _embedding_rows(model)
    if vocabulary is None or len(tokenizer) <= vocabulary:
        return
    for name, (objective, examples) in sets.items():
        for example in examples:
            largest = int(objective.collate([example])["input_ids"].max())
            if largest >= vocabulary:
                row = getattr(example, "row", "?")
                raise ValueError(
                    f"{name}, row {row}: {tokenizer.decode([largest])!r} has id {largest}, but the "
                    f"model's embedding has {vocabulary} rows. Use the model's own tokenizer, or "
                    "rows without the tokens that were added to it."
                )


def _embedding_rows(model: Any) -> int | None:
    """Return V of the input embedding (V, D), or None if the model does not name one."""
    get_embedding = getattr(model, "get_input_embeddings", None)
    embedding: Any = None if get_embedding is None else get_embedding()
    if embedding is None:
        return None
    return getattr(embedding, "base_layer", embedding).weight.shape[0]


def unfreeze(model: nn.Module) -> None:
    """Make every parameter trainable, for `method="full"`.

    The weights are in fp32, and autocast rounds them for each product (bf16=True). 16-bit weights
    next to fp32 masters would take the same 16 bytes a parameter (weight 4 + gradient 4 + AdamW 8,
    or 2 + 4 + 2 + 8). But 16-bit gradients round at every micro-batch, so the result would depend
    on how a batch is split.

    Args:
        model: A model without adapters whose parameters are all in fp32.

    Raises:
        ValueError: If the model has adapters or a parameter in another dtype. Nothing is changed.
    """
    if any(isinstance(module, LoRALayer) for module in model.modules()):
        raise ValueError(
            'method="full" trains the model\'s own weights, and it has adapters: ml.merge or '
            "ml.eject first."
        )
    for name, parameter in named_parameters(model):
        if parameter.dtype != torch.float32:
            raise ValueError(
                f'method="full" trains every parameter in fp32, and {name} is {parameter.dtype}: '
                'load the model with dtype="float32" and without quantize; bf16=True then computes '
                "in 16 bits."
            )
    model.requires_grad_(True)


def check_packing(model: Any) -> None:
    """Refuse packing for a model whose packed documents attend to each other.

    minilora's decoder receives document_ids and is always accepted. A transformers model is probed
    through position_ids: behind a longer document, a short document must have the logits that it
    has alone. The difference may be rounding only, compared with the difference where the short
    document does attend to the longer one.

    Args:
        model: The model to be trained.

    Raises:
        ValueError: If a packed document changes the logits of another.
    """
    if hasattr(model, "hidden"):
        return
    alone, attending, packed = _probe_packing(model)
    difference = (packed - alone).abs().max()
    reference = (attending - alone).abs().max()
    dtype = next(model.parameters()).dtype
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    if not difference < reference * tolerance:
        raise ValueError(
            f"packing: {type(model).__name__} lets packed documents see each other (logits move by "
            f"{difference:.2g}; without any separation they move by {reference:.2g}). Leave "
            "packing False, or use a model of minilora.load_model."
        )


def _probe_packing(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits (8, V) of a document: alone, attending to the one before it, and packed."""
    device = next(model.parameters()).device
    ids = torch.arange(1, 25, device=device)[None]  # (1, 24): documents of 16 and 8 tokens

    def last_logits(tokens: Tensor, positions: list[int]) -> Tensor:
        position_ids = torch.tensor([positions], device=device)  # (1, T)
        logits = model(tokens, position_ids=position_ids, use_cache=False).logits  # (1, T, V)
        return logits[0, -8:].float()  # (8, V)

    try:
        with inference(model):
            alone = last_logits(ids[:, 16:], [*range(8)])
            attending = last_logits(ids, [*range(24)])
            packed = last_logits(ids, [*range(16), *range(8)])
    except TypeError:  # the model takes no position_ids; equal tensors are refused by the caller
        zero = torch.zeros(1)
        return zero, zero, zero
    return alone, attending, packed


def check_finite(
    step: int, losses: Tensor, norm: Tensor, scale: float, samples: list[list[Any]]
) -> None:
    """Refuse a step whose loss or gradient is not finite, before the step changes anything.

    Above loss scale 1 a gradient that is not finite is an overflow of fp16's loss scaler, which
    skips the step and lowers its scale.

    Args:
        step: Number of the step, for the message.
        losses: Share of each micro-batch in the loss, fp32 (M,).
        norm: Norm of the gradient.
        scale: Loss scale of the step.
        samples: The examples of each micro-batch.

    Raises:
        ValueError: If a loss is not finite, or the norm is not at a loss scale of at most 1.
    """
    for loss, micro_batch in zip(losses, samples, strict=True):
        if not torch.isfinite(loss):
            rows = numbers(_row_numbers(micro_batch))
            raise ValueError(
                f"step {step}: the loss of {rows} is {loss.item()}. Look at these rows, lower "
                "learning_rate, or train in bf16 or fp32. At step 1 the weights or an adapter "
                "already contain NaN."
            )
    if not torch.isfinite(norm) and scale <= 1:
        raise ValueError(
            f"step {step}: the gradient is {norm.item()} and the loss is finite. Train in fp32 to "
            "find the cause."
        )


def warn_of_rising_loss(losses: Sequence[float]) -> None:
    """Warn if a run ends with a higher loss than it began with.

    The end is the mean over the last third of the steps, at most 10, because the loss of one batch is
    noisy. The start is the loss of step 1, before the first update.

    Args:
        losses: The loss of each step.
    """
    if len(losses) < 2:
        return
    last = losses[-min(10, max(1, len(losses) // 3)) :]
    end = sum(last) / len(last)
    if end > losses[0]:
        warnings.warn(
            f"the loss began at {losses[0]:.4g} and ended at {end:.4g} (mean of the last "
            f"{len(last)} steps): the run made the model worse, or its batches differ by more than "
            "it learned. Lower learning_rate, or look at the losses in the result.",
            stacklevel=2,
        )


def _row_numbers(examples: list[Any]) -> list[int]:
    """Return the dataset rows of some examples, packed or not, in order."""
    packed = []
    for example in examples:
        packed += [row for row, _ in getattr(example, "documents", ())]
    if packed:
        return sorted(packed)
    return sorted(getattr(example, "row", index) for index, example in enumerate(examples))


class GradientCheck:
    """The trained parts of a model that have not had a gradient yet.

    A *part* is an adapter of one layer, or any other trainable parameter. B starts at zero, so the
    first gradient of A is zero and that of B is not. A part has a gradient if that of one of its
    parameters is not zero.

        gradient    its module     meaning
        None        ran            the forward pass cuts it off (detach, no_grad): an error
        None        did not run    an expert without a token, a skipped layer: watched
        zero        ran            no difference in this batch: watched

    Zero is not an error. With texts of one token, attention has one key, so its softmax is 1 and
    the gradients of q and k are exactly zero. Behind a head that starts at zero every gradient is
    zero in the first step, and so it is for two equal answers of a preference. So parts without a
    gradient are watched for one pass over the data. A warning names those that had none in it.

    Attributes:
        parts: Parameters of each of these parts, by name.
        modules: The module that holds each of these parts, by the name of the part.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]):
        """Collect the trained parts.

        Args:
            model: The model that is run.
            parameters: Its trainable parameters, by name.
        """
        self.parts: dict[str, list[nn.Parameter]] = {}
        self.modules: dict[str, nn.Module] = {}
        modules = dict(named_modules(model))
        for path, layer in modules.items():
            if not isinstance(layer, LoRALayer):
                continue
            for name, adapter in layer.adapters.items():
                trained = [p for p in adapter.parameters() if p.requires_grad]
                if trained:
                    self.parts[f"{path}.adapters.{name}"] = trained
                    self.modules[f"{path}.adapters.{name}"] = layer
        in_adapters = {id(p) for trained in self.parts.values() for p in trained}
        for name, parameter in parameters.items():
            if id(parameter) not in in_adapters:
                self.parts[name] = [parameter]
                self.modules[name] = modules[name.rpartition(".")[0]]

    def after_backward(
        self, is_first: bool, run_again: Callable[[], None], total: Callable[[Tensor], Tensor]
    ) -> None:
        """Forget the parts that have a gradient now; in step 1, refuse those that are cut off.

        Args:
            is_first: True in step 1.
            run_again: Function that repeats the forward passes of the step, without gradients.
            total: Function that sums a tensor over all processes.

        Raises:
            ValueError: If a part that the forward pass of step 1 uses has no gradient tensor.
        """
        without_tensor = []
        cut_off = []
        for name, parameters in list(self.parts.items()):
            gradients = [p.grad for p in parameters if p.grad is not None]
            if not gradients:
                without_tensor.append(name)
            elif len(gradients) < len(
                parameters
            ):  # the layer ran, and a part of it has no gradient
                cut_off.append(name)
            elif any(gradient.any() for gradient in gradients):
                del self.parts[name]
        if not is_first or not self.parts:
            return
        if without_tensor:
            cut_off += self._running(without_tensor, run_again, total)
        if cut_off:
            raise ValueError(
                f"step 1: {len(cut_off)} of the trained parts got no gradient: "
                f"{_first_names(cut_off)}. The forward pass runs them and cuts them off (detach, "
                "no_grad): target other modules."
            )
        print(
            f"step 1: {len(self.parts)} of the trained parts got no gradient from these rows: "
            f"{_first_names(list(self.parts))}. They are watched for one pass over the data."
        )

    def _running(
        self,
        names: list[str],
        run_again: Callable[[], None],
        total: Callable[[Tensor], Tensor],
    ) -> list[str]:
        """Return those of some parts whose module runs in the forward pass of any process."""
        runs = torch.zeros(len(names), dtype=torch.long)  # (parts,) forward passes
        handles = []
        for index, name in enumerate(names):

            def count(module: nn.Module, inputs: Any, output: Any, index: int = index) -> None:
                runs[index] += 1

            handles.append(self.modules[name].register_forward_hook(count))
        try:
            run_again()
        finally:
            for handle in handles:
                handle.remove()
        counts = total(runs).tolist()
        return [name for name, count in zip(names, counts, strict=True) if count]

    def warn(self, steps: int) -> None:
        """Name the parts without any gradient so far in one warning, and stop watching them.

        Args:
            steps: Number of steps done.
        """
        if self.parts:
            warnings.warn(
                f"{len(self.parts)} of the trained parts had no gradient in any of the first "
                f"{steps} steps: they did not learn: {_first_names(list(self.parts))}. The loss does "
                "not depend on them for these rows, as with texts of one token, or the forward pass "
                "does not use them. Target other modules, or check the rows.",
                stacklevel=2,
            )
        self.parts = {}


def _first_names(names: list[str]) -> str:
    """Return the first three names as text."""
    more = ", ..." if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
