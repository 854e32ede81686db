"""Checks that a model trains correctly on this machine, before hours are spent on a run.

The checks are measured on the model itself and take about a minute:

    split    the gradient of a step does not depend on the micro-batches     ‖g − g₁‖ / ‖g₁‖
    eval     the eval loss does not depend on the eval batch size            |L − L₁| / L₁
    packed   logits of documents in one row, compared with each alone        ‖Δ‖ / ‖logits‖
    off      with the adapter off, the logits are those of the base          bit for bit
    frozen   hash of all weights that do not train, after training           bit for bit
    moved    every matrix B after training                                   not all zeros
    merged   logits of the merged model, compared with the unmerged one      ‖Δ‖ / ‖logits‖

`packed` is measured for models of `load_model` only; for other models it is zero.

In fp32 the bounds allow for another order of summation. In 16 bits every intermediate value is
rounded by 2⁻⁸ (bf16) or 2⁻¹¹ (fp16). The bound is a small multiple of that, and the measured
figure is printed next to it, so that a real fault stands out.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minilora.common import unwrap_model
from minilora.common.notebook import html_table
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

_WORDS = ("ab", "river", "one two", "xyz", "stone", "light")
_ROWS = [
    {"prompt": f"{count} times {word}:", "completion": f" {word}" * count}
    for count, word in enumerate(_WORDS, 1)
]
_ADAPTER = "check_training"


@dataclass(frozen=True)
class Check:
    """One measurement, which passes if `measured` is at most `bound`.

    Attributes:
        name: Short name of the check, such as "split".
        measured: The measured figure.
        bound: The largest figure that passes.
        meaning: The property that holds if the check passes, for the printed table.
    """

    name: str
    measured: float
    bound: float
    meaning: str

    @property
    def passed(self) -> bool:
        """True if the figure is within its bound; False for NaN."""
        return self.measured <= self.bound


@dataclass(frozen=True)
class TrainingCheck:
    """All checks of a model; prints as a table.

    Attributes:
        checks: The measurements, in the order of the table in the module's docstring.
    """

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """True if every check passes."""
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        lines = [f"{'check':<10}{'measured':>12}{'bound':>12}"]
        for check in self.checks:
            verdict = "ok    " if check.passed else "FAILED"
            figures = f"{check.name:<10}{check.measured:12.2e}{check.bound:12.2e}"
            lines.append(f"{figures}  {verdict}  {check.meaning}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = []
        for check in self.checks:
            verdict = "ok" if check.passed else "FAILED"
            figures = [f"{check.measured:.2e}", f"{check.bound:.2e}"]
            rows.append([check.name, *figures, verdict, check.meaning])
        return html_table(["check", "measured", "bound", "", ""], rows)


def check_training(model: nn.Module, tokenizer: Any, *, rows: Any = None) -> TrainingCheck:
    """Check that a causal language model trains correctly here.

    The function trains a small adapter for three steps and removes it. Afterwards the model is
    as it was before.

    Args:
        model: A causal language model without adapters, dense or quantised.
        tokenizer: The model's tokenizer.
        rows: At least four rows of different lengths, in any form that `train` accepts. None
            uses six short texts.

    Returns:
        The measured figures and their bounds.

    Raises:
        ValueError: The model has adapters.
    """
    model = unwrap_model(model)
    if lora_layers(model):
        raise ValueError(
            "check_training: expected a model without adapters. "
            "Call ml.eject(model) first, or load the model again."
        )
    if rows is None:
        rows = _ROWS
    examples = list(SFT().encode(rows, tokenizer, None))
    eps = _rounding(model)
    hash_before = _hash(model)
    base_logits = _logits(model, examples)
    inject(model, LoRAConfig(r=4, target_modules="all-linear"), name=_ADAPTER)
    try:
        changed_before_training = _count_changed_logits(model, examples, base_logits)
        _train_three_steps(model, tokenizer, rows)
        split = _split_check(model, examples, eps)
        evaluation = _eval_check(model, examples, eps)
        moved = _moved_check(model)
        logits = _logits(model, examples)  # (tokens, V)
        merged_logits = _logits(merge(model), examples)  # (tokens, V)
        packed_logits = _packed_logits(model, examples)  # (tokens, V)
        changed_after_training = _count_changed_logits(model, examples, base_logits)
    finally:
        eject(model)

    bound = _bound(8 * eps, fp32_bound=1e-5)
    packed = _relative_distance(packed_logits, logits)
    merged = _relative_distance(merged_logits, logits)
    changed = changed_before_training + changed_after_training
    hash_differs = float(_hash(model) != hash_before)
    return TrainingCheck(
        (
            split,
            evaluation,
            Check("packed", packed, bound, "packed documents do not see each other"),
            Check("off", changed, 0, "without the adapter, the logits are the base's bit for bit"),
            Check("frozen", hash_differs, 0, "training changed no frozen weight"),
            moved,
            Check("merged", merged, bound, "the merged model computes the same"),
        )
    )


def _rounding(model: nn.Module) -> float:
    """Return the largest eps of the model's 16-bit dtypes, or 0.0 for a model in fp32."""
    eps = 0.0
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype.itemsize == 2:
            eps = max(eps, torch.finfo(parameter.dtype).eps)
    return eps


