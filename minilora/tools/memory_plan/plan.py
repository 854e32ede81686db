"""Memory of a training run by part, from config.json alone.

    total = weights + optimiser state + max over the step of (activations kept + gradients + in use)

Weights and optimiser state are exact to the byte: the model is built, quantised and given its
adapters on the meta device, and its parameters are counted. The maximum is found by walking through
one training step (step.py). The parts are those of the moment of the maximum, so they add up.

Simplified: all rows are full, each with `max_length` tokens, all of them supervised. The plan does
not contain Python and torch themselves, a CUDA context, memory that an allocator holds in reserve,
or evaluation.
"""

import os
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from minilora.common import column_widths, unwrap_model
from minilora.common.notebook import html_text
from minilora.lora.config import LoRAConfig
from minilora.models.decoder import CausalLM
from minilora.models.loader import pick_dtype
from minilora.tools.memory_plan import fit
from minilora.tools.memory_plan.base import FOUR_BIT_FOLDER, Bits, read_config, settings_of
from minilora.tools.memory_plan.meter import Stretch
from minilora.tools.memory_plan.parts import PARTS, about
from minilora.tools.memory_plan.step import Step, shapes, step, stored, walked_as
from minilora.tools.plot.machine import memory
from minilora.training.config import TrainConfig
from minilora_kernels.backend import ENVIRONMENT

