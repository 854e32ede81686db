"""A search over the options of a training run with Optuna (pip install 'minilora[sweep]').

    minilora sweep MODEL rows.jsonl --eval_dataset held_out.jsonl --search r=4,8,16 --search learning_rate=1e-5:1e-3:log

Each trial is `minilora train` in a process of its own, so that none inherits another's memory or crash; its folder
holds log, checkpoints and adapter as any run's does. What was tried lies in study.db (SQLite) beside them: the same
command goes on where an interrupted one stopped, as long as `search` is the same.
"""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minilora.tools.plot.logs import read_log

Trial = Any  # optuna.trial.Trial


def sweep(
    arguments: Sequence[str],
    search: Mapping[str, str],
    folder: str | Path,
    *,
    trials: int = 20,
    metric: str = "eval_loss",
    seed: int = 0,
) -> Any:
    """Run `minilora train *arguments` with options drawn from `search` until `trials` are done; the optuna Study.

    search: option → "4,8,16" (one of these), "1e-5:1e-3" (between, whole numbers if both are), "1e-5:1e-3:log".
    metric: of the last evaluation in log.jsonl; lower is better for losses and perplexities, higher for all others.
    ValueError for a range that cannot be read, and if no trial gave the metric.
    """
    import optuna

    draws = {name: _range(name, text) for name, text in search.items()}
    if not draws:
        raise ValueError("search: expected at least one option and its values, such as r=4,8,16.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lower = metric.endswith(("loss", "perplexity"))
    study = optuna.create_study(
        study_name="sweep",
        storage=f"sqlite:///{folder / 'study.db'}",
        direction="minimize" if lower else "maximize",
        sampler=optuna.samplers.TPESampler(seed=seed),
        load_if_exists=True,
    )
    if study.user_attrs.setdefault("search", dict(search)) != dict(search):
        raise ValueError(
            f"{folder} holds a search over {study.user_attrs['search']}: name another folder for this one."
        )
    study.set_user_attr("search", dict(search))

    def run(trial: Trial) -> float:
        drawn = {name: _draw(trial, name, *how) for name, how in draws.items()}
        place = folder / f"trial-{trial.number}"
        options = [f"--{name}={value}" for name, value in drawn.items()]
        places = ["--output_dir", str(place), "--adapter", str(place / "adapter"), "--disable_tqdm", "true"]
        done = subprocess.run([sys.executable, "-m", "minilora", "train", *arguments, *options, *places],
                              capture_output=True, text=True)  # fmt: skip
        (place if place.is_dir() else folder).joinpath(f"trial-{trial.number}.txt").write_text(
            done.stdout + done.stderr
        )
        found = [line[metric] for line in read_log(place) if metric in line] if done.returncode == 0 else []
        shown = ", ".join(f"{name} {value}" for name, value in drawn.items())
        print(f"trial {trial.number}: {shown}: {f'{metric} {found[-1]:.4f}' if found else _why(done, metric)}")
        if not found:
            raise optuna.TrialPruned
        return found[-1]

    finished = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    left = trials - len(study.get_trials(deepcopy=False, states=finished))
    study.optimize(run, n_trials=max(0, left))
    if not any(trial.state == optuna.trial.TrialState.COMPLETE for trial in study.trials):
        raise ValueError(f"sweep: none of {len(study.trials)} trials gave {metric!r}; {folder}/trial-*.txt say why.")
    return study


def table(study: Any) -> str:
    """The trials that gave a value, best first."""
    sign = 1 if study.direction.name == "MINIMIZE" else -1
    done = sorted((t for t in study.trials if t.value is not None), key=lambda t: sign * t.value)
    lines = [f"{'trial':>5}  {'value':>10}  options"]
    for t in done:
        lines.append(f"{t.number:>5}  {t.value:>10.4f}  {', '.join(f'{k}={v}' for k, v in t.params.items())}")
    return "\n".join(lines)


def _range(name: str, text: str) -> tuple[str, Any]:
    """("one of", values) or ("between", (low, high, whole, log))."""
    if ":" not in text:
        values = [value for value in text.split(",") if value]
        if len(values) < 2:
            raise ValueError(f"search: {name}={text}: expected several values with commas, or low:high, low:high:log.")
        return "one of", values
    low, high, *rest = text.split(":")
    try:
        whole = all(part.lstrip("-").isdigit() for part in (low, high))
        bounds = [int(part) if whole else float(part) for part in (low, high)]
    except ValueError:
        raise ValueError(f"search: {name}={text}: {low!r} and {high!r} are no numbers.") from None
    if rest not in ([], ["log"]) or bounds[0] >= bounds[1] or (rest and bounds[0] <= 0):
        raise ValueError(f"search: {name}={text}: expected low:high or low:high:log with low < high, above 0 for log.")
    return "between", (*bounds, whole, bool(rest))


def _draw(trial: Trial, name: str, kind: str, how: Any) -> Any:
    if kind == "one of":
        return trial.suggest_categorical(name, how)
    low, high, whole, log = how
    return (trial.suggest_int if whole else trial.suggest_float)(name, low, high, log=log)


def _why(done: subprocess.CompletedProcess, metric: str) -> str:
    if done.returncode == 0:
        return f"no {metric} in its log (is there an eval_dataset?)"
    return f"failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1]}"
