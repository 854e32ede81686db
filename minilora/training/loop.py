"""The training loop.

    L = (1/N) Σ_m Σ_{t in m} −log p(token_t)        g = ∂L/∂parameter

A step consists of micro-batches m. N is the number of supervised tokens of the whole step, over all
micro-batches and all processes (for DPO: the number of pairs, and so on for other objectives).

The objective returns the *sum* over the tokens of one micro-batch. `_backward` multiplies it by two
factors:

    weight / N    The division by N. N is counted before the first forward pass, so every
                  micro-batch is divided by the same number. weight is 1; it is 0 for a micro-batch
                  that only keeps a process in step with the others (training/distributed.py).
    world size    DDP and FSDP2 average the gradients over the processes, and L is a sum over them.
                  The factor undoes the division of the average; it is 1 in a single process.

Every micro-batch is divided by the N of the step, not by its own number of tokens. The gradients of
the micro-batches therefore add up to g, and the split of a step into micro-batches does not matter.
Two things limit this: the sums are rounded in another order, and dropout draws other numbers.

The parameters that require grad are trained: the adapters, which are stored in fp32 and cast to the
dtype of x in the forward pass. The order of the data and the dropout of a step are functions of
(seed, step, micro-batch), so a resumed run equals one that was never stopped.

`train` shows the order of the parts: set up (training/run.py), go through the steps (save,
evaluate, step), finish. In fp16 a third factor, the loss scale, multiplies L during the backward
pass and is taken off before the update (training/precision.py).
"""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.common import unwrap_model
from minilora.losses.sft import Objective
from minilora.training import checks
from minilora.training.batch_sampler import seed_of
from minilora.training.checkpoint import Progress
from minilora.training.config import TrainConfig
from minilora.training.logs.callbacks import StepInfo
from minilora.training.logs.metrics_log import Log
from minilora.training.logs.result import TrainResult
from minilora.training.logs.run_facts import describe_run, write_run
from minilora.training.optim.lr_schedule import learning_rate
from minilora.training.optim.neftune import noisy_embeddings
from minilora.training.process import Process, full, main_speaks
from minilora.training.run import Run, set_up
from minilora.training.run_folder import checked_folder
from minilora.training.runtime import (
    memory_explained,
    peak_memory,
    training_mode,
    uninterrupted,
)


@main_speaks()
def train(
    model: nn.Module,
    tokenizer: Any,
    dataset: Any,
    config: TrainConfig | None = None,
    *,
    objective: Objective | None = None,
    eval_dataset: Any = None,
    callbacks: Sequence[Any] = (),
) -> TrainResult:
    """Train the parameters of `model` that require grad, in place.

    Ctrl-C ends the run: an update that has begun is completed, the last complete step is saved, and
    the result is marked as interrupted. The call seeds torch's global generator.

    Args:
        model: A minilora or transformers causal language model, with an adapter unless
            `config.method` is "full". A model that torch.compile has wrapped is trained through
            the compiled forward.
        tokenizer: The model's tokenizer.
        dataset: The rows: a list or iterable of dicts, or a path (see `minilora.data`).
        config: The options of the run; None takes the defaults.
        objective: The loss and its data (`minilora/losses`); None is supervised fine-tuning.
        eval_dataset: Held-out rows, or a dict {name: rows}. The first set is measured with the
            objective, the others as plain text. None evaluates nothing.
        callbacks: Objects whose methods run after a step, an evaluation and a save, in the main
            process: see `Callback`.

    Returns:
        Losses, figures, checkpoint and log of the run.

    Raises:
        ValueError: If training would be meaningless: no parameter requires grad, no token is
            supervised, the forward pass cuts an adapter off from its gradient, or a loss is not
            finite. If `config.output_dir` cannot be written, another run is writing to it, or it
            holds an earlier run that is not resumed.
        OSError: If a checkpoint or the log cannot be written, as on a full disk. Earlier
            checkpoints stay valid.
    """
    started = time.perf_counter()
    config = config or TrainConfig()
    with checked_folder(config):
        run = set_up(model, tokenizer, dataset, config, objective, eval_dataset, callbacks)
        model = unwrap_model(model)  # the run itself goes through the wrappers
        _write_facts(run, model, dataset, eval_dataset)
        with (
            Log(run.progress, run.total_steps, config, run.parallel.is_main) as log,
            memory_explained(model, config),
            training_mode(run.parallel.model, config.gradient_checkpointing),
            noisy_embeddings(run.parallel.model, config.neftune_noise_alpha),
            run.parallel.interruptible(),
        ):
            with run.last_step_saved():
                interrupted = _run_steps(run, log)
            _finish(run, log, interrupted)
    return _result(run, log, interrupted, started)


