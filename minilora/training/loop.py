"""The training loop.

    L(step) = sum of -log p(token) over the step's trained tokens / how many they are

A step is `gradient_accumulation_steps` micro-batches. Its tokens are counted before the first forward pass and every
micro-batch's summed loss is divided by that one number, so the gradient is the same however the step is split, up to
rounding and without dropout. What requires grad trains: the adapters, kept in fp32 and cast to x's dtype in forward.
The order of the data and the dropout of a step follow from (seed, step, micro-batch): a resumed run equals one that
never stopped. Below, `train` prepares and goes round, one step a turn: due evaluations, `_backward`, clip, optimiser,
log. In a process group of torch.distributed each rank takes its share of the micro-batches (training/distributed.py).
"""

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.data.packing import pack
from minilora.lora.files.base_check import note_tokenizer
from minilora.losses.sft import SFT, Objective, check_supervised, lengths_of
from minilora.training import checkpoint, checks
from minilora.training.batch_sampler import BatchPlan, seed_of
from minilora.training.config import TrainConfig
from minilora.training.distributed import process_on
from minilora.training.metrics_log import Log
from minilora.training.optim.lr_schedule import learning_rate, total_steps
from minilora.training.optim.neftune import noisy_embeddings
from minilora.training.optim.param_groups import new_optimizer
from minilora.training.process import Process, full, main_speaks
from minilora.training.validation import Evaluation, Figures


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
    best_step: int | None  # by `metric_for_best_model`
    log: Path | None
    losses: list[float] = field(repr=False)  # one a step
    evals: list[Figures] = field(repr=False)  # "step" and the figures of each evaluation
    metrics: dict[str, list[float]] = field(repr=False)  # what else the objective measures, one a step

    @property
    def eval_losses(self) -> list[tuple[int, float]]:
        """(step, eval_loss) of each evaluation."""
        return [(int(figures["step"]), figures["eval_loss"]) for figures in self.evals]

    def plot(self, path: str | Path | None = None) -> Any:
        """A matplotlib Figure of the run's log, saved to `path` if given; ValueError for a run without output_dir."""
        if self.log is None:
            raise ValueError("plot: a run without output_dir keeps no log to draw: give TrainConfig(output_dir=...).")
        from minilora.tools.plot.logs import runs

        return runs([self.log], path)