def _bound(rounding_bound: float, fp32_bound: float) -> float:
    """Return the bound of a 16-bit model, or that of fp32 where nothing is rounded to 16 bits."""
    return rounding_bound if rounding_bound > 0 else fp32_bound


def _relative_distance(values: Tensor, reference: Tensor) -> float:
    """Return ‖values − reference‖ / ‖reference‖."""
    return ((values - reference).norm() / reference.norm()).item()


def _train_three_steps(model: nn.Module, tokenizer: Any, rows: Any) -> None:
    config = TrainConfig(
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        save_steps=None,
        disable_tqdm=True,
    )
    train(model, tokenizer, rows, config)


def _split_check(model: nn.Module, examples: Sequence[Any], eps: float) -> Check:
    """Compare the gradient of one step of four examples over micro-batches of 4, 2 and 1."""
    gradients = [_gradient(model, examples[:4], size) for size in (4, 2, 1)]
    distances = [_relative_distance(gradient, gradients[0]) for gradient in gradients]
    distance = max(distances)
    bound = _bound(8 * eps, fp32_bound=1e-5)
    return Check("split", distance, bound, "the gradient does not depend on micro-batches")


def _eval_check(model: nn.Module, examples: Sequence[Any], eps: float) -> Check:
    """Compare the eval loss at batch sizes 1, 2 and all."""
    losses = []
    for size in (1, 2, len(examples)):
        loss, _ = mean_loss(model, examples, size)
        losses.append(loss)
    # |L − L₁| / L₁, NaN if L₁ is
    distances = [abs(loss - losses[0]) / losses[0] for loss in losses]
    spread = max(distances)
    bound = _bound(4 * eps, fp32_bound=1e-6)
    return Check("eval", spread, bound, "the eval loss does not depend on its batch size")


def _moved_check(model: nn.Module) -> Check:
    """Count the layers whose B is still zero after training."""
    unmoved = []
    for path, layer in lora_layers(model).items():
        adapter: Any = layer.adapters[_ADAPTER]
        if not adapter.lora_B.detach().any():
            unmoved.append(path)
    meaning = "every B was trained"
    if unmoved:
        meaning += f": not {', '.join(unmoved[:3])}"
    return Check("moved", len(unmoved), 0, meaning)


def _gradient(model: nn.Module, examples: Sequence[Any], size: int) -> Tensor:
    """Return a step's gradient over micro-batches of `size`, all parameters as one fp64 vector."""
    objective = SFT()
    model.zero_grad()
    batches = []
    for start in range(0, len(examples), size):
        batches.append(objective.collate(examples[start : start + size]))
    count = sum(objective.weight(batch) for batch in batches)
    for batch in batches:
        loss_sum = objective.loss(model, batch)[0]
        (loss_sum / count).backward()
    gradients = []
    for parameter in model.parameters():
        if parameter.grad is not None:
            gradients.append(parameter.grad.flatten().double())  # (parameter.numel(),)
    model.zero_grad()
    return torch.cat(gradients)  # (all parameters,)


@torch.no_grad()
def _logits(model: Any, examples: Sequence[Any]) -> Tensor:
    """Return the fp64 logits of every example, computed one after the other: (tokens, V)."""
    device = next(model.parameters()).device
    parts = []
    with inference(model):
        for example in examples:
            input_ids = torch.tensor([example.input_ids], device=device)  # (1, T)
            output = model(input_ids)
            logits = getattr(output, "logits", output)  # (1, T, V)
            parts.append(logits[0].double().cpu())  # (T, V)
    return torch.cat(parts)  # (tokens, V)


@torch.no_grad()
def _packed_logits(model: Any, examples: Sequence[Any]) -> Tensor:
    """Return the logits of `_logits` from one packed row; unpacked for models of other kinds."""
    if not hasattr(model, "hidden"):
        return _logits(model, examples)
    device = next(model.parameters()).device
    batch = SFT().collate([join(examples)])
    input_ids = batch["input_ids"].to(device)  # (1, T)
    position_ids = batch["position_ids"].to(device)  # (1, T)
    document_ids = batch["document_ids"].to(device)  # (1, T)
    tokens = sum(len(example) for example in examples)
    with inference(model):
        logits = model(input_ids, position_ids, document_ids)  # (1, T, V)
        return logits[0, :tokens].double().cpu()  # (tokens, V)


def _count_changed_logits(model: nn.Module, examples: Sequence[Any], base_logits: Tensor) -> float:
    """Count the logits that differ from the base's in any bit while the adapter is off."""
    with disable_adapters(model):
        return float((_logits(model, examples) != base_logits).sum())


def _hash(model: nn.Module) -> str:
    """Return the SHA-256 of all names and values in the model's state dict."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        flat = value.detach().contiguous().cpu().flatten()  # (value.numel(),)
        digest.update(name.encode() + flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