_CACHE_SIZE = 128  # steps to remember; each is a few numbers for a layer
_step_cache: OrderedDict[str, Step] = OrderedDict()  # the most recently used step is the last


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a training run by part, at the moment of the peak.

    `str()` of a plan is a table, with a verdict if `card` is given.

    Attributes:
        packed: Codes of the 4-bit layers.
        scales: Scales of the 4-bit layers, at both levels.
        dense: All other weights of the base: embeddings, head and norms, and without
            quantisation the linear layers too.
        adapters: Trainable parameters that are added to the base, as fp32 masters.
        optimizer: State of the optimiser on the device.
        gradients: Gradients of the trainable parameters.
        activations: Activations that forward keeps for backward.
        workspace: Memory in use within a layer: a dequantised W, buffers, and with gradient
            checkpointing the recomputed activations.
        logits: Memory in use within the output layer and the loss.
        moment: Part of the step in which the peak occurs.
        trainable: Number of trainable parameters.
        card: Bytes that the run should fit into, or None.
        shapes: The model on the meta device.
        lora: Config of the adapter; None trains every parameter.
        config: Config of the run.
        dtype: dtype of dense weights.
        bits: Storage of the base (base.py); None is dense.
    """

    packed: int
    scales: int
    dense: int
    adapters: int
    optimizer: int
    gradients: int
    activations: int
    workspace: int
    logits: int
    moment: str
    trainable: int
    card: int | None
    shapes: CausalLM = field(repr=False, compare=False)
    lora: LoRAConfig | None = field(repr=False, compare=False)
    config: TrainConfig = field(repr=False, compare=False)
    dtype: torch.dtype = field(repr=False, compare=False)
    bits: Bits = field(repr=False, compare=False)

    @property
    def total(self) -> int:
        """Peak memory in bytes."""
        return sum(getattr(self, part) for part in PARTS)

    @property
    def method(self) -> str:
        """Method of training: "qlora", "lora" or "full"."""
        if self.lora is None:
            return "full"
        return "lora" if self.bits is None else "qlora"

    def changed(self, **to: Any) -> "MemoryPlan":
        """Return the plan with other settings.

        Args:
            to: New values of `r`, `quantize` ("nf4") or fields of TrainConfig.
        """
        lora = self.lora
        bits = self.bits
        model = self.shapes
        if "r" in to and lora is not None:
            lora = replace(lora, r=to.pop("r"))
        if to.pop("quantize", None) and bits is None:
            bits = (64, True)
        if lora is not self.lora or bits is not self.bits:
            model = shapes(model.config, lora, self.dtype, bits)
        return _plan(model, lora, replace(self.config, **to), self.dtype, bits, self.card)

    def most(self, name: str, card: int | str) -> int:
        """Return the largest value of a field with which the plan fits, or 0 if no value fits.

        Args:
            name: "max_length", "per_device_train_batch_size" or "r".
            card: Memory in bytes, or a text such as "24GB".

        Raises:
            ValueError: If `name` is another field, or `card` is not a size.
        """
        return fit.most(self, name, fit.parse_bytes(card))

    def fixes(self, card: int | str) -> "dict[str, MemoryPlan]":
        """Return each single change with which the plan fits, the smallest first; see fit.py.

        Args:
            card: Memory in bytes, or a text such as "24GB".

        Returns:
            Plans by their change, written as keyword arguments.

        Raises:
            ValueError: If `card` is not a size.
        """
        return dict(fit.fixes(self, fit.parse_bytes(card)))

    @cached_property
    def verdict(self) -> str:
        """Text that states if the plan fits `card`; empty without a card."""
        return "" if self.card is None else fit.verdict(self, self.card)

    def __str__(self) -> str:
        text = table([self])
        return f"{text}\n{self.verdict}" if self.verdict else text

    def _repr_html_(self) -> str:
        return html_text(str(self))

    def plot(self, path: str | Path | None = None, *others: "MemoryPlan") -> Any:
        """Draw this plan and others as bars that are stacked by part; see plot.memory.

        Args:
            path: File to save the figure to; None saves nothing.
            others: Further plans, a bar each.

        Returns:
            The matplotlib Figure.
        """
        return memory([self, *others], path)


def plan_memory(
    model: Any,
    lora: LoRAConfig | None = None,
    config: TrainConfig | None = None,
    *,
    quantize: str | None = None,
    double_quant: bool = True,
    blocksize: int = 64,
    dtype: torch.dtype | str = "auto",
    card: int | str | None = None,
) -> MemoryPlan:
    """Compute the memory of training a model, in bytes by part. No weight is loaded.

    Args:
        model: A Hub id or folder, of which only config.json is read; a .gguf file; a config.json
            as a dict; or a loaded model, which determines adapter, quantisation and dtype.
        lora: Config for `inject`. None is LoRAConfig(), or every parameter with
            TrainConfig(method="full"), which trains in fp32.
        config: Config for `train`; None is TrainConfig(). Memory depends on batch size, length,
            accumulation, checkpointing, optimiser and precision.
        quantize: "nf4" for 4-bit linear layers; "keep" for the layers of a quantised .gguf file as
            they are; None for dense ones.
        double_quant: Quantise the scales too; the default is True.
        blocksize: Number of weights that share a scale.
        dtype: dtype of dense weights; "auto" chooses one for this machine.
        card: Memory of the GPU in bytes, or a text such as "24GB" (10⁹ bytes) or "24GiB" (2³⁰).
            With it, str() of the plan states if the run fits. None gives no verdict.

    Returns:
        The plan.

    Raises:
        ValueError: If `load_model`, `inject` or `train` would refuse the settings, or the
            architecture is not supported.
    """
    config = config or TrainConfig()
    if quantize not in (None, "nf4", "keep"):
        raise ValueError(f"quantize must be None, 'nf4' or 'keep', got {quantize!r}.")
    full = config.method == "full"
    if isinstance(model, nn.Module):
        model = unwrap_model(model)
        if lora or quantize or not isinstance(model, CausalLM):
            raise ValueError(
                "plan_memory: a loaded model, which load_model must have made, determines its "
                "adapter and quantisation. Give only config."
            )
        lora, bits, dtype = settings_of(model)
        if lora is None and not full:
            raise ValueError(
                "plan_memory: the model has no adapter. Inject one, or plan its config.json."
            )
        decoder_config = model.config
    else:
        decoder_config, bits = read_config(model, quantize == "keep")
        if quantize == "nf4" or bits == FOUR_BIT_FOLDER:
            bits = (blocksize, double_quant)
        if lora is None and not full:
            lora = LoRAConfig()
    if full:
        _check_full(lora, bits, dtype)
        dtype = torch.float32
    else:
        dtype = pick_dtype(dtype, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    limit = None if card is None else fit.parse_bytes(card)
    return _plan(shapes(decoder_config, lora, dtype, bits), lora, config, dtype, bits, limit)


def _check_full(lora: LoRAConfig | None, bits: Bits, dtype: torch.dtype | str) -> None:
    """Refuse settings that contradict method="full"."""
    if lora or bits:
        raise ValueError(
            'method="full" trains every parameter in fp32: leave out lora and quantize.'
        )
    if dtype not in ("auto", "float32", torch.float32):
        raise ValueError(
            f'method="full" keeps weights in fp32, got dtype {dtype}. '
            "bf16=True computes in 16 bits."
        )


class _Peak(NamedTuple):
    """The moment of a step in which most memory is in use, in bytes."""

    total: int
    moment: str
    activations: int
    gradients: int
    rise: int


def _plan(
    model: CausalLM,
    lora: LoRAConfig | None,
    config: TrainConfig,
    dtype: torch.dtype,
    bits: Bits,
    card: int | None,
) -> MemoryPlan:
    """Return the plan of a model on the meta device."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    stretches, optimizer_state = _step(model, lora, config, dtype, bits)
    # with accumulation, the gradients exist before the second micro-batch begins
    gradients = 0
    if config.gradient_accumulation_steps > 1:
        gradients = sum(p.nbytes for p in trainable)
    peak, buffers = _find_peak(stretches, gradients)
    workspace = buffers
    logits = 0
    if peak.moment in ("logits", "head"):
        logits = peak.rise
    else:
        workspace += peak.rise
    in_host_memory = config.optim.startswith("paged")
    return MemoryPlan(
        **stored(model),
        optimizer=0 if in_host_memory else optimizer_state,
        gradients=peak.gradients,
        activations=peak.activations - buffers,
        workspace=workspace,
        logits=logits,
        moment=peak.moment,
        trainable=sum(p.numel() for p in trainable),
        card=card,
        shapes=model,
        lora=lora,
        config=config,
        dtype=dtype,
        bits=bits,
    )