@main_speaks()
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

    objective: what is learned from a row; None is supervised fine-tuning. Others: minilora/objectives.
    eval_dataset: held-out rows; or a dict of them by name, of which all but the first are measured as text.

    Ctrl-C ends the run cleanly: the last whole step is saved, and `interrupted` says so. Raises ValueError where
    training would be meaningless: nothing trains, no token is learned, an adapter gets no gradient at step 1, not
    even its B, a loss is not finite. OSError where a checkpoint or the log cannot be written (a full disk): the run
    ends, what was saved before stays whole. Seeds torch's global generator.
    """
    started, config, objective = time.perf_counter(), config or TrainConfig(), objective or SFT()
    check_supervised(objective, {"packing": config.packing, "dataset_cache": config.dataset_cache})
    checks.check_causal(model)
    if config.method == "full":
        checks.unfreeze(model)
    parameters = checkpoint.trainable_parameters(model)
    parallel = process_on(next(iter(parameters.values())).device, config.fsdp)
    device = parallel.device
    checks.reset_peak_memory(device)
    kept = {} if config.dataset_cache is None else {"cache": config.dataset_cache}
    with parallel.main_first(bool(kept)):
        examples = objective.encode(dataset, tokenizer, config.max_length, **kept)
        evaluation = Evaluation(parallel, tokenizer, eval_dataset, objective, config)
    print(f"train: {examples.report}")
    print(evaluation, end="\n" * bool(evaluation.sets))
    checks.check_vocabulary(model, tokenizer, {"train": (objective, examples), **evaluation.sets})

    lengths = lengths_of(examples)
    if config.packing:
        checks.check_packing(model)
        examples = pack(examples, lengths, config.max_length)
        lengths = examples.lengths
        print(f"packing: {examples}")
    plan = BatchPlan(lengths, config, parallel.world)
    total = total_steps(config, len(plan))
    optimizer = new_optimizer(model, parameters, config)
    autocast, scaler = checks.precision_of(model, config, device)
    checkpoints = checkpoint.Checkpoints(model, optimizer, scaler, config, parallel)
    progress = checkpoints.resume(plan.identity | {"objective": repr(objective)})
    note_tokenizer(model, tokenizer)
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    parallel.agree(data=plan.identity, step=progress.step, evaluation=str(evaluation), config=config, model=shapes)
    parallel.wrap(model, objective, optimizer)
    interrupted = False
    with (
        Log(progress, total, config, parallel.is_main) as log,
        checks.memory_explained(model, config),
        checks.training_mode(parallel.model, config.gradient_checkpointing),
        noisy_embeddings(parallel.model, config.neftune_noise_alpha),
        parallel.interruptible(),
    ):
        try:
            while True:
                if evaluation.due(progress.step, total, progress.evals):
                    with autocast:
                        progress.evals.append({"step": progress.step} | evaluation.measure())
                    log.write(**progress.evals[-1])
                best = evaluation.best(progress.evals)
                if checkpoints.due(progress, best):
                    with checks.uninterrupted():
                        checkpoints.save(progress, best)
                if progress.step >= total or evaluation.exhausted(progress.evals):
                    break

                begun, step = time.perf_counter(), progress.step + 1
                rate = learning_rate(config, progress.step, total)
                samples = [[examples[i] for i in micro] for micro in plan[progress.step]]
                optimizer.zero_grad()
                seed = config.seed, "dropout", step
                losses, further = _backward(parallel, objective, samples, autocast, scaler, seed)  # (micro-batches,)
                scaler.unscale_(optimizer)
                # g <- g * min(1, max_grad_norm / |g|)
                longest = config.max_grad_norm or float("inf")
                norm = full(nn.utils.clip_grad_norm_(parallel.parameters.values(), longest))
                checks.check_finite(step, losses, norm, scaler.get_scale(), samples)
                if step == 1:
                    checks.check_gradients(parallel.model, parallel.parameters)
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["lr_ratio"]
                with checks.uninterrupted():  # weights, moments and the count move together or not at all
                    scaler.step(optimizer)
                    scaler.update()
                    tokens = sum(len(example) for micro in samples for example in micro)
                    progress.step, progress.tokens = step, progress.tokens + tokens
                    progress.losses.append(losses.sum().item())
                    for name, value in further.items():
                        progress.metrics.setdefault(name, []).append(value.item())
                    seconds, memory = time.perf_counter() - begun, checks.peak_memory(device)
                    log.step(progress, tokens, seconds, learning_rate=rate, grad_norm=norm.item(), peak_memory=memory)
        except KeyboardInterrupt:
            interrupted = True
        best = evaluation.best(progress.evals)
        with checks.uninterrupted():
            with parallel.whole(optimizer, for_good=True):
                checkpoints.save(progress, best)
            log.write(steps=progress.step, tokens=progress.tokens, seconds=log.seconds, interrupted=interrupted)
            if config.load_best_model_at_end and best is not None and not interrupted:
                checkpoints.restore(int(best["step"]))
    return TrainResult(
        steps=progress.step,
        loss=progress.losses[-1] if progress.losses else None,
        eval_loss=progress.evals[-1]["eval_loss"] if progress.evals else None,
        tokens=progress.tokens,
        tokens_per_second=log.tokens_per_second,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=checks.peak_memory(device),
        interrupted=interrupted,
        checkpoint=checkpoints.newest,
        best_step=None if best is None else int(best["step"]),
        log=log.path,
        losses=progress.losses,
        evals=progress.evals,
        metrics=progress.metrics,
    )


def _backward(
    parallel: Process, objective: Objective, samples: list[list[Any]], autocast: AbstractContextManager, scaler: Any,
    seed: tuple[Any, ...] = (),
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Add up dL/dparameter in .grad over the micro-batches of one step; returns what each adds to L (M,), and means."""
    share = parallel.share(len(samples))  # of this rank: a micro-batch's number, and 1, or 0 where there are too few
    batches = [objective.collate(samples[number]) for number, _ in share]
    own = sum(weight * objective.weight(batch) for (_, weight), batch in zip(share, batches, strict=True))
    count, stop = parallel.sum(torch.tensor([own, parallel.pressed], dtype=torch.float64)).tolist()  # of the whole step
    if stop:
        raise KeyboardInterrupt
    losses, sums = torch.zeros(len(samples), device=parallel.device), {}
    for (number, weight), batch in zip(share, batches, strict=True):
        torch.manual_seed(seed_of(*seed, number))
        with parallel.gradients(last=batch is batches[-1]):
            with autocast:
                loss_sum, further = parallel.loss(batch)
            scaler.scale(loss_sum * (weight * parallel.world / count)).backward()  # world: DDP takes a mean
        losses[number] += loss_sum.detach() * (weight / count)
        for name, value in further.items():
            sums[name] = sums.get(name, 0.0) + value.detach() * weight
    return parallel.sum(losses), {name: parallel.sum(value) / count for name, value in sums.items()}
