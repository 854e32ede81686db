"""The training loop.

    L(step) = sum of -log p(token) over the step's trained tokens / how many they are

A step is `gradient_accumulation_steps` micro-batches. Its tokens are counted before the first forward pass and every
micro-batch's summed loss is divided by that one number, so the gradient is the same however the step is split.
What requires grad trains: the adapters, fp32 masters that are cast to the base's dtype in forward. The order of the
data and the dropout of a step are functions of (seed, step), so a resumed run equals one that never stopped.
Simplified: one process, one device.
"""

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.scoring.objective import SFT, Objective, mean_loss
from minilora.train import checkpoint, guard
from minilora.train.batches import BatchPlan, seed_of
from minilora.train.config import TrainConfig
from minilora.train.log import Log
from minilora.train.optimizer import new_optimizer
from minilora.train.schedule import learning_rate, total_steps


@dataclass
class TrainResult:
    """What came out. Losses are per trained token; tokens are those read, padding aside."""

    steps: int
    loss: float | None  # of the last step
    eval_loss: float | None  # of the last evaluation
    tokens: int
    tokens_per_second: float  # of this session's steps, without evaluation and saving
    seconds: float
    peak_memory_bytes: int
    interrupted: bool
    checkpoint: Path | None  # the newest
    log: Path | None
    losses: list[float] = field(repr=False)  # one a step
    eval_losses: list[tuple[int, float]] = field(repr=False)  # (step, loss)


def train(
    model: nn.Module,
    tokenizer: Any,
    dataset: Any,
    config: TrainConfig | None = None,
    *,
    objective: Objective | None = None,
    eval_dataset: Any = None,
) -> TrainResult:
    """Train what requires grad in `model`, in place, on `dataset` (a list of rows, or a path; see minilora.data).

    objective: what is learned from a row; None is supervised fine-tuning.

    Ctrl-C ends the run cleanly: the last whole step is saved, and `interrupted` says so. Raises ValueError where
    training would be meaningless: nothing trains, no token is learned, an adapter gets no gradient at step 1, a loss
    is not finite. Seeds torch's global generator.
    """
    started, config, objective = time.perf_counter(), config or TrainConfig(), objective or SFT()
    guard.check_causal(model)
    parameters = checkpoint.trainable_parameters(model)
    device = next(iter(parameters.values())).device
    guard.reset_peak_memory(device)
    examples = objective.encode(dataset, tokenizer, config.max_length)
    print(f"train: {examples.report}")
    held_out = None if eval_dataset is None else objective.encode(eval_dataset, tokenizer, config.max_length)
    if held_out is not None:
        print(f"eval: {held_out.report}")

    plan = BatchPlan([len(example) for example in examples], config)
    total = total_steps(config, len(plan))
    optimizer = new_optimizer(parameters, config)
    autocast, scaler = guard.precision_of(model, config, device)
    folder = Path(config.output_dir) if config.output_dir is not None else None
    progress = checkpoint.Progress(plan.identity)
    saved = checkpoint.find_checkpoint(folder, config.resume_from_checkpoint)
    if saved is not None:
        progress = checkpoint.load_checkpoint(saved, model, optimizer, plan.identity)
        scaler.load_state_dict(progress.scaler)

    def save() -> None:
        nonlocal saved
        if folder is not None and progress.step > 0 and saved != (new := folder / f"checkpoint-{progress.step}"):
            progress.scaler = scaler.state_dict()
            checkpoint.save_checkpoint(new, model, optimizer, progress)
            checkpoint.delete_old_checkpoints(folder, config.save_total_limit)
            saved = new

    interrupted = False
    with Log(folder, progress, total, config) as log, guard.training_mode(model, config.gradient_checkpointing):
        try:
            while True:
                if held_out is not None and _eval_due(progress, config.eval_steps, total):
                    with autocast:
                        eval_loss, _ = mean_loss(model, held_out, config.per_device_eval_batch_size, objective)
                    progress.eval_losses.append((progress.step, eval_loss))
                    log.write(step=progress.step, eval_loss=eval_loss)
                if config.save_steps and progress.step % config.save_steps == 0:
                    with guard.uninterrupted():
                        save()
                if progress.step >= total:
                    break

                begun, step = time.perf_counter(), progress.step + 1
                rate = learning_rate(config, progress.step, total)
                samples = plan[progress.step]
                batches = [objective.collate([examples[i] for i in micro]) for micro in samples]
                torch.manual_seed(seed_of(config.seed, "dropout", step))
                optimizer.zero_grad()
                loss = _backward(model, objective, batches, autocast, scaler)
                scaler.unscale_(optimizer)
                # g <- g * min(1, max_grad_norm / |g|)
                norm = nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm or float("inf"))
                guard.check_finite(step, loss, norm, scaler.get_scale())
                if step == 1:
                    guard.check_gradients(model, parameters)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                with guard.uninterrupted():  # weights, moments and the count move together or not at all
                    scaler.step(optimizer)
                    scaler.update()
                    tokens = sum(plan.lengths[i] for micro in samples for i in micro)
                    progress.step, progress.tokens = step, progress.tokens + tokens
                    progress.losses.append(loss.item())
                    log.step(progress, tokens, time.perf_counter() - begun, rate, norm.item())
        except KeyboardInterrupt:
            interrupted = True
        with guard.uninterrupted():
            save()
            log.write(steps=progress.step, tokens=progress.tokens, seconds=log.seconds, interrupted=interrupted)
    return TrainResult(
        steps=progress.step,
        loss=progress.losses[-1] if progress.losses else None,
        eval_loss=progress.eval_losses[-1][1] if progress.eval_losses else None,
        tokens=progress.tokens,
        tokens_per_second=log.tokens_per_second,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=guard.peak_memory(device),
        interrupted=interrupted,
        checkpoint=saved,
        log=log.path,
        losses=progress.losses,
        eval_losses=progress.eval_losses,
    )


def _backward(
    model: nn.Module, objective: Objective, batches: list[dict[str, Tensor]], autocast: AbstractContextManager, scaler
) -> Tensor:
    """Add up dL/dparameter in .grad over the micro-batches of one step; returns L."""
    count = sum(map(objective.weight, batches))  # of the whole step
    losses = []
    for batch in batches:
        with autocast:
            loss_sum, _ = objective.loss(model, batch)
        scaler.scale(loss_sum / count).backward()
        losses.append(loss_sum.detach())
    return torch.stack(losses).sum() / count


def _eval_due(progress: checkpoint.Progress, every: int | None, total: int) -> bool:
    step = progress.step
    due = step == total or (every is not None and step > 0 and step % every == 0)
    return due and step not in dict(progress.eval_losses)
