"""The commands: each loads what it names, calls one public function and prints what that gives."""

import json
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import torch

import minilora as ml
from minilora.cli.preview import before_training
from minilora.cli.values import CONFIGS
from minilora.data.formats import check_file
from minilora.lora.files.save_load import find_adapter
from minilora.lora.merging.merge import STORAGES
from minilora.losses import OBJECTIVES
from minilora.serving.serve import check as check_server
from minilora.tools.check_training import check_training as measure
from minilora.tools.compare_exports import compare_exports as compare_forms
from minilora.tools.inspect import inspect as inspect_path
from minilora.tools.merge_report import first_difference, merge_report
from minilora.tools.plot.logs import runs as draw_runs
from minilora.tools.sweep import sweep as search_options
from minilora.tools.sweep import table
from minilora.tools.verify import verify as verify_checkpoint
from minilora.training.distributed import process_on


def train(
    model: str, dataset: Any, adapter: str | None, quantize: str | None, dtype: str, eval_dataset: str | None,
    objective: str, **given: Any,
) -> None:  # fmt: skip
    """Fine-tune an adapter, or with --method full the model, on a dataset and save it."""
    lora, training, learned = ({f.name: given.pop(f.name) for f in fields(c) if f.name in given}
                               for c in (*CONFIGS, OBJECTIVES[objective]))  # fmt: skip
    train_config = ml.TrainConfig(**training)  # all is checked before the model is loaded
    mixed, rows = given.pop("mix"), given.pop("mix_rows")
    if mixed:
        parts = [(dataset, 1.0), *((path, float(weight)) for path, weight in mixed)]
        dataset = ml.mix_datasets(parts, rows, train_config.seed)
    elif rows is not None:
        raise ValueError("--mix_rows: it counts the rows of a mixture, and there is no --mix.")
    general, held_out = given.pop("general_dataset"), eval_dataset
    if general is not None:
        if eval_dataset is None:
            raise ValueError("--general_dataset is measured beside --eval_dataset, which is missing.")
        held_out = {"": eval_dataset, "general": general}
    full = train_config.method == "full"
    if unused := [*given, *(lora if full else ())]:
        raise ValueError(f"--{unused[0]} does nothing with --objective {objective} --method {train_config.method}.")
    if missing := [f.name for f in fields(OBJECTIVES[objective]) if f.name not in learned and f.default is MISSING]:
        raise ValueError(f"--objective {objective} needs --{missing[0]}.")
    if objective == "classify":
        lora = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} | lora
    lora_config, goal = ml.LoRAConfig(**lora), OBJECTIVES[objective](**learned)
    for path in (dataset, eval_dataset, general):
        if isinstance(path, str):
            check_file(path)
    dtype = "float32" if full and dtype == "auto" else dtype
    ranks = process_on(torch.device("cpu"), train_config.fsdp)
    device = "cpu" if ranks.fsdp else None  # shards alone go to GPUs
    loaded, tokenizer = ml.load_model(model, quantize=quantize, dtype=dtype, device=device), ml.load_tokenizer(model)
    if isinstance(goal, ml.Classify):
        goal.add_head(loaded, train_config.seed)
    if not full:
        ml.inject(loaded, lora_config, seed=train_config.seed)
        print(ml.count_parameters(loaded))
    print(before_training(dataset, model, tokenizer, train_config, goal), end="")
    result = ml.train(loaded, tokenizer, dataset, train_config, objective=goal, eval_dataset=held_out)
    folder = adapter or ("model" if full else "adapter")
    if ranks.is_main:
        ml.save_model(loaded, folder, tokenizer=tokenizer) if full else ml.save_adapter(loaded, folder)
        ml.write_model_card(folder, result, dataset=dataset)
    state = "interrupted" if result.interrupted else "done"
    figures = {"loss": result.loss} | (result.evals[-1] if result.evals else {})
    shown = [f", {name} {value:.4g}" for name, value in figures.items() if name != "step" and value is not None]
    print(f"{state} after {result.steps} steps{''.join(shown)}; in {folder}")


def generate(
    model: str, prompt: str, adapter: str | None, quantize: str | None, dtype: str, check_base: bool, **sampling: Any
) -> None:
    """Answer a prompt."""
    loaded, tokenizer = _load(model, adapter, quantize, dtype, check_base)
    print(ml.generate(loaded, tokenizer, prompt, **sampling))


def evaluate(
    model: str, dataset: str, adapter: str | None, quantize: str | None, dtype: str, check_base: bool, **scoring: Any
) -> None:
    """Score a model on held-out rows: loss, perplexity, exact match, token F1, the likeliest of given labels."""
    check_file(dataset)
    loaded, tokenizer = _load(model, adapter, quantize, dtype, check_base)
    scores = ml.evaluate(loaded, tokenizer, dataset, **scoring)
    print(scores)
    print(json.dumps(scores.as_dict()))


