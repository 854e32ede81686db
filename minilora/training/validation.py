"""Evaluation during training, the best step, and early stopping.

    eval_loss, eval_accuracy, ...          the objective's figures on the eval rows; each sum is
                                           divided once, so the batch size changes nothing
    eval_reward                            with GRPO: mean reward of one greedy answer to each
                                           prompt; eval_loss is its negative
    eval_exact_match, eval_token_f1, ...   figures of greedy answers to the first `eval_answers`
                                           rows, if `eval_metrics` asks for them
    eval_NAME_loss, eval_NAME_perplexity   figures of further sets, {"": rows, "general": prose},
                                           measured as text; they show forgetting

The best step is the one with the lowest `metric_for_best_model` for losses and perplexities, and
with the highest for other figures. Every decision follows from the list of figures, so a resumed
run decides as a run that was never stopped.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

from minilora.common import comma_separated, unknown_name
from minilora.data.read_rows import iterate_dataset
from minilora.evaluation.evaluate import check_rows, evaluate
from minilora.evaluation.metrics import json_valid
from minilora.losses.on_policy import OnPolicy
from minilora.losses.sft import SFT, Objective, means
from minilora.training.config import TrainConfig
from minilora.training.on_policy.rollouts import Rollouts, held_out_figures
from minilora.training.process import Process

ANSWERS = ("exact_match", "token_f1", "json_valid")
Figures = dict[str, float]  # "step" and the figures of one evaluation


class Evaluation:
    """The held-out sets of a run and the decisions that follow from them.

    Attributes:
        sets: For each name ("eval", "eval_NAME"), the objective and the encoded examples.
        metrics: Names of the figures of greedy answers.
        rows: The rows that are answered for `metrics`.
        rollouts: The sampler of an objective on sampled answers, else None.
    """

    def __init__(
        self,
        parallel: Process,
        tokenizer: Any,
        dataset: Any,
        objective: Objective,
        config: TrainConfig,
    ):
        """Encode the held-out sets.

        Args:
            parallel: This process of the run.
            tokenizer: The tokenizer of the run.
            dataset: Rows, or a dict of rows by name. The first set has the objective of the run;
                further ones are measured as text. None: no evaluation.
            objective: The objective of the run.
            config: The run.

        Raises:
            ValueError: If `eval_metrics` or `metric_for_best_model` names an unknown figure.
        """
        self.parallel = parallel
        self.tokenizer = tokenizer
        self.config = config
        self.metrics = metric_names(config)
        self.rollouts: Rollouts | None = None
        named = _named_datasets(dataset)
        self.rows: list[Any] = []
        if self.metrics and named:
            first = next(iter(named.values()))
            self.rows = list(islice(iterate_dataset(first), config.eval_answers))
        self.sets: dict[str, tuple[Any, Any]] = {}
        for name, rows in named.items():
            is_first = not self.sets
            kind: Any = objective if is_first else SFT()
            options = {}
            if config.dataset_cache and isinstance(rows, str | Path):
                options["cache"] = config.dataset_cache
            examples = kind.encode(rows, tokenizer, config.max_length, **options)
            self.sets["eval" if is_first else f"eval_{name}"] = (kind, examples)
        ranks_steps = config.load_best_model_at_end or config.early_stopping_patience is not None
        figures = self._figure_names(objective)
        if ranks_steps and config.metric_for_best_model not in figures:
            raise unknown_name(
                "metric_for_best_model (it needs eval_dataset)",
                config.metric_for_best_model,
                figures,
            )

    def _figure_names(self, objective: Objective) -> list[str]:
        """Return the names of the figures by which a best step can be chosen."""
        names = [f"{name}_loss" for name in self.sets]
        if self.rows:
            names += [f"eval_{name}" for name in self.metrics]
        names += [f"{name}_perplexity" for name in self.sets if name != "eval"]
        if self.sets:
            names += [f"eval_{name}" for name in objective.better]
        return names

    def __str__(self) -> str:
        reports = [f"{name}: {examples.report}" for name, (_, examples) in self.sets.items()]
        return "\n".join(reports)

    def due(self, step: int, total: int, evals: list[Figures]) -> bool:
        """Return True if this step is to be evaluated: every `eval_steps` and at the end, once.

        Args:
            step: Steps done.
            total: Steps of the run.
            evals: The evaluations so far.
        """
        evaluated_steps = [figures["step"] for figures in evals]
        if not self.sets or step in evaluated_steps:
            return False
        if step == total:
            return True
        every = self.config.eval_steps
        return every is not None and step > 0 and step % every == 0

    def measure(self) -> Figures:
        """Return the figures of the model in its present state, the same in every process."""
        measured: Figures = {}
        for name, (objective, examples) in self.sets.items():
            figures = self.parallel.mean(partial(self._means, objective=objective), examples)
            for key, value in figures.items():
                measured[f"{name}_{key}"] = value
            if name != "eval":
                measured[f"{name}_perplexity"] = math.exp(figures["loss"])
        if self.rows:
            measured |= self.parallel.mean(self._answers, self.rows, equal_passes=False)
        return measured

    def check_answers(self, model: Any) -> None:
        """Refuse rows that `eval_metrics` could not be measured on, before the first step.

        Args:
            model: The model of the run.

        Raises:
            ValueError: If a row is too long, or has no prompt and answer, or its answer is not a
                text.
        """
        if self.rows:
            check_rows(model, self.tokenizer, self.rows)

    def _means(self, examples: Sequence[Any], objective: Objective) -> tuple[Figures, int]:
        """Return the objective's figures of some examples, and the number they are means over."""
        batch_size = self.config.per_device_eval_batch_size
        if isinstance(objective, OnPolicy):
            assert self.rollouts is not None
            return held_out_figures(self.rollouts, examples), len(examples)
        return means(self.parallel.model, examples, batch_size, objective)

    def _answers(self, rows: Sequence[Any]) -> tuple[Figures, int]:
        """Return the figures of greedy answers to some rows, and the number of answers."""
        scores = evaluate(
            self.parallel.model,
            self.tokenizer,
            rows,
            batch_size=self.config.per_device_eval_batch_size,
            metrics={"json_valid": json_valid},
        )
        values = scores.as_dict()
        return {f"eval_{name}": values[name] for name in self.metrics}, scores.answers

    def best(self, evals: list[Figures]) -> Figures | None:
        """Return the evaluation with the best figure, the earliest of equal ones.

        Args:
            evals: The evaluations so far.

        Returns:
            One of them, or None before the first.
        """
        metric = self.config.metric_for_best_model
        measured = []
        for figures in evals:
            if metric in figures and not math.isnan(figures[metric]):
                measured.append(figures)
        if not measured:
            return None
        choose = min if metric.endswith(("loss", "perplexity")) else max
        return choose(measured, key=itemgetter(metric))

    def exhausted(self, evals: list[Figures]) -> bool:
        """Return True if the last `early_stopping_patience` evaluations brought no improvement.

        Args:
            evals: The evaluations so far.
        """
        patience = self.config.early_stopping_patience
        best = self.best(evals)
        if patience is None or best is None:
            return False
        without_improvement = len(evals) - 1 - evals.index(best)
        return without_improvement >= patience


def metric_names(config: TrainConfig) -> list[str]:
    """Return the names in `eval_metrics`.

    Args:
        config: The run.

    Raises:
        ValueError: If a metric is unknown.
    """
    names = comma_separated(config.eval_metrics)
    for name in names:
        if name not in ANSWERS:
            raise unknown_name("eval_metrics", name, ANSWERS)
    return names


def _named_datasets(dataset: Any) -> dict[str, Any]:
    """Return the held-out sets by name; a single set has the name ""."""
    if dataset is None:
        return {}
    if isinstance(dataset, Mapping):
        return dict(dataset)
    return {"": dataset}
