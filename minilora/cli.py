"""`minilora train | generate | evaluate | merge | verify | inspect | push`: thin wrappers over public functions.

Options of `train` are the fields of LoRAConfig, TrainConfig and the objectives, their help is the fields' own, and
values are read by the fields' types: nothing about them is written here a second time.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch

import minilora as ml
from minilora.adapters.merge import STORAGES
from minilora.audit.inspect import inspect as inspect_path
from minilora.audit.merge_report import first_difference, merge_report
from minilora.audit.verify import verify as verify_checkpoint
from minilora.objectives import OBJECTIVES
from minilora.train.parallel import Parallel


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Errors that a user can mend are printed without a traceback."""
    options = vars(_parser().parse_args(arguments))
    try:
        return options.pop("run")(**options) or 0
    except (ValueError, TypeError, OSError) as error:
        print(f"minilora: {error}", file=sys.stderr)
        return 1


def train(
    model: str, dataset: Any, adapter: str | None, quantize: str | None, dtype: str, eval_dataset: str | None,
    objective: str, **given: Any,
) -> None:  # fmt: skip
    """Fine-tune an adapter, or with --method full the model, on a dataset and save it."""
    lora, training, learned = ({f.name: given.pop(f.name) for f in fields(c) if f.name in given}
                               for c in (*_CONFIGS, OBJECTIVES[objective]))  # fmt: skip
    train_config = ml.TrainConfig(**training)  # all is checked before the model is loaded
    mixed, rows = given.pop("mix"), given.pop("mix_rows")
    if mixed:
        parts = [(dataset, 1.0), *((path, float(weight)) for path, weight in mixed)]
        dataset = ml.mix(parts, rows, train_config.seed)
    elif rows is not None:
        raise ValueError("--mix_rows: it counts the rows of a mixture, and there is no --mix.")
    full = train_config.method == "full"
    if unused := [*given, *(lora if full else ())]:
        raise ValueError(f"--{unused[0]} does nothing with --objective {objective} --method {train_config.method}.")
    if missing := [f.name for f in fields(OBJECTIVES[objective]) if f.name not in learned and f.default is MISSING]:
        raise ValueError(f"--objective {objective} needs --{missing[0]}.")
    if objective == "classify":
        lora = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} | lora
    lora_config, goal = ml.LoRAConfig(**lora), OBJECTIVES[objective](**learned)
    dtype = "float32" if full and dtype == "auto" else dtype
    ranks = Parallel(torch.device("cpu"), train_config.fsdp)
    device = "cpu" if ranks.fsdp else None  # shards alone go to GPUs
    loaded, tokenizer = ml.load_model(model, quantize=quantize, dtype=dtype, device=device), ml.load_tokenizer(model)
    if isinstance(goal, ml.Classify):
        goal.add_head(loaded, train_config.seed)
    if not full:
        ml.inject(loaded, lora_config, seed=train_config.seed)
        print(ml.count_parameters(loaded))
    result = ml.train(loaded, tokenizer, dataset, train_config, objective=goal, eval_dataset=eval_dataset)
    folder = adapter or ("model" if full else "adapter")
    if ranks.is_main:
        ml.save_model(loaded, folder, tokenizer=tokenizer) if full else ml.save_adapter(loaded, folder)
        ml.write_card(folder, result, dataset=dataset)
    state = "interrupted" if result.interrupted else "done"
    figures = {"loss": result.loss} | (result.evals[-1] if result.evals else {})
    shown = ", ".join(f"{name} {value}" for name, value in figures.items() if name != "step")
    print(f"{state} after {result.steps} steps, {shown}; in {folder}")


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


def inspect(path: str, other: str | None) -> None:
    """Say what a model folder, GGUF file or adapter folder is; or compare two adapters."""
    print(inspect_path(path, other))


def push(folder: str, repo_id: str, **options: Any) -> None:
    """Upload an adapter or a model, with its card, to the Hugging Face Hub."""
    print(ml.push_to_hub(folder, repo_id, **options))


_CONFIGS = (ml.LoRAConfig, ml.TrainConfig)


