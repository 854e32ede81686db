"""The training loop.

The loop is written on the verbs of a session (training/session.py): `accumulate` adds the gradient
of a step, `optim_step` clips it and updates the parameters. training/optim/gradients.py has the
equation of the loss, and the number that it is divided by.

The parameters that require grad are trained: the adapters, which are stored in fp32 and cast to the
dtype of x in the forward pass. The order of the data and the dropout of a step are functions of
(seed, step, micro-batch), so a resumed run equals one that was never stopped.

`train` shows the order of the parts: set up (training/run.py), go through the steps (save,
evaluate, step), finish.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from minilora.common import unwrap_model
from minilora.losses.sft import Objective
from minilora.training import checks
from minilora.training.config import TrainConfig
from minilora.training.logs.callbacks import StepInfo
from minilora.training.logs.metrics_log import Log
from minilora.training.logs.result import TrainResult
from minilora.training.logs.run_facts import describe_run, write_run
from minilora.training.on_policy.report import answer_table, step_line
from minilora.training.optim.neftune import noisy_embeddings
from minilora.training.process import main_speaks
from minilora.training.run import Run, set_up
from minilora.training.run_folder import checked_folder
from minilora.training.runtime import (
    memory_explained,
    peak_memory,
    training_mode,
    uninterrupted,
)
from minilora.training.session import Update


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
    """Make one optimiser step: samples, gradients, checks, update, log."""
    started = time.perf_counter()
    session = run.session
    step = run.progress.step + 1
    samples, figures = _samples(run, step)
    repeats = 0 if run.rollouts is None else run.rollouts.objective.num_iterations - 1
    with uninterrupted() if repeats else nullcontext():  # all updates of a step, or none
        for _ in range(repeats):
            session.accumulate(samples, run.objective)
            session.optim_step(counts=False)
        session.accumulate(samples, run.objective)
        run.check_gradients(step, samples)
        with uninterrupted():  # a step that is counted is logged
            update = session.optim_step(figures=figures)
            seconds = time.perf_counter() - started
            log.step(
                run.progress,
                update.tokens,
                seconds=seconds,
                learning_rate=update.learning_rate,
                grad_norm=update.grad_norm,
                peak_memory=peak_memory(run.parallel.device),
            )
    _call_on_step(run, update, seconds)


def _call_on_step(run: Run, update: Update, seconds: float) -> None:
    """Give the figures of the last step to the callbacks."""
    info = StepInfo(
        step=update.step,
        total_steps=run.total_steps,
        loss=update.loss,
        learning_rate=update.learning_rate,
        grad_norm=update.grad_norm,
        tokens=run.progress.tokens,
        seconds=seconds,
        metrics=update.metrics,
    )
    run.callbacks.call("on_step", info)


def _samples(run: Run, step: int) -> tuple[list[list[Any]], dict[str, float]]:
    """Return the examples of each micro-batch of a step, and figures of them.

    With an objective on sampled answers, the examples of the plan are prompts, and the answers to
    them are sampled here.
    """
    samples = []
    for indices in run.plan[step - 1]:
        samples.append([run.examples[index] for index in indices])
    if run.rollouts is None:
        return samples, {}
    rollout = run.rollouts.collect(samples[0], step)
    print(step_line(step, rollout.figures))
    every = run.rollouts.objective.log_completions_steps
    if every is not None and step % every == 0:
        print(answer_table(rollout.groups))
    return rollout.samples, rollout.figures


# ---- the end


def _finish(run: Run, log: Log, interrupted: bool) -> None:
    """Save the last step, write the totals, and load the best weights if the config asks for it."""
    best = run.evaluation.best(run.progress.evals)
    if not interrupted and run.parallel.is_main and run.rollouts is None:
        checks.warn_of_rising_loss(run.progress.losses)
    with uninterrupted():
        with run.parallel.full_tensors(run.session.optimizer, permanently=True):
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