def _write_facts(run: Run, model: nn.Module, dataset: Any, eval_dataset: Any) -> None:
    """Write the options of the run, its model, data and versions into output_dir."""
    if run.config.output_dir is None or not run.parallel.is_main:
        return
    facts = describe_run(
        model,
        dataset,
        eval_dataset,
        run.objective,
        run.config,
        samples=len(run.examples),
        content=run.progress.data["rows"],
    )
    facts["processes"] = run.parallel.world_size
    write_run(Path(run.config.output_dir), facts)


# ---- the loop


def _run_steps(run: Run, log: Log) -> bool:
    """Save, evaluate and step until the run is done; return True if Ctrl-C ended it.

    A step is saved before it is evaluated, so that a failing evaluation loses no step.
    """
    try:
        while True:
            is_last = run.progress.step >= run.total_steps
            _save_if_due(run, is_last)
            _evaluate_if_due(run, log)
            if is_last:
                return False
            if run.evaluation.exhausted(run.progress.evals):
                return False
            _step(run, log)
    except KeyboardInterrupt:
        return True


def _evaluate_if_due(run: Run, log: Log) -> None:
    """Measure the held-out sets, log and save the figures, if an evaluation is due."""
    progress = run.progress
    if not run.evaluation.due(progress.step, run.total_steps, progress.evals):
        return
    with run.autocast:
        figures = {"step": progress.step, **run.evaluation.measure()}
    progress.evals.append(figures)
    log.write(**figures)
    best = run.evaluation.best(progress.evals)
    saved = None
    with uninterrupted():
        run.checkpoints.save_figures(progress)
        if run.checkpoints.keeps_best and best is figures:
            saved = run.checkpoints.save(progress, best)
    run.callbacks.call("on_evaluate", dict(figures))
    _call_on_save(run, saved)


def _save_if_due(run: Run, is_last: bool) -> None:
    """Save a checkpoint, if one is due."""
    if is_last or run.checkpoints.due(run.progress):
        with uninterrupted():
            saved = run.checkpoints.save(run.progress, run.evaluation.best(run.progress.evals))
        _call_on_save(run, saved)


def _call_on_save(run: Run, saved: Path | None) -> None:
    """Tell the callbacks of a checkpoint that was written."""
    if saved is not None:
        run.callbacks.call("on_save", saved, run.progress.step)


def _step(run: Run, log: Log) -> None:
    """Make one optimiser step: gradients, checks, update, log."""
    started = time.perf_counter()
    step = run.progress.step + 1
    rate = learning_rate(run.config, run.progress.step, run.total_steps)
    samples = _samples(run, run.progress.step)
    run.optimizer.zero_grad()
    losses, metrics = _backward(
        run.parallel,
        run.objective,
        samples,
        run.autocast,
        run.scaler,
        seed=(run.config.seed, "dropout", step),
    )
    norm = _clip_gradients(run)
    checks.check_finite(step, losses, norm, run.scaler.get_scale(), samples)
    run.check_gradients(step, samples)
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["lr_ratio"]

    with uninterrupted():  # weights, moments and the step number change together or not at all
        run.updating = True
        run.scaler.step(run.optimizer)
        run.scaler.update()
        tokens = _count_tokens(samples)
        _record(run.progress, tokens, losses, metrics)
        run.updating = False
        seconds = time.perf_counter() - started
        log.step(
            run.progress,
            tokens,
            seconds=seconds,
            learning_rate=rate,
            grad_norm=norm.item(),
            peak_memory=peak_memory(run.parallel.device),
        )
    _call_on_step(run, seconds, rate, norm.item())


def _call_on_step(run: Run, seconds: float, rate: float, norm: float) -> None:
    """Give the figures of the last step to the callbacks."""
    progress = run.progress
    info = StepInfo(
        step=progress.step,
        total_steps=run.total_steps,
        loss=progress.losses[-1],
        learning_rate=rate,
        grad_norm=norm,
        tokens=progress.tokens,
        seconds=seconds,
        metrics={name: values[-1] for name, values in progress.metrics.items()},
    )
    run.callbacks.call("on_step", info)


def _samples(run: Run, step: int) -> list[list[Any]]:
    """Return the examples of each micro-batch of a step."""
    samples = []
    for indices in run.plan[step]:
        samples.append([run.examples[index] for index in indices])
    return samples


