"""plan_memory: the bytes of a training run by part, from config.json alone.

    total = weights + optimiser's state + max over the step of (activations kept + gradients + what is in use)

Weights and state are exact to the byte: the model is built, quantised and given its adapters on the meta device, and
its parameters are counted. The maximum is found by walking through one step (step.py); the parts are what they are at
that moment, so they add up. Rows are taken to be full, each `max_length` tokens, all of them learned. Not in it:
Python and torch themselves, a CUDA context, what an allocator holds back, evaluation.
"""

import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora.hub import HUB_ID, download, resolve
from minilora.lora.config import LoRAConfig
from minilora.lora.registry import lora_configs
from minilora.models.config import DecoderConfig
from minilora.models.decoder import CausalLM
from minilora.models.gguf.read import GGUFCheckpoint
from minilora.models.loader import pick_dtype
from minilora.quant.nf4_linear import NF4Linear
from minilora.tools.memory_plan import fit
from minilora.tools.memory_plan.parts import PARTS, about
from minilora.tools.memory_plan.step import Step, shapes, step, stored, walked_as
from minilora.tools.plot.machine import memory
from minilora.training.config import TrainConfig
from minilora_kernels.backend import ENVIRONMENT

KEPT = 128  # steps whose stretches are remembered; each is a few numbers for a layer
_steps: OrderedDict[str, Step] = OrderedDict()  # the one used last stands last


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part at the moment when all together are most; str() is a table, with `card` also what would fit."""

    packed: int  # codes of the 4-bit layers
    scales: int  # of both levels
    dense: int  # all other weights of the base: embeddings, head, norms; without quantize the linear layers too
    adapters: int  # what trains beside the base: fp32 masters
    optimizer: int
    gradients: int
    activations: int  # kept from forward for backward
    workspace: int  # in use within a layer: a dense W, buffers; with gradient checkpointing its activations, recomputed
    logits: int  # the same in the output layer and the loss
    moment: str  # when that is
    trainable: int  # how many numbers train
    card: int | None  # bytes it is to fit in
    shapes: CausalLM = field(repr=False, compare=False)
    lora: LoRAConfig | None = field(repr=False, compare=False)
    config: TrainConfig = field(repr=False, compare=False)
    dtype: torch.dtype = field(repr=False, compare=False)
    nf4: tuple[int, bool] | None = field(repr=False, compare=False)  # (blocksize, double_quant)

    @property
    def total(self) -> int:
        """The most bytes held at a time."""
        return sum(getattr(self, part) for part in PARTS)

    @property
    def method(self) -> str:
        """qlora, lora or full."""
        return "full" if self.lora is None else "lora" if self.nf4 is None else "qlora"

    def changed(self, **to: Any) -> "MemoryPlan":
        """The plan with other values of `r`, `quantize` or fields of TrainConfig."""
        lora, nf4 = self.lora, self.nf4
        if "r" in to and lora is not None:
            lora = replace(lora, r=to.pop("r"))
        if to.pop("quantize", None):
            nf4 = nf4 or (64, True)
        same = lora is self.lora and nf4 is self.nf4
        model = self.shapes if same else shapes(self.shapes.config, lora, self.dtype, nf4)
        return _plan(model, lora, replace(self.config, **to), self.dtype, nf4, self.card)

    def most(self, name: str, card: int | str) -> int:
        """The largest `max_length`, `per_device_train_batch_size` or `r` with which the plan fits; 0 if none does."""
        return fit.most(self, name, fit.parse_bytes(card))

    def fixes(self, card: int | str) -> "dict[str, MemoryPlan]":
        """Each single change with which the plan fits `card`, in words, the smallest first; see fit.py."""
        return dict(fit.fixes(self, fit.parse_bytes(card)))

    @cached_property
    def verdict(self) -> str:
        """Whether it fits `card`, and what else would."""
        return "" if self.card is None else fit.verdict(self, self.card)

    def __str__(self) -> str:
        return "\n".join(filter(None, (table([self]), self.verdict)))

    def plot(self, path: str | Path | None = None, *others: "MemoryPlan") -> Any:
        """A matplotlib Figure, saved to `path` if given: a bar a plan, stacked by part; see plot.memory."""
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
    """What training `model` would take, in bytes by part; nothing is loaded, and no weight need be there.

    model: a Hub id or folder, of which config.json alone is read; a .gguf file; a config.json as a dict; or a loaded
        model, whose adapter, 4 bits and dtype then say what is planned.
    lora: as for `inject`; None is LoRAConfig(). With TrainConfig(method="full") every parameter trains, in fp32.
    config: as for `train`; batch size, length, accumulation, checkpointing, optimiser and precision count.
    quantize, double_quant, blocksize, dtype: as for `load_model`; "auto" is for this machine.
    card: bytes, or "24GB" (10⁹; "GiB" is 2³⁰): then str() says what fits it.

    ValueError for what `load_model`, `inject` or `train` would refuse, and for a model that is not of our families.
    """
    config, full = config or TrainConfig(), config is not None and config.method == "full"
    if isinstance(model, nn.Module):
        if lora or quantize or not isinstance(model, CausalLM):
            raise ValueError(
                "plan_memory: of a loaded model, one of load_model's, it plans what is there: only config."
            )
        lora, nf4, dtype = _of(model)
        if not (lora or full):
            raise ValueError("plan_memory: the model has no adapter: inject one, or plan its config.json.")
        shape = model.config
    else:
        shape, four_bit = _read(model)
        nf4 = (blocksize, double_quant) if quantize == "nf4" or four_bit else None
        lora = lora or (None if full else LoRAConfig())
    if quantize not in (None, "nf4"):
        raise ValueError(f"quantize must be None or 'nf4', got {quantize!r}.")
    if full and (lora or nf4):
        raise ValueError('method="full" trains every parameter in fp32: leave out lora and quantize.')
    if full and dtype not in ("auto", "float32", torch.float32):
        raise ValueError(f'method="full" keeps weights in fp32, got dtype {dtype}: bf16=True computes in 16 bits.')
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if full else pick_dtype(dtype, device)
    limit = None if card is None else fit.parse_bytes(card)
    return _plan(shapes(shape, lora, dtype, nf4), lora, config, dtype, nf4, limit)


def _plan(
    model: CausalLM, lora: LoRAConfig | None, config: TrainConfig, dtype: torch.dtype, nf4: Any, card: int | None
) -> MemoryPlan:
    trained = [p for p in model.parameters() if p.requires_grad]
    stretches, state = _step(model, lora, config, dtype, nf4)
    kept, gradients = 0, sum(p.nbytes for p in trained) * (config.gradient_accumulation_steps > 1)
    most = (-1, "", 0, 0, 0)
    for name, stretch in stretches:
        most = max(most, (kept + gradients + stretch.rise, name, kept, gradients, stretch.rise), key=lambda m: m[0])
        gradients += stretch.gradients
        kept += stretch.change - stretch.gradients
    buffers = kept  # what is left at the end is kept for the next step
    _, moment, kept, gradients, rise = most
    logits = moment in ("logits", "head")
    paged = config.optim.startswith("paged")  # in host memory
    return MemoryPlan(
        **stored(model),
        optimizer=0 if paged else state,
        gradients=gradients,
        activations=kept - buffers,
        workspace=buffers if logits else buffers + rise,
        logits=rise if logits else 0,
        moment=moment,
        trainable=sum(p.numel() for p in trained),
        card=card,
        **{"shapes": model, "lora": lora, "config": config, "dtype": dtype, "nf4": nf4},
    )


def _step(model: CausalLM, lora: LoRAConfig | None, config: TrainConfig, dtype: torch.dtype, nf4: Any) -> Step:
    """`step`, which walks once for everything that determines a walk.

    The key is text, since a config may hold lists. What is written the same is walked the same.
    """
    config = walked_as(config)
    key = repr((model.config, lora, config, dtype, nf4, os.environ.get(ENVIRONMENT)))
    found = _steps.pop(key, None) or step(model, config)
    _steps[key] = found
    while len(_steps) > KEPT:
        _steps.popitem(last=False)
    return found


def _read(source: Any) -> tuple[DecoderConfig, bool]:
    """The shape of a model, and whether its checkpoint is in 4 bits already."""
    if isinstance(source, DecoderConfig):
        return source, False
    if not isinstance(source, Mapping):
        place = Path(source).expanduser()
        if not place.exists() and HUB_ID.fullmatch(str(source)) and place.suffix != ".gguf":
            place = download(str(source), ["config.json"])
        place = resolve(place)  # says what is wrong with anything else
        if place.is_file():
            return GGUFCheckpoint(place).config, False
        source = json.loads((place / "config.json").read_text(encoding="utf-8"))
    content = dict(source)
    four_bit = bool((content.pop("quantization_config", None) or {}).get("load_in_4bit"))
    return DecoderConfig.from_hf(content), four_bit


def _of(model: CausalLM) -> tuple[LoRAConfig | None, tuple[int, bool] | None, torch.dtype]:
    """What a loaded model says of itself: adapter, 4 bits, dtype."""
    four_bit = next((m for m in model.modules() if isinstance(m, NF4Linear)), None)
    nf4 = None if four_bit is None else (four_bit.blocksize, four_bit.nested_bytes is not None)
    lora = next(iter(lora_configs(model).values()), None)
    return lora, nf4, model.model.norm.weight.dtype


def table(plans: list[MemoryPlan]) -> str:
    """Plans side by side, in GB of 10⁹ bytes."""
    rows = [["", *(plan.method for plan in plans)]]
    for part, caption in PARTS.items():
        values = [getattr(plan, part) for plan in plans]
        if any(values):
            rows.append([caption, *(f"{value / 1e9:,.3f}" if value else "-" for value in values)])
    rows.append(["total, GB", *(f"{plan.total / 1e9:,.3f}" for plan in plans)])
    rows.append(["fullest in", *(plan.moment for plan in plans)])
    rows.append(["numbers that train", *(f"{plan.trainable:,}" for plan in plans)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))])
        for first, *rest in rows
    ]
    return "\n".join([about(plans[0]), *lines])
