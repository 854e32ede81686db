"""The parts of a training run, and its set-up.

The set-up checks the inputs, encodes the data and prepares the optimiser. Then it loads a
checkpoint, if the run is resumed. This happens before `Process.wrap`, which may shard the model and
the moments of the optimiser.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from minilora.common import unknown_name
from minilora.data.dataset import content_hash
from minilora.data.packing import pack
from minilora.lora.files.base_check import note_training
from minilora.lora.files.label_names import note_labels
from minilora.losses.classification import Classify
from minilora.losses.on_policy import OnPolicy
from minilora.losses.sft import SFT, Objective, check_supervised, lengths_of
from minilora.training import checks
from minilora.training.batch_sampler import BatchPlan
from minilora.training.checkpoint import Progress
from minilora.training.config import TrainConfig
from minilora.training.logs.callbacks import Callbacks, check_callbacks
from minilora.training.logs.trackers import check_trackers
from minilora.training.on_policy.rollouts import Rollouts, prompts_per_step
from minilora.training.optim.lr_schedule import check_schedule, refuse_schedule, total_steps
from minilora.training.process import Process
from minilora.training.run_folder import Checkpoints
from minilora.training.runtime import uninterrupted
from minilora.training.session import TrainingSession
from minilora.training.validation import Evaluation, metric_names


@dataclass
class Run:
    """The parts of a run, which stay the same over its steps, and its progress.

    Attributes:
        session: The model, its optimiser and the verbs of a step.
        objective: The loss.
        examples: The encoded samples, by index.
        plan: The samples of each step.
        evaluation: The held-out sets.
        gradients: The trained parts that have had no gradient yet.
        first_step: Number of steps that were done when the run began or was resumed.
        callbacks: The caller's code that follows the run.
        rollouts: The sampler of an objective on sampled answers, else None.
    """

    session: TrainingSession
    objective: Objective
    examples: Any
    plan: BatchPlan
    evaluation: Evaluation
    gradients: checks.GradientCheck
    first_step: int
    callbacks: Callbacks
    rollouts: Rollouts | None = None

    @property
    def config(self) -> TrainConfig:
        """The options of the run."""
        return self.session.config

    @property
    def parallel(self) -> Process:
        """This process of the run; it also holds the model that is run."""
        return self.session.parallel

    @property
    def autocast(self) -> AbstractContextManager:
        """Context of the forward passes."""
        return self.session.autocast

    @property
    def checkpoints(self) -> Checkpoints:
        """The checkpoints of the run."""
        return self.session.checkpoints

    @property
    def progress(self) -> Progress:
        """Steps done, losses and figures."""
        return self.session.progress

    @property
    def total_steps(self) -> int:
        """Number of optimiser steps."""
        return self.session.total_steps

    def check_gradients(self, step: int, samples: list[list[Any]]) -> None:
        """Look for trained parts without a gradient, for one pass over the data.

        Args:
            step: Number of the step, whose backward pass is done.
            samples: The examples of each of its micro-batches.

        Raises:
            ValueError: If the forward pass of step 1 cuts a part off from its gradient.
        """
        if not self.gradients.parts:
            return

        def run_again() -> None:
            with torch.no_grad(), self.autocast:
                for number, _ in self.parallel.micro_batches(len(samples)):
                    self.parallel.loss(self.objective.collate(samples[number]))

        self.gradients.after_backward(step == 1, run_again, self.parallel.sum)
        watched = step - self.first_step
        if watched >= len(self.plan) or step == self.total_steps:
            self.gradients.warn(watched)

    @contextmanager
    def last_step_saved(self) -> Iterator[None]:
        """Save the last complete step if an exception ends the block, and say so in its notes.

        With several processes nothing is saved: the others may wait for the one that failed.
        """
        try:
            yield
        except Exception as error:  # of any kind: the step is saved, and the error goes on
            if (
                not self.session.updating
                and self.progress.step
                and self.checkpoints.folder is not None
            ):
                self._save_after(error)
            raise

    def _save_after(self, error: Exception) -> None:
        """Save the last complete step, and add the result to the notes of an exception."""
        if self.parallel.world_size == 1:
            try:
                with uninterrupted():
                    best = self.evaluation.best(self.progress.evals)
                    self.checkpoints.save(self.progress, best)
            except (OSError, RuntimeError) as second:
                error.add_note(f"Step {self.progress.step} could not be saved: {second}")
                return
        if self.checkpoints.newest is not None:
            error.add_note(
                f"The run can continue from {self.checkpoints.newest}: set "
                'resume_from_checkpoint="last".'
            )


def check_run_options(config: TrainConfig, objective: Objective, evaluates: bool) -> None:
    """Check what can be known of a run without its model and its data.

    The command line calls it before it loads the model.

    Args:
        config: The options of the run.
        objective: The loss.
        evaluates: True if the run has held-out rows.

    Raises:
        ValueError: If an option belongs to another loss, a metric is unknown or needs held-out
            rows, or the warm-up is as long as a run of one step.
        ImportError: If the package of a tracker is not installed.
    """
    check_trackers(config)
    if isinstance(objective, OnPolicy):
        prompts_per_step(objective, config)
    check_supervised(objective, {"packing": config.packing, "dataset_cache": config.dataset_cache})
    metric_names(config)
    ranks_steps = config.load_best_model_at_end or config.early_stopping_patience is not None
    if ranks_steps and not evaluates:
        name = config.metric_for_best_model
        raise unknown_name("metric_for_best_model (it needs eval_dataset)", name, ())
    if config.max_steps > 0:
        refuse_schedule(config, config.max_steps)


def set_up(
    model: nn.Module,
    tokenizer: Any,
    dataset: Any,
    config: TrainConfig,
    objective: Objective | None,
    eval_dataset: Any,
    callbacks: Sequence[Any],
) -> Run:
    """Prepare a run, and load the checkpoint from which it is resumed, if any.

    Args:
        model: The model to be trained.
        tokenizer: The model's tokenizer.
        dataset: The rows, or a path.
        config: The options of the run.
        objective: The loss; None is supervised fine-tuning.
        eval_dataset: Held-out rows, or a dict of such by name; None evaluates nothing.
        callbacks: Objects with methods of `Callback`.

    Returns:
        The parts of the run, ready for the first step.

    Raises:
        ValueError: If training would be meaningless, or the checkpoint belongs to another run.
    """
    check_callbacks(callbacks)
    objective = objective or SFT()
    check_run_options(config, objective, eval_dataset is not None)
    session = TrainingSession(model, tokenizer, config)
    model = session.model
    tokenizer = session.tokenizer
    parallel = session.parallel

    rollouts = _rollouts(session, objective)
    examples, evaluation = _encode(parallel, tokenizer, dataset, eval_dataset, objective, config)
    evaluation.rollouts = rollouts
    sets = {"train": (objective, examples), **evaluation.sets}
    checks.check_vocabulary(model, tokenizer, sets)
    evaluation.check_answers(model)
    lengths = lengths_of(examples)
    rows = content_hash(examples)
    if config.packing:
        checks.check_packing(model)
        examples = pack(examples, lengths, config.max_length)
        lengths = examples.lengths
        print(f"packing: {examples}")

    plan = BatchPlan(lengths, _plan_config(config, objective), parallel.world_size)
    total = total_steps(config, len(plan))
    check_schedule(config, total)
    data = plan.identity | {"rows": rows}
    session.resume(data | {"objective": repr(objective)}, total)
    progress = session.progress
    session.checkpoints.check_best(evaluation.best(progress.evals))
    _note_objective(model, tokenizer, objective)
    parallel.check_agreement(
        data=data,
        step=progress.step,
        evaluation=str(evaluation),
        config=config,
        model={name: tuple(parameter.shape) for name, parameter in session.trained.items()},
    )
    session.wrap(objective)
    return Run(
        session=session,
        objective=objective,
        examples=examples,
        plan=plan,
        evaluation=evaluation,
        gradients=checks.GradientCheck(parallel.model, parallel.parameters),
        first_step=progress.step,
        callbacks=Callbacks(callbacks, parallel.is_main),
        rollouts=rollouts,
    )


def _rollouts(session: TrainingSession, objective: Objective) -> Rollouts | None:
    """Return the sampler of an objective on sampled answers; None for other objectives."""
    if not isinstance(objective, OnPolicy):
        return None
    if session.parallel.world_size > 1:
        raise ValueError(
            f"{type(objective).__name__} runs in one process, and there are "
            f"{session.parallel.world_size}: start it without torchrun."
        )
    return Rollouts(
        session.run_model, session.tokenizer, objective, session.config, session.autocast
    )


def _plan_config(config: TrainConfig, objective: Objective) -> TrainConfig:
    """Return the config whose batches are those of the rows: prompts, where answers are sampled."""
    if not isinstance(objective, OnPolicy):
        return config
    prompts = prompts_per_step(objective, config)
    return replace(config, per_device_train_batch_size=prompts, gradient_accumulation_steps=1)


def _note_objective(model: nn.Module, tokenizer: Any, objective: Objective) -> None:
    """Note in the model, for its files, with which template and labels it is trained."""
    note_training(model, tokenizer)
    if isinstance(objective, Classify):
        objective.check_names(model)
        note_labels(model, objective.labels)


def _encode(
    parallel: Process,
    tokenizer: Any,
    dataset: Any,
    eval_dataset: Any,
    objective: Any,
    config: TrainConfig,
) -> tuple[Any, Evaluation]:
    """Encode the training and the held-out rows, and print the reports about them."""
    options = {}
    if config.dataset_cache is not None:
        options["cache"] = config.dataset_cache
    with parallel.main_first(config.dataset_cache is not None):
        examples = objective.encode(dataset, tokenizer, config.max_length, **options)
        evaluation = Evaluation(parallel, tokenizer, eval_dataset, objective, config)
    print(f"train: {examples.report}")
    if evaluation.sets:
        print(evaluation)
    return examples, evaluation
