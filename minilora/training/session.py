"""The verbs of training: gradients, an update, samples, checkpoints.

    session = ml.TrainingSession(model, tokenizer, ml.TrainConfig(max_steps=100))
    session.forward_backward(rows, ml.SFT())     g += ∂L/∂parameter
    session.optim_step()                         parameter ← AdamW(parameter, g); g ← 0
    session.sample(prompts)                      answers of the model as it is now
    session.save("out"); session.load("out")     weights, moments and the step number

`ml.train` is a loop over these verbs (training/loop.py). A loop of your own stands on them too: it
has the same clipping, schedule, optimiser, precision and checkpoints.

The gradient and its division by N are in training/optim/gradients.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from minilora.common import unwrap_model
from minilora.data.chat_template import as_trained
from minilora.generation.config import GenerationConfig, GenerationFields, with_fields
from minilora.generation.generate import Prompt, generate
from minilora.losses.sft import SFT, Objective
from minilora.training import checks
from minilora.training.batch_sampler import seed_of
from minilora.training.checkpoint import (
    Progress,
    load_checkpoint,
    save_checkpoint,
    trainable_parameters,
)
from minilora.training.config import TrainConfig
from minilora.training.distributed import process_on
from minilora.training.optim.gradients import CurrentObjective, Gradients, backward
from minilora.training.optim.lr_schedule import check_schedule, learning_rate
from minilora.training.optim.neftune import noisy_embeddings
from minilora.training.optim.param_groups import new_optimizer
from minilora.training.precision import precision_of
from minilora.training.process import full
from minilora.training.run_folder import OPTIMISATION, Checkpoints
from minilora.training.runtime import reset_peak_memory, switched_to_training, uninterrupted


@dataclass(frozen=True)
class Update:
    """The figures of one optimiser step.

    Attributes:
        step: Number of the step, from 1.
        loss: Sum of the losses of the calls of `forward_backward`.
        learning_rate: Learning rate of the update, without the ratio of LoRA+.
        grad_norm: Norm of the gradients before clipping.
        tokens: Tokens that the step read, without padding.
        metrics: Further figures of the objective.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    metrics: dict[str, float]