def merge(
    model: str, adapter: str, folder: str, target: str | None, data: str | None, force: bool, **loading: Any
) -> None:
    """Fold an adapter into its base: measure what that loses, write a folder that transformers loads, read it back."""
    if Path(folder).resolve() == Path(model).resolve():
        raise ValueError(f"{folder} is the base itself, which would be lost: give another folder for the result.")
    if data is not None:
        check_file(data)
    loaded, tokenizer = _load(model, adapter, **loading)
    dense = dict(loading, quantize=None)
    source = _load(model, adapter, **dense)[0] if target == "original" else None
    target = target or str(next(loaded.parameters()).dtype).removeprefix("torch.")
    report = merge_report(loaded, source)
    if data is not None:
        losses = {"trained": _loss(loaded, tokenizer, data)}
        targets = dict.fromkeys([*report.total.error, target])  # one that the report lacks is refused by ml.merge
        losses |= {to: _loss(_merged(loaded, source, to), tokenizer, data) for to in targets}
        report = replace(report, losses=losses)
        if losses[target] > 1.001 * losses["trained"]:
            print(f"minilora: warning: merging to {target} raises the loss by more than 0.1 %", file=sys.stderr)
    print(report)
    if target == "nf4" and (cosine := report.total.cosine.get("nf4", 1.0)) < 0.5 and not force:
        raise ValueError(
            f"4 bits would keep little of the adapter: cosine {cosine:.2f}, expected 0.5 or more. Serve it unmerged, "
            "merge to bfloat16 or original, or pass --force."
        )
    merged = _merged(loaded, source, target)
    del loaded, source
    layout: dict[str, Any] = {"format": "bnb-4bit"} if target == "nf4" else {}
    ml.save_model(merged, folder, tokenizer=tokenizer, **layout)
    parameter = next(merged.parameters())
    written = ml.load_model(folder, dtype=parameter.dtype, device=parameter.device)
    tokens = torch.arange(min(16, parameter.shape[0]), device=parameter.device)[None]  # (1, T)
    if (stage := first_difference(merged, written, tokens)) is not None:
        raise ValueError(f"{folder}, read back, differs from what was merged, first in {stage}. Do not use it.")
    print(f"merged into {folder}; read back, every stage gives the same bits")


def _merged(loaded: Any, source: Any, target: str) -> Any:
    """The merged model as it would be stored at a target of the report."""
    merged = ml.merge(loaded, target) if target != "original" else ml.merge(source)
    return merged if target in ("original", "nf4") else merged.to(STORAGES[target])


def _loss(model: Any, tokenizer: Any, data: str) -> float:
    return ml.evaluate(model, tokenizer, data, max_new_tokens=0).loss


def verify(checkpoint: str, source: str | None, against: str | None) -> int:
    """Compare a 4-bit checkpoint, tensor by tensor, with itself quantised again, its source or bitsandbytes."""
    verdicts = verify_checkpoint(checkpoint, source, against)
    for name, verdict in verdicts.items():
        print(f"{name:<60} {verdict}")
    return int(any(verdict.startswith("different") for verdict in verdicts.values()))


def compare_exports(model: str, dataset: str, adapter: str, **options: Any) -> int:
    """Compare what a trained model says in every form: merged, 4-bit, GGUF, served."""
    check_file(dataset)
    report = compare_forms(model, adapter, dataset, **{k: v for k, v in options.items() if v is not None})
    print(report)
    return int(report.first is not None)


def inspect(path: str, other: str | None) -> None:
    """Say what a model folder, GGUF file or adapter folder is; or compare two adapters."""
    print(inspect_path(path, other))


def push(folder: str, repo_id: str, **options: Any) -> None:
    """Upload an adapter or a model, with its card, to the Hugging Face Hub."""
    print(ml.push_to_hub(folder, repo_id, **options))


def check_training(model: str, quantize: str | None, dtype: str, data: str | None) -> int:
    """Measure whether a model trains here as it should: splits, eval batches, adapter off, frozen base, merging."""
    report = measure(ml.load_model(model, quantize=quantize, dtype=dtype), ml.load_tokenizer(model), rows=data)
    print(report)
    return int(not report.passed)


def plot(runs: Sequence[str], file: str) -> None:
    """Draw the logs of one or several runs into one picture."""
    draw_runs(runs, file)
    print(file)


def sweep(model: str, options: Sequence[str], search: Sequence[str], folder: str, **how: Any) -> None:
    """Search over options of train; each trial is a process of its own. Other options are passed on to train."""
    wanted = dict(item.split("=", 1) for item in search if "=" in item)
    if len(wanted) < len(search):
        raise ValueError(f"--search: expected OPTION=VALUES, each option once, got {' '.join(search)}.")
    print(table(search_options([model, *options], wanted, folder, **how)))


def serve(
    model: str, adapter: Sequence[str] | None, quantize: str | None, dtype: str, check_base: bool, **options: Any
) -> None:
    """Answer over HTTP as OpenAI's interface does: a base and, as further models, its adapters."""
    pairs = [item.partition("=") for item in adapter or ()]
    adapters = {name: find_adapter(folder)[0] for name, equals, folder in pairs if name and equals}
    if len(adapters) < len(pairs):
        raise ValueError(f"--adapter: expected NAME=PATH, each name once, got {' '.join(adapter or ())}.")
    config = ml.ServeConfig(**options)
    check_server(config)  # before the base, which takes its time
    loaded, tokenizer = ml.load_model(model, quantize=quantize, dtype=dtype), ml.load_tokenizer(model)
    ml.serve(loaded, tokenizer, adapters, config, check_base=check_base)


def _load(model: str, adapter: str | None, quantize: str | None, dtype: str, check_base: bool) -> tuple[Any, Any]:
    found = None if adapter is None else find_adapter(adapter)[0]  # before the base, which takes its time
    loaded, tokenizer = ml.load_model(model, quantize=quantize, dtype=dtype), ml.load_tokenizer(model)
    if found is not None:
        ml.load_adapter(loaded, found, tokenizer=tokenizer, check_base=check_base)
    return loaded, tokenizer