def _count_tokens(samples: list[list[Any]]) -> int:
    """Return the number of tokens of a step, without padding."""
    return sum(len(example) for micro_batch in samples for example in micro_batch)


def _backward(
    parallel: Process,
    objective: Objective,
    samples: list[list[Any]],
    autocast: AbstractContextManager,
    scaler: torch.amp.GradScaler,
    seed: tuple[Any, ...] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add ∂L/∂parameter of one step to the gradients.

    Returns the contribution of each micro-batch to L, (M,), and the means of the objective's other
    sums.
    """
    assigned = parallel.micro_batches(len(samples))  # [(number, weight)]
    batches = [objective.collate(samples[number]) for number, _ in assigned]
    count = _step_count(parallel, objective, assigned, batches)  # N
    losses = torch.zeros(len(samples), dtype=torch.float32, device=parallel.device)  # (M,)
    sums: dict[str, Tensor] = {}
    for index, (number, weight) in enumerate(assigned):
        torch.manual_seed(seed_of(*seed, number))
        is_last = index == len(assigned) - 1
        with parallel.gradient_sync(last=is_last):
            with autocast:
                loss_sum, other_sums = parallel.loss(batches[index])
            # The factor world_size undoes the average over processes (see the module docstring).
            factor = weight * parallel.world_size / count
            # L += loss_sum · weight / N
            scaler.scale(loss_sum * factor).backward()
        losses[number] += loss_sum.detach() * (weight / count)
        for name, value in other_sums.items():
            sums[name] = sums.get(name, 0.0) + value.detach() * weight
    means = {name: parallel.sum(value) / count for name, value in sums.items()}
    return parallel.sum(losses), means


def _step_count(
    parallel: Process,
    objective: Objective,
    assigned: list[tuple[int, int]],
    batches: list[dict[str, Tensor]],
) -> float:
    """Return N of the whole step; end the run if Ctrl-C was pressed in any process."""
    count = 0
    for (_, weight), batch in zip(assigned, batches, strict=True):
        count += weight * objective.weight(batch)
    local = torch.tensor([count, parallel.interrupt_requested], dtype=torch.float64)  # (2,)
    total, interrupt_requested = parallel.sum(local).tolist()
    if interrupt_requested:
        raise KeyboardInterrupt
    return total


def _clip_gradients(run: Run) -> Tensor:
    """Undo the loss scale and clip the gradients; return their norm before clipping."""
    run.scaler.unscale_(run.optimizer)
    largest = run.config.max_grad_norm or float("inf")
    # g ← g · min(1, max_grad_norm / |g|)
    norm = nn.utils.clip_grad_norm_(run.parallel.parameters.values(), largest)
    return full(norm)


def _record(progress: Progress, tokens: int, losses: Tensor, metrics: dict[str, Tensor]) -> None:
    """Add a step to the progress."""
    progress.step += 1
    progress.tokens += tokens
    progress.losses.append(losses.sum().item())
    for name, value in metrics.items():
        progress.metrics.setdefault(name, []).append(value.item())


# ---- the end


def _finish(run: Run, log: Log, interrupted: bool) -> None:
    """Save the last step, write the totals, and load the best weights if the config asks for it."""
    best = run.evaluation.best(run.progress.evals)
    if not interrupted and run.parallel.is_main:
        checks.warn_of_rising_loss(run.progress.losses)
    with uninterrupted():
        with run.parallel.full_tensors(run.optimizer, permanently=True):
            saved = run.checkpoints.save(run.progress, best)
        log.totals(run.progress, interrupted)
        if run.config.load_best_model_at_end and best is not None and not interrupted:
            run.checkpoints.restore(int(best["step"]))
    _call_on_save(run, saved)


def _result(run: Run, log: Log, interrupted: bool, started: float) -> TrainResult:
    """Return the outcome of the run."""
    progress = run.progress
    best = run.evaluation.best(progress.evals)
    return TrainResult(
        steps=progress.step,
        loss=progress.losses[-1] if progress.losses else None,
        eval_loss=progress.evals[-1]["eval_loss"] if progress.evals else None,
        tokens=progress.tokens,
        tokens_per_second=log.tokens_per_second,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory(run.parallel.device),
        interrupted=interrupted,
        checkpoint=run.checkpoints.newest,
        best_step=None if best is None else int(best["step"]),
        log=log.path,
        losses=progress.losses,
        evals=progress.evals,
        metrics=progress.metrics,
        history=log.records,
    )