class TrainingSession:
    """A model in training, and the verbs that change it.

    Attributes:
        model: The model without its wrappers.
        run_model: The model as the steps run it: compiled if it was.
        tokenizer: Its tokenizer, with the variables of the chat template.
        config: The options: optimiser, schedule, precision, batch size, seed.
        parallel: This process; it also holds the model that is run.
        optimizer: The optimiser over the trainable parameters.
        autocast: Context of the forward passes.
        scaler: Loss scaler, enabled in fp16 only.
        checkpoints: The checkpoints in `config.output_dir`.
        progress: Steps done, losses and figures.
        total_steps: Number of steps that the schedule of the learning rate ends at.
        updating: True while weights, moments and progress change together.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, config: TrainConfig | None = None):
        """Prepare the optimiser over the parameters that require grad; change no weight.

        Args:
            model: A minilora or transformers causal language model, with an adapter unless
                `config.method` is "full".
            tokenizer: The model's tokenizer.
            config: The options; None takes the defaults. `max_steps` is the length of the schedule;
                without it, `lr_scheduler_type` must be "constant".

        Raises:
            ValueError: If no parameter requires grad, or an option does not fit the model.
        """
        config = config or TrainConfig()
        self.run_model = checks.check_wrappers(model, config)
        self.model = unwrap_model(model)
        self.tokenizer = as_trained(tokenizer, config.chat_template_kwargs, self.model)
        self.config = config
        checks.check_causal(self.model)
        if config.method == "full":
            checks.unfreeze(self.model)
        self.trained = trainable_parameters(self.model)
        self.parallel = process_on(next(iter(self.trained.values())).device, config.fsdp)
        reset_peak_memory(self.parallel.device)
        self.optimizer = new_optimizer(self.model, self.trained, config)
        self.autocast, self.scaler = precision_of(self.model, config, self.parallel.device)
        self.checkpoints = Checkpoints(
            self.model, self.optimizer, self.scaler, config, self.parallel
        )
        self.progress = Progress({})
        self.total_steps = 0
        self.updating = False
        self._current = CurrentObjective()
        self._gradients = Gradients()
        self._is_ready = False

    # ---- the verbs

    def forward_backward(
        self, batch: Sequence[Any], loss: Objective | None = None
    ) -> dict[str, float]:
        """Add the gradient of a loss to those of the parameters.

        The loss is the mean over the batch: over its supervised tokens, pairs or rows, as the
        objective counts them. Several calls before one `optim_step` add up.

        Args:
            batch: Rows of a dataset, or examples of `loss.encode`. They are run in micro-batches of
                `config.per_device_train_batch_size`.
            loss: The objective; None is supervised fine-tuning.

        Returns:
            "loss" and the further figures of the objective.

        Raises:
            ValueError: If the batch is empty, or no token of it is supervised.
        """
        self._make_ready()
        objective = loss or SFT()
        examples = self._encoded(batch, objective)
        size = self.config.per_device_train_batch_size
        samples = [examples[start : start + size] for start in range(0, len(examples), size)]
        model = self.parallel.model
        with (
            switched_to_training(model, self.config.gradient_checkpointing),
            noisy_embeddings(model, self.config.neftune_noise_alpha),
        ):
            self.accumulate(samples, objective)
        figures = {"loss": self._gradients.losses[-1].sum().item()}
        for name, value in self._gradients.metrics.items():
            figures[name] = value.item()
        return figures

    def optim_step(
        self, *, figures: Mapping[str, float] | None = None, counts: bool = True
    ) -> Update:
        """Clip the gradients, update the parameters, and count the step.

        Args:
            figures: Further figures of the step, to be recorded with those of the objective.
            counts: False is a further update of the same step, which nothing records.

        Returns:
            The figures of the step.

        Raises:
            ValueError: If there is no gradient, or a loss or the gradient is not finite; nothing
                has changed then.
        """
        rate, norm = self._checked_gradient()
        gradients = self._gradients
        metrics = {name: value.item() for name, value in gradients.metrics.items()}
        update = Update(
            step=self.progress.step + 1,
            loss=torch.cat(gradients.losses).sum().item(),
            learning_rate=rate,
            grad_norm=norm.item(),
            tokens=gradients.tokens,
            metrics=metrics | dict(figures or {}),
        )
        with uninterrupted():  # weights, moments and the step number change together or not at all
            self.updating = True
            self._apply(rate)
            if counts:
                self._record(update)
                self.updating = False
        return update

    def sample(
        self,
        prompts: Prompt | Sequence[Prompt],
        config: GenerationConfig | None = None,
        **fields: Unpack[GenerationFields],
    ) -> Any:
        """Return answers of the model as it is now, as `ml.generate` does.

        Args:
            prompts: One prompt or several.
            config: Options of the generation. None samples at temperature 1 with a seed that
                depends on `config.seed` of the session and the step.
            **fields: Fields of `GenerationConfig` that replace those of `config`.

        Returns:
            A string for one prompt, a list of strings for a list of prompts.
        """
        if config is None:
            seed = seed_of(self.config.seed, "sample", self.progress.step)
            config = GenerationConfig(temperature=1.0, seed=seed)
        with self.autocast:
            return generate(self.model, self.tokenizer, prompts, with_fields(config, fields))

    def save(self, folder: str | Path | None = None) -> Path:
        """Write a checkpoint: adapter, trained parameters, moments and the step number.

        Args:
            folder: Folder of the checkpoint; None writes checkpoint-N in `config.output_dir`.

        Returns:
            The folder.

        Raises:
            ValueError: If there is no folder, or gradients wait for their update.
        """
        self._make_ready()
        if self._gradients.samples:
            raise ValueError(
                "save: gradients wait for their update and would be lost: call optim_step first."
            )
        if folder is None:
            return self._save_in_output_dir()
        folder = Path(folder)
        self.progress.scaler = self.scaler.state_dict()
        with uninterrupted(), self.parallel.full_tensors(self.optimizer):
            if self.parallel.is_main:
                save_checkpoint(folder, self.model, self.optimizer, self.progress)
        return folder

    def load(self, folder: str | Path) -> None:
        """Continue from a checkpoint of `save`.

        Args:
            folder: The checkpoint.

        Raises:
            ValueError: If it is damaged, or has other parameters or options of the optimisation.
        """
        if self.parallel.fsdp and self._is_ready:
            raise ValueError("load: a sharded model cannot load: call load before the first step.")
        options = self._optimisation()
        self.progress = load_checkpoint(Path(folder), self.model, self.optimizer, options)
        self.scaler.load_state_dict(self.progress.scaler)
        self._gradients = Gradients()

    # ---- for the loop of `train`

    def resume(self, data: dict[str, Any], total_steps: int) -> None:
        """Set the length of the run, and load the checkpoint from which it continues, if any.

        Args:
            data: The values that give a step number its meaning.
            total_steps: Steps of the run.

        Raises:
            ValueError: If the checkpoint belongs to another run.
        """
        self.progress = self.checkpoints.resume(data, total_steps)
        self.total_steps = total_steps

    def wrap(self, objective: Objective) -> None:
        """Prepare the wrappers of the processes. Weights are loaded before.

        Args:
            objective: The objective of the first call.
        """
        self._current.objective = objective
        self.parallel.wrap(self.run_model, self._current, self.optimizer)
        self._is_ready = True

    def accumulate(self, samples: list[list[Any]], objective: Objective) -> None:
        """Add the gradient of a call to those since the last update.

        Args:
            samples: The examples of each micro-batch.
            objective: The objective that encoded them.
        """
        calls = len(self._gradients.losses)
        if calls == 0:
            self.optimizer.zero_grad()
        self._current.objective = objective
        seed: tuple[Any, ...] = (self.config.seed, "dropout", self.progress.step + 1)
        if calls:
            seed += ("call", calls)
        losses, self._gradients.metrics = backward(
            self.parallel, objective, samples, self.autocast, self.scaler, seed=seed
        )
        self._gradients.losses.append(losses)
        self._gradients.samples += samples

    # ---- helpers

    def _make_ready(self) -> None:
        """Set the length of the schedule and the wrappers, at the first verb of a session."""
        if self._is_ready:
            return
        config = self.config
        if config.max_steps <= 0 and not config.lr_scheduler_type.startswith("constant"):
            raise ValueError(
                f"TrainingSession: lr_scheduler_type {config.lr_scheduler_type!r} needs the number of "
                'steps: set max_steps, or lr_scheduler_type to "constant".'
            )
        self.total_steps = max(config.max_steps, 1)
        if config.max_steps > 0:
            check_schedule(config, config.max_steps)
        if not self.progress.data:
            self.progress = replace(self.progress, data=self._optimisation())
        self.wrap(SFT())

    def _save_in_output_dir(self) -> Path:
        """Write the checkpoint of this step in `config.output_dir`, as `train` does."""
        with uninterrupted():
            self.checkpoints.save(self.progress, None)
        if self.checkpoints.newest is None:
            raise ValueError(
                "save: give a folder, or set output_dir in the TrainConfig and make a step first."
            )
        return self.checkpoints.newest

    def _optimisation(self) -> dict[str, Any]:
        """Return the options that each update depends on."""
        return {name: getattr(self.config, name) for name in OPTIMISATION}

    def _encoded(self, batch: Sequence[Any], objective: Objective) -> list[Any]:
        """Return the examples of a batch, which may be rows."""
        examples = batch
        if len(batch) and isinstance(batch[0], Mapping):
            examples = objective.encode(batch, self.tokenizer, self.config.max_length)
        if not len(examples):
            raise ValueError(
                "forward_backward: expected rows or encoded examples, got an empty batch."
            )
        return list(examples)

    def _checked_gradient(self) -> tuple[float, Tensor]:
        """Return the learning rate, and the norm of the gradients, which are clipped and finite."""
        gradients = self._gradients
        if not gradients.losses:
            raise ValueError("optim_step: there is no gradient: call forward_backward first.")
        step = self.progress.step + 1
        rate = learning_rate(self.config, self.progress.step, self.total_steps)
        norm = self._clip_gradients()
        losses = torch.cat(gradients.losses)  # (M,)
        try:
            checks.check_finite(step, losses, norm, self.scaler.get_scale(), gradients.samples)
        except ValueError:
            self._gradients = Gradients()
            raise
        return rate, norm

    def _clip_gradients(self) -> Tensor:
        """Undo the loss scale and clip the gradients; return their norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        largest = self.config.max_grad_norm or float("inf")
        # g ← g · min(1, max_grad_norm / |g|)
        norm = nn.utils.clip_grad_norm_(self.parallel.parameters.values(), largest)
        return full(norm)

    def _record(self, update: Update) -> None:
        """Add a step to the progress."""
        self.progress.step += 1
        self.progress.tokens += update.tokens
        self.progress.losses.append(update.loss)
        for name, value in update.metrics.items():
            self.progress.metrics.setdefault(name, []).append(value)

    def _apply(self, rate: float) -> None:
        """Update the parameters at a learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_ratio"]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._gradients = Gradients()
