"""`minilora train | generate | evaluate | …`: thin wrappers over public functions.

Options of `train` are the fields of LoRAConfig, TrainConfig and the objectives, their help is the fields' own, and
values are read by the fields' types: nothing about them is written here a second time.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import minilora as ml
from minilora.cli import jobs, preview
from minilora.cli import plan as memory
from minilora.cli.values import CONFIGS, add_fields, from_toml, parse_value
from minilora.lora.merging.merge import STORAGES
from minilora.losses import OBJECTIVES


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Errors that a user can mend are printed without a traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == ["train"] and len(given) > 1 and given[1].endswith(".toml"):
            given[1:2] = from_toml(Path(given[1]), _options("train"))
        options, rest = _parser().parse_known_args(given)
        if options.run is jobs.sweep:
            options.options = rest
        elif rest:
            _parser().error(f"unrecognized arguments: {' '.join(rest)}")
        options = vars(options)
        return options.pop("run")(**options) or 0
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"minilora: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not (notes := getattr(error, "__notes__", None)):  # no remedy is known
            raise
        print(f"minilora: {error}", *notes, sep="\n", file=sys.stderr)
        return 1


def _options(command: str) -> list[str]:
    """The names of a command's options and positionals."""
    (commands,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    names = {name.lstrip("-") for action in commands.choices[command]._actions for name in action.option_strings}
    return sorted(names | {action.dest for action in commands.choices[command]._actions} - {"help", "h"})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minilora", description="LoRA and QLoRA from scratch.")
    commands = parser.add_subparsers(required=True)

    def command(run: Any, *positional: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(run.__name__.replace("_", "-"), help=run.__doc__, description=run.__doc__)
        sub.set_defaults(run=run)
        for name in positional:
            sub.add_argument(name, help=_POSITIONAL[name])
        if "model" in positional:
            sub.add_argument("--dtype", default="auto", help="of dense weights and of computing; auto picks (default)")
        return sub

    training = command(jobs.train, "model", "dataset")
    text = "folder to save what was trained in (default: adapter, or model with --method full)"
    training.add_argument("--adapter", "--folder", dest="adapter", help=text)
    training.add_argument("--eval_dataset", help="held-out rows, measured while training")
    text = "text of another kind, such as prose: its perplexity, measured with eval_dataset, is what was forgotten"
    training.add_argument("--general_dataset", help=text)
    training.add_argument("--objective", choices=OBJECTIVES, default="sft", help="what to learn (default %(default)s)")
    text = "a further dataset and its weight, that of DATASET being 1; may be repeated"
    training.add_argument("--mix", nargs=2, action="append", metavar=("PATH", "WEIGHT"), help=text)
    training.add_argument("--mix_rows", type=int, help="rows of the mixture (default: all that need no repeating)")
    group = training.add_argument_group("the adapter (LoRAConfig) and the run (TrainConfig)")
    for config in CONFIGS:
        add_fields(group, config)
    for name, kind in OBJECTIVES.items():
        if fields(kind):
            add_fields(training.add_argument_group(f"--objective {name} ({kind.__name__})"), kind)
    answering = command(jobs.generate, "model", "prompt")
    answering.add_argument("--max_new_tokens", type=int, default=64, help="longest answer (default %(default)s)")
    answering.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    answering.add_argument("--top_p", type=float, default=1.0, help="nucleus to sample from (default %(default)s)")
    answering.add_argument("--stop", action="append", help="a text before which the answer ends; may be repeated")
    answering.add_argument("--seed", type=int, help="of the sampling")
    text = "start a token's work on a GPU with one call: auto (where it should pay, default), true, false"
    answering.add_argument(
        "--cuda_graph",
        type=lambda text: parse_value(text, bool | str),
        default="auto",
        choices=("auto", True, False),
        metavar="VALUE",
        help=text,
    )
    scoring = command(jobs.evaluate, "model", "dataset")
    scoring.add_argument("--labels", type=lambda text: text.split(","), help="the allowed answers, with commas between")
    scoring.add_argument("--max_new_tokens", type=int, default=32, help="longest answer (default %(default)s)")
    scoring.add_argument("--batch_size", type=int, default=16, help="changes no result (default %(default)s)")
    for sub in (answering, scoring):
        sub.add_argument("--adapter", help="folder or Hub id of an adapter in PEFT's format")
    serving = command(jobs.serve, "model")
    text = "an adapter, and what clients call it: a folder or Hub id; may be repeated"
    serving.add_argument("--adapter", action="append", metavar="NAME=PATH", help=text)
    add_fields(serving.add_argument_group("the server (ServeConfig)"), ml.ServeConfig)
    merging = command(jobs.merge, "model", "adapter", "folder")
    for sub in (answering, scoring, merging, serving):
        text = "take an adapter that was trained on another base, tokenizer or chat template"
        sub.add_argument("--no_check_base", dest="check_base", action="store_false", help=text)
    for sub in (training, answering, scoring, merging, serving):
        sub.add_argument("--quantize", choices=["nf4"], help="keep the base in 4 bits (QLoRA)")
    text = "how to store the result: a dtype, nf4 (4 bits again), or original: onto the base before it was quantised"
    merging.add_argument("--target", choices=[*STORAGES, "original"], help=f"{text} (default: the dtype loaded in)")
    merging.add_argument("--data", help="held-out rows: measures the loss of every target")
    merging.add_argument("--force", action="store_true", help="write 4 bits even where they lose most of the adapter")
    checking = command(jobs.verify, "checkpoint")
    checking.add_argument("--source", help="folder of the base it was quantised from, to quantise again")
    checking.add_argument("--against", choices=["bitsandbytes"], help="the installed package; also for a dense folder")
    comparing = command(jobs.compare_exports, "model", "dataset")
    comparing.add_argument("--adapter", required=True, help="folder or Hub id of an adapter in PEFT's format")
    comparing.add_argument("--quantize", choices=["nf4"], help="the base as it was trained on")
    comparing.add_argument("--rows", type=int, help="the first so many (default 8)")
    comparing.add_argument("--tolerance", type=float, help="KL in nats that counts as rounding (default 0.01)")
    command(jobs.inspect, "path").add_argument("other", nargs="?", help="a second adapter, to compare")
    pushing = command(jobs.push)
    pushing.add_argument("folder", help="of an adapter or a model")
    pushing.add_argument("repo_id", help="owner/name on the Hub; created if missing")
    pushing.add_argument("--private", action="store_true", default=None, help="only you and your organisation see it")
    pushing.add_argument("--revision", help="a branch that is there (default: main, created with the repository)")
    pushing.add_argument("--message", dest="commit_message", help="of the commit")
    preview.add_options(command(preview.preview, "dataset"))
    memory.add_options(command(memory.plan, "model"))
    testing = command(jobs.check_training, "model")
    testing.add_argument("--quantize", choices=["nf4"], help="keep the base in 4 bits (QLoRA)")
    testing.add_argument("--data", help="rows to measure with (default: a few short texts)")
    drawing = command(jobs.plot)
    drawing.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a run, or its log.jsonl")
    drawing.add_argument("--file", default="runs.svg", help=".svg, .png or .pdf (default %(default)s)")
    searching = commands.add_parser("sweep", help=jobs.sweep.__doc__, allow_abbrev=False)
    searching.set_defaults(run=jobs.sweep)
    searching.add_argument("model", help="as for train, or the .toml file of a run")
    text = "an option of train and its values: r=4,8,16, learning_rate=1e-5:1e-3:log; may be repeated"
    searching.add_argument("--search", action="append", required=True, metavar="OPTION=VALUES", help=text)
    searching.add_argument("--trials", type=int, default=20, help="how many in all (default %(default)s)")
    searching.add_argument("--metric", default="eval_loss", help="of the last evaluation (default %(default)s)")
    searching.add_argument("--folder", default="sweep", help="of study.db and the trials (default %(default)s)")
    return parser


_POSITIONAL = {
    "model": "Hub id, folder or .gguf file; for train also a .toml file that holds all options",
    "checkpoint": "folder of safetensors files in bitsandbytes' 4-bit format",
    "path": "folder of a model or an adapter, or .gguf file",
    "dataset": ".jsonl, .json, .csv or .parquet file of messages, instructions, prompt/completion or text rows",
    "prompt": "what to answer",
    "adapter": "folder or Hub id of an adapter in PEFT's format",
    "folder": "where to write the merged model",
}
