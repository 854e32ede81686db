"""Does this model train here as it should? Measured on the model itself, in a minute, before hours are spent on it.

    split        the gradient of a step, however the step is cut into micro-batches      ‖g − g₁‖ / ‖g₁‖
    eval         the eval loss, whatever the eval batch size                             |L − L₁| / L₁
    packed       logits of documents in one row against each alone, ‖Δ‖ / ‖logits‖      (models of load_model)
    off          with the adapter off, the base's logits                                 bit for bit
    frozen       hash of everything that does not train, after training                  bit for bit
    moved        every matrix B after training                                           none is zero
    merged       logits of the merged model against the unmerged one, ‖Δ‖ / ‖logits‖     a rounding of the weights

In fp32 the bounds are what another order of summation costs. In 16 bits rounding is 2⁻⁸ (bf16) or 2⁻¹¹ (fp16) of every
intermediate value; the figure is printed beside a bound of a few of those, so that a real fault stands out.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minilora.data.packing import join
from minilora.lora.active import disable_adapters
from minilora.lora.config import LoRAConfig
from minilora.lora.inject import eject, inject
from minilora.lora.merging.merge import merge
from minilora.lora.registry import lora_layers
from minilora.losses.sft import SFT, mean_loss
from minilora.models.padded_batch import inference
from minilora.training.config import TrainConfig
from minilora.training.loop import train

WORDS = ("ab", "river", "one two", "xyz", "stone", "light")
ROWS = [{"prompt": f"{n} times {word}:", "completion": f" {word}" * n} for n, word in enumerate(WORDS, 1)]


@dataclass(frozen=True)
class Check:
    """One measurement: passed if `measured` is at most `bound`."""

    name: str
    measured: float
    bound: float
    meaning: str

    @property
    def passed(self) -> bool:
        return self.measured <= self.bound  # False for NaN


@dataclass(frozen=True)
class TrainingCheck:
    """All checks of a model; prints as a table."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        lines = [f"{'check':<10}{'measured':>12}{'bound':>12}"]
        for c in self.checks:
            lines.append(
                f"{c.name:<10}{c.measured:12.2e}{c.bound:12.2e}  {'ok    ' if c.passed else 'FAILED'}  {c.meaning}"
            )
        return "\n".join(lines)


def check_training(model: nn.Module, tokenizer: Any, *, rows: Any = None) -> TrainingCheck:
    """Measure a causal language model without adapters; afterwards it is as it was.

    rows: at least four of different lengths, anything that `train` takes; None takes a few short texts.
    ValueError for a model that has adapters.
    """
    if lora_layers(model):
        raise ValueError("check_training: expected a model without adapters: ml.eject(model) first, or load it anew.")
    examples = list(SFT().encode(ROWS if rows is None else rows, tokenizer, None))
    low = {p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize == 2}
    eps = max((torch.finfo(dtype).eps for dtype in low), default=0.0)  # of the dtype that it computes in
    before, base = _hash(model), _logits(model, examples)
    inject(model, LoRAConfig(r=4, target_modules="all-linear"), name="check_training")
    try:
        off = _off(model, examples, base)
        config = TrainConfig(max_steps=3, per_device_train_batch_size=4, learning_rate=1e-3, save_steps=None,
                             disable_tqdm=True)  # fmt: skip
        train(model, tokenizer, ROWS if rows is None else rows, config)
        splits = [_gradient(model, examples[:4], size) for size in (4, 2, 1)]
        losses = [mean_loss(model, examples, size)[0] for size in (1, 2, len(examples))]
        still = [path for path, layer in lora_layers(model).items() if not _ups(layer).any()]
        logits, merged = _logits(model, examples), _logits(merge(model), examples)
        packed = ((_packed(model, examples) - logits).norm() / logits.norm()).item()
        off += _off(model, examples, base)
    finally:
        eject(model)
    split = max(((g - splits[0]).norm() / splits[0].norm()).item() for g in splits)
    spread = max(abs(loss - losses[0]) / losses[0] for loss in losses)
    distance = ((merged - logits).norm() / logits.norm()).item()
    return TrainingCheck(
        (
            Check("split", split, 8 * eps or 1e-5, "the gradient does not depend on micro-batches"),
            Check("eval", spread, 4 * eps or 1e-6, "the eval loss does not depend on its batch size"),
            Check("packed", packed, 8 * eps or 1e-5, "packed documents do not see each other"),
            Check("off", off, 0, "without the adapter: the base's bits"),
            Check("frozen", float(_hash(model) != before), 0, "nothing else was changed by training"),
            Check("moved", len(still), 0, f"every B was trained{': not ' + ', '.join(still[:3]) if still else ''}"),
            Check("merged", distance, 8 * eps or 1e-5, "the merged model computes the same"),
        )
    )


def _gradient(model: nn.Module, examples: Sequence[Any], size: int) -> Tensor:
    """The step's gradient over micro-batches of `size`, all parameters as one vector."""
    model.zero_grad()
    batches = [SFT().collate(examples[i : i + size]) for i in range(0, len(examples), size)]
    count = sum(map(SFT().weight, batches))
    for batch in batches:
        (SFT().loss(model, batch)[0] / count).backward()
    found = torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


@torch.no_grad()
def _logits(model: Any, examples: Sequence[Any]) -> Tensor:
    """fp64 logits of every example, one after the other: (tokens, V)."""
    device = next(model.parameters()).device
    found = []
    with inference(model):
        for example in examples:
            out = model(torch.tensor([example.input_ids], device=device))
            found.append(getattr(out, "logits", out)[0].double().cpu())
    return torch.cat(found)


@torch.no_grad()
def _packed(model: Any, examples: Sequence[Any]) -> Tensor:
    """The logits of `_logits` from one packed row; a model of another kind is read as it is, alone."""
    if not hasattr(model, "hidden"):
        return _logits(model, examples)
    batch = SFT().collate([join(examples)])
    inputs = (batch[key].to(next(model.parameters()).device) for key in ("input_ids", "position_ids", "document_ids"))
    with inference(model):
        return model(*inputs)[0, : sum(map(len, examples))].double().cpu()


def _off(model: nn.Module, examples: Sequence[Any], base: Tensor) -> float:
    with disable_adapters(model):
        return float((_logits(model, examples) != base).sum())


def _ups(layer: Any) -> Tensor:
    return layer.adapters["check_training"].lora_B.detach()


def _hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
