"""What is measured on held-out rows while training, and what follows: the best step, and when to stop.

    eval_loss, eval_accuracy, …            the objective's own, on the eval rows; one division, so any batch size agrees
    eval_exact_match, eval_token_f1, …     of greedy answers to the first `eval_answers` rows, if `eval_metrics` asks
    eval_NAME_loss, eval_NAME_perplexity   of further sets, {"": rows, "general": prose}, as text: what was forgotten

The best step is the one with the lowest `metric_for_best_model`, or the highest where more is better (all but losses
and perplexities). Everything is derived from the list of figures, so a resumed run decides as one that never stopped.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from minilora.common import unknown
from minilora.data.formats import iterate_dataset
from minilora.evaluation.evaluate import evaluate
from minilora.evaluation.metrics import json_valid
from minilora.losses.sft import SFT, Objective, means
from minilora.training.config import TrainConfig
from minilora.training.process import Process

ANSWERS = ("exact_match", "token_f1", "json_valid")
Figures = dict[str, float]  # one evaluation: "step" and what was measured


class Evaluation:
    """The held-out sets of a run, encoded. `dataset`: rows, or a dict of them by name, the first with the objective."""

    def __init__(self, parallel: Process, tokenizer: Any, dataset: Any, objective: Objective, config: TrainConfig):
        self.parallel, self.tokenizer, self.config = parallel, tokenizer, config
        named = dict(dataset) if isinstance(dataset, Mapping) else {"": dataset} if dataset is not None else {}
        self.metrics = [name.strip() for name in (config.eval_metrics or "").split(",") if name.strip()]
        for name in self.metrics:
            if name not in ANSWERS:
                raise unknown("eval_metrics", name, ANSWERS)
        answered = iterate_dataset(next(iter(named.values()))) if self.metrics and named else ()
        self.rows = list(islice(answered, config.eval_answers))
        self.sets = {}
        for number, (name, rows) in enumerate(named.items()):
            kind: Any = SFT() if number else objective
            kept = {"cache": config.dataset_cache} if config.dataset_cache and isinstance(rows, str | Path) else {}
            examples = kind.encode(rows, tokenizer, config.max_length, **kept)
            self.sets["eval" if not number else f"eval_{name}"] = kind, examples
        names = [f"{name}_loss" for name in self.sets] + [f"eval_{name}" for name in self.metrics if self.rows]
        names += [f"{name}_perplexity" for name in self.sets if name != "eval"]
        names += [f"eval_{name}" for name in objective.better if self.sets]
        chosen = config.load_best_model_at_end or config.early_stopping_patience is not None
        if chosen and config.metric_for_best_model not in names:
            raise unknown("metric_for_best_model (it needs eval_dataset)", config.metric_for_best_model, names)

    def __str__(self) -> str:
        return "\n".join(f"{name}: {examples.report}" for name, (_, examples) in self.sets.items())

    def due(self, step: int, total: int, evals: list[Figures]) -> bool:
        """Whether to measure now: every `eval_steps`, at the end, and never twice."""
        every = self.config.eval_steps
        due = step == total or (every is not None and step > 0 and step % every == 0)
        return bool(self.sets) and due and all(step != figures["step"] for figures in evals)

    def measure(self) -> Figures:
        """The figures of the model as it is now, the same on every rank."""
        found: Figures = {}
        size, share, model = self.config.per_device_eval_batch_size, self.parallel.mean, self.parallel.model
        for name, (objective, examples) in self.sets.items():
            figures = share(lambda part, kind=objective: means(model, part, size, kind), examples)
            found |= {f"{name}_{key}": value for key, value in figures.items()}
            if name != "eval":
                found[f"{name}_perplexity"] = math.exp(figures["loss"])
        if self.rows:
            found |= share(self._answers, self.rows, in_step=False)
        return found

    def _answers(self, rows: Sequence[Any]) -> tuple[Figures, int]:
        """The figures of greedy answers, and how many answers there are."""
        size = self.config.per_device_eval_batch_size
        scores = evaluate(
            self.parallel.model, self.tokenizer, rows, batch_size=size, metrics={"json_valid": json_valid}
        )
        return {f"eval_{name}": scores.as_dict()[name] for name in self.metrics}, scores.answers

    def best(self, evals: list[Figures]) -> Figures | None:
        """The evaluation with the best figure, the earliest of equal ones; None before the first."""
        metric = self.config.metric_for_best_model
        sign = 1 if metric.endswith(("loss", "perplexity")) else -1
        measured = [figures for figures in evals if metric in figures]
        return min(measured, key=lambda figures: sign * figures[metric], default=None)

    def exhausted(self, evals: list[Figures]) -> bool:
        """Whether `early_stopping_patience` evaluations in a row were not better than the best before them."""
        patience, best = self.config.early_stopping_patience, self.best(evals)
        return patience is not None and best is not None and len(evals) - 1 - evals.index(best) >= patience


def _named(loss: tuple[float, int]) -> tuple[Figures, int]:
    return {"loss": loss[0]}, loss[1]