def _load(model: str, adapter: str | None, quantize: str | None, dtype: str, check_base: bool) -> tuple[Any, Any]:
    loaded, tokenizer = ml.load_model(model, quantize=quantize, dtype=dtype), ml.load_tokenizer(model)
    if adapter is not None:
        ml.load_adapter(loaded, adapter, tokenizer=tokenizer, check_base=check_base)
    return loaded, tokenizer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minilora", description="LoRA and QLoRA from scratch.")
    commands = parser.add_subparsers(required=True, metavar="{train,generate,evaluate,merge,verify,inspect,push}")

    def command(run: Any, *positional: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        sub.set_defaults(run=run)
        for name in positional:
            sub.add_argument(name, help=_POSITIONAL[name])
        if "model" in positional:
            sub.add_argument("--dtype", default="auto", help="of dense weights and of computing; auto picks (default)")
        return sub

    training = command(train, "model", "dataset")
    text = "folder to save what was trained in (default: adapter, or model with --method full)"
    training.add_argument("--adapter", "--folder", dest="adapter", help=text)
    training.add_argument("--eval_dataset", help="held-out rows, measured while training")
    training.add_argument("--objective", choices=OBJECTIVES, default="sft", help="what to learn (default %(default)s)")
    text = "a further dataset and its weight, that of DATASET being 1; may be repeated"
    training.add_argument("--mix", nargs=2, action="append", metavar=("PATH", "WEIGHT"), help=text)
    training.add_argument("--mix_rows", type=int, help="rows of the mixture (default: all that need no repeating)")
    group = training.add_argument_group("the adapter (LoRAConfig) and the run (TrainConfig)")
    for config in _CONFIGS:
        _add_fields(group, config)
    for name, kind in OBJECTIVES.items():
        if fields(kind):
            _add_fields(training.add_argument_group(f"--objective {name} ({kind.__name__})"), kind)
    answering = command(generate, "model", "prompt")
    answering.add_argument("--max_new_tokens", type=int, default=64, help="longest answer (default %(default)s)")
    answering.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    answering.add_argument("--top_p", type=float, default=1.0, help="nucleus to sample from (default %(default)s)")
    answering.add_argument("--stop", action="append", help="a text before which the answer ends; may be repeated")
    answering.add_argument("--seed", type=int, help="of the sampling")
    scoring = command(evaluate, "model", "dataset")
    scoring.add_argument("--labels", type=lambda text: text.split(","), help="the allowed answers, with commas between")
    scoring.add_argument("--max_new_tokens", type=int, default=32, help="longest answer (default %(default)s)")
    scoring.add_argument("--batch_size", type=int, default=16, help="changes no result (default %(default)s)")
    for sub in (answering, scoring):
        sub.add_argument("--adapter", help="folder or Hub id of an adapter in PEFT's format")
    merging = command(merge, "model", "adapter", "folder")
    for sub in (answering, scoring, merging):
        text = "take an adapter that was trained on another base, tokenizer or chat template"
        sub.add_argument("--no_check_base", dest="check_base", action="store_false", help=text)
    for sub in (training, answering, scoring, merging):
        sub.add_argument("--quantize", choices=["nf4"], help="keep the base in 4 bits (QLoRA)")
    text = "how to store the result: a dtype, nf4 (4 bits again), or original: onto the base before it was quantised"
    merging.add_argument("--target", choices=[*STORAGES, "original"], help=f"{text} (default: the dtype loaded in)")
    merging.add_argument("--data", help="held-out rows: measures the loss of every target")
    merging.add_argument("--force", action="store_true", help="write 4 bits even where they lose most of the adapter")
    checking = command(verify, "checkpoint")
    checking.add_argument("--source", help="folder of the base it was quantised from, to quantise again")
    checking.add_argument("--against", choices=["bitsandbytes"], help="the installed package; also for a dense folder")
    command(inspect, "path").add_argument("other", nargs="?", help="a second adapter, to compare")
    pushing = command(push)
    pushing.add_argument("folder", help="of an adapter or a model")
    pushing.add_argument("repo_id", help="owner/name on the Hub; created if missing")
    pushing.add_argument("--private", action="store_true", default=None, help="only you and your organisation see it")
    pushing.add_argument("--revision", help="a branch that is there (default: main, created with the repository)")
    pushing.add_argument("--message", dest="commit_message", help="of the commit")
    return parser


_POSITIONAL = {
    "model": "Hub id, folder or .gguf file",
    "checkpoint": "folder of safetensors files in bitsandbytes' 4-bit format",
    "path": "folder of a model or an adapter, or .gguf file",
    "dataset": ".jsonl, .json, .csv or .parquet file of messages, instructions, prompt/completion or text rows",
    "prompt": "what to answer",
    "adapter": "folder or Hub id of an adapter in PEFT's format",
    "folder": "where to write the merged model",
}


def _add_fields(group: Any, config: type) -> None:
    """One option for each field, without a default: what is not given is not passed on."""
    hints = get_type_hints(config)
    for f in fields(config):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        default = f"default {default}" if default is not MISSING else "required"
        text = f.metadata["help"].replace("%", "%%")
        group.add_argument(
            f"--{f.name}",
            type=partial(_read, hint=hints[f.name]),
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=f"{text} ({default})",
        )


def _read(text: str, hint: Any) -> Any:
    try:
        return parse_value(text, hint)
    except ValueError:
        expected = hint.__name__ if isinstance(hint, type) else hint
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None


def parse_value(text: str, hint: Any) -> Any:
    """`text` as a value of the type `hint`: 8, 1e-4, true, none, q_proj,v_proj, all-linear, {"q_proj": 4}.

    Where both a list of names and a text are allowed, commas or a plain name make a list; "all-linear" and anything
    with a regular expression's characters stay text. ValueError for what cannot be read so.
    """
    alone = get_origin(hint) in (dict, list)
    kinds = [get_origin(kind) or kind for kind in ((hint,) if alone else get_args(hint) or (hint,))]
    if type(None) in kinds and text.lower() == "none":
        return None
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if dict in kinds:
        return json.loads(text)
    if kinds == [list]:
        return text.split(",")
    if list in kinds and int in kinds:
        numbers = [int(part) for part in text.split(",")]
        return numbers if len(numbers) > 1 else numbers[0]
    if list in kinds and text != "all-linear" and text.replace(",", "").replace("_", "").replace(".", "").isalnum():
        return text.split(",")
    for kind in (int, float):
        if kind in kinds:
            return kind(text)
    if str in kinds:
        return text
    raise ValueError(f"expected {hint}, got {text!r}.")
