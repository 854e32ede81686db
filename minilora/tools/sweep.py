r"""Search over the options of a training run with Optuna (pip install -e '.[sweep]').

    minilora sweep MODEL rows.jsonl --eval_dataset held_out.jsonl \
        --search r=4,8,16 --search learning_rate=1e-5:1e-3:log

Each trial runs `minilora train` in a new process, so that a trial inherits neither memory nor a
crash from another one. A trial's folder contains the log, the checkpoints and the adapter of an
ordinary run. The trials are recorded in study.db (SQLite) in the folder of the search: the same
command continues an interrupted search, as long as `search` is the same.
"""

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.common.extras import require
from minilora.tools.plot.logs import read_log

Trial = Any  # optuna.trial.Trial
Study = Any  # optuna.study.Study


@dataclass(frozen=True)
class _Choices:
    """A search over listed values."""

    values: list[str]

    def draw(self, trial: Trial, name: str) -> str:
        return trial.suggest_categorical(name, self.values)


@dataclass(frozen=True)
class _Range:
    """A search over the numbers between two bounds; whole numbers if both bounds are ints."""

    low: float
    high: float
    log: bool

    def draw(self, trial: Trial, name: str) -> float:
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(name, self.low, self.high, log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)


def sweep(
    arguments: Sequence[str],
    search: Mapping[str, str],
    folder: str | Path,
    *,
    trials: int = 20,
    metric: str = "eval_loss",
    seed: int = 0,
) -> Study:
    """Run `minilora train *arguments` with drawn options until `trials` trials are finished.

    Args:
        arguments: Arguments of `minilora train` that all trials share, such as the model and the
            dataset.
        search: Maps an option to its values: "4,8,16" (one of these), "1e-5:1e-3" (between the
            two; whole numbers if both are), or "1e-5:1e-3:log" (drawn on a logarithmic scale).
        folder: Receives study.db and a folder for each trial; it is created if missing.
        trials: Number of finished trials at the end, those of earlier calls included.
        metric: Name of the figure to optimise, read from the last evaluation in a trial's
            log.jsonl. Lower is better for losses and perplexities, higher for all others.
        seed: Seed of Optuna's sampler.

    Returns:
        The optuna Study with all trials.

    Raises:
        ValueError: `search` is empty or a range cannot be parsed, the folder contains another
            search, or no trial gave the metric.
    """
    require("sweep", "optuna")
    import optuna

    options = {name: _parse_search(name, text) for name, text in search.items()}
    if not options:
        raise ValueError("search: expected at least one option and its values, such as r=4,8,16.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _quiet_optuna():
        study = _open_study(folder, search, metric, seed)

    def run_trial(trial: Trial) -> float:
        drawn = {name: choice.draw(trial, name) for name, choice in options.items()}
        process = _run_training(arguments, drawn, folder, trial.number)
        value = _read_metric(process, folder / f"trial-{trial.number}", metric)
        shown = ", ".join(f"{name} {option}" for name, option in drawn.items())
        if value is None:
            print(f"trial {trial.number}: {shown}: {_failure(process, metric)}")
            raise optuna.TrialPruned
        print(f"trial {trial.number}: {shown}: {metric} {value:.4f}")
        return value

    complete = optuna.trial.TrialState.COMPLETE
    finished_states = (complete, optuna.trial.TrialState.PRUNED)
    finished = study.get_trials(deepcopy=False, states=finished_states)
    with _quiet_optuna():
        study.optimize(run_trial, n_trials=max(0, trials - len(finished)))
    if not study.get_trials(deepcopy=False, states=(complete,)):
        raise ValueError(
            f"sweep: none of {len(study.trials)} trials gave {metric!r}. "
            f"See {folder}/trial-*.txt for the reasons."
        )
    return study


def sweep_table(study: Study) -> str:
    """Return a table of the trials that gave a value, best first.

    Args:
        study: The optuna Study that `sweep` returns.

    Returns:
        One line for each trial: number, value and options.
    """
    trials = [trial for trial in study.trials if trial.value is not None]
    sign = 1 if study.direction.name == "MINIMIZE" else -1
    trials.sort(key=lambda trial: sign * trial.value)
    lines = [f"{'trial':>5}  {'value':>10}  options"]
    for trial in trials:
        options = ", ".join(f"{name}={value}" for name, value in trial.params.items())
        lines.append(f"{trial.number:>5}  {trial.value:>10.4f}  {options}")
    return "\n".join(lines)


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Suppress Optuna's own lines about each trial: `sweep` prints one line a trial itself."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(level, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)


def _open_study(folder: Path, search: Mapping[str, str], metric: str, seed: int) -> Study:
    """Create the study in the folder, or load it if it is over the same search."""
    import optuna

    lower_is_better = metric.endswith(("loss", "perplexity"))
    study = optuna.create_study(
        study_name="sweep",
        storage=f"sqlite:///{folder / 'study.db'}",
        direction="minimize" if lower_is_better else "maximize",
        sampler=optuna.samplers.TPESampler(seed=seed),
        load_if_exists=True,
    )
    stored = study.user_attrs.get("search")
    if stored is not None and stored != dict(search):
        raise ValueError(
            f"{folder} holds a search over {stored}, not over {dict(search)}. "
            "Use another folder for this search."
        )
    study.set_user_attr("search", dict(search))
    return study


def _parse_search(name: str, text: str) -> _Choices | _Range:
    """Parse "a,b,c", "low:high" or "low:high:log"."""
    if ":" not in text:
        return _parse_choices(name, text)
    low_text, high_text, *scale = text.split(":")
    try:
        low, high = _parse_bounds(low_text, high_text)
    except ValueError:
        raise ValueError(
            f"search: {name}={text}: {low_text!r} and {high_text!r} are not both numbers."
        ) from None
    log = scale == ["log"]
    valid = low < high and (log or not scale)
    if log and low <= 0:
        valid = False
    if not valid:
        raise ValueError(
            f"search: {name}={text}: expected low:high or low:high:log with low < high, "
            "and low above 0 for log."
        )
    return _Range(low, high, log)


def _parse_choices(name: str, text: str) -> _Choices:
    values = [value for value in text.split(",") if value]
    if len(values) < 2:
        raise ValueError(
            f"search: {name}={text}: expected several values with commas between them, "
            "or low:high, or low:high:log."
        )
    return _Choices(values)


def _parse_bounds(low: str, high: str) -> tuple[float, float]:
    """Return both bounds as ints if both are whole numbers, else as floats."""
    if low.lstrip("-").isdigit() and high.lstrip("-").isdigit():
        return int(low), int(high)
    return float(low), float(high)


def _run_training(
    arguments: Sequence[str], drawn: Mapping[str, Any], folder: Path, number: int
) -> subprocess.CompletedProcess:
    """Run one trial in a new process and write its output to trial-N.txt."""
    trial_folder = folder / f"trial-{number}"
    command = [sys.executable, "-m", "minilora", "train", *arguments]
    command += [f"--{name}={value}" for name, value in drawn.items()]
    command += ["--output_dir", str(trial_folder), "--adapter", str(trial_folder / "adapter")]
    command += ["--disable_tqdm", "true"]
    process = subprocess.run(command, capture_output=True, text=True)
    # A run that fails early leaves no folder.
    output_folder = trial_folder if trial_folder.is_dir() else folder
    output_file = output_folder / f"trial-{number}.txt"
    output_file.write_text(process.stdout + process.stderr)
    return process


def _read_metric(
    process: subprocess.CompletedProcess, trial_folder: Path, metric: str
) -> float | None:
    """Return the metric's last value in the trial's log; None if the run failed or lacks it."""
    if process.returncode != 0:
        return None
    values = [line[metric] for line in read_log(trial_folder) if metric in line]
    return values[-1] if values else None


def _failure(process: subprocess.CompletedProcess, metric: str) -> str:
    """Describe the reason why a trial gave no value."""
    if process.returncode == 0:
        return f"the log has no {metric} (was an eval_dataset given?)"
    lines = process.stderr.strip().splitlines()
    reason = lines[-1] if lines else "the process printed no error"
    return f"failed: {reason}"