def _find_peak(stretches: list[tuple[str, Stretch]], gradients: int) -> tuple[_Peak, int]:
    """Return the peak of a step, and the bytes of buffers that remain for the next step."""
    activations = 0
    peak = _Peak(-1, "", 0, 0, 0)
    for name, stretch in stretches:
        total = activations + gradients + stretch.rise
        if total > peak.total:
            peak = _Peak(total, name, activations, gradients, stretch.rise)
        gradients += stretch.gradients
        activations += stretch.change - stretch.gradients
    return peak, activations


def _step(
    model: CausalLM,
    lora: LoRAConfig | None,
    config: TrainConfig,
    dtype: torch.dtype,
    bits: Bits,
) -> Step:
    """Return `step` from a cache, whose key is everything that determines the result.

    The key is text, because a config may hold lists, which are not hashable.
    """
    config = walked_as(config)
    key = repr((model.config, lora, config, dtype, bits, os.environ.get(ENVIRONMENT)))
    result = _step_cache.pop(key, None) or step(model, config)
    _step_cache[key] = result
    while len(_step_cache) > _CACHE_SIZE:
        _step_cache.popitem(last=False)
    return result


def table(plans: list[MemoryPlan]) -> str:
    """Return a table of plans, a column each, in GB of 10⁹ bytes.

    Args:
        plans: At least one plan. The first one gives the title.
    """
    rows = [["", *(plan.method for plan in plans)]]
    for part, caption in PARTS.items():
        values = [getattr(plan, part) for plan in plans]
        if any(values):
            rows.append([caption, *(_gigabytes(value) for value in values)])
    rows.append(["total, GB", *(_gigabytes(plan.total) for plan in plans)])
    rows.append(["peak during", *(plan.moment for plan in plans)])
    rows.append(["trainable parameters", *(f"{plan.trainable:,}" for plan in plans)])
    widths = column_widths(rows)
    lines = [about(plans[0])]
    for caption, *values in rows:
        cells = [caption.ljust(widths[0])]
        for value, width in zip(values, widths[1:], strict=True):
            cells.append(value.rjust(width))
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _gigabytes(size: int) -> str:
    """Return a number of bytes in GB, or a dash for zero."""
    return f"{size / 1e9:,.3f}" if size else "-"
