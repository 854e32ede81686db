"""The commands about a machine: plan (the memory of a training run) and env."""

from argparse import SUPPRESS, ArgumentTypeError
from dataclasses import dataclass, field, fields
from typing import Any

from minilora.cli.options import add_command
from minilora.cli.values import add_fields
from minilora.lora.config import LoRAConfig
from minilora.lora.files.source import split_source
from minilora.tools.environment import environment
from minilora.tools.memory_plan.fit import parse_bytes
from minilora.tools.memory_plan.plan import MemoryPlan, plan_memory, table
from minilora.training.config import TrainConfig

LORA_FIELDS = (  # the fields of LoRAConfig that memory depends on
    "r",
    "target_modules",
    "exclude_modules",
    "rank_pattern",
    "layers_to_transform",
    "layers_pattern",
    "lora_bias",
    "bias",
    "modules_to_save",
    "tie",
)
TRAIN_FIELDS = (  # the fields of TrainConfig that memory depends on
    "method",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "optim",
    "gradient_checkpointing",
    "bf16",
    "fp16",
)


@dataclass
class _Method:
    """A way to train that the table compares.

    Attributes:
        quantize: "nf4", "keep" or None.
        training: fields of TrainConfig that the method sets itself.
    """

    quantize: str | None
    training: dict[str, Any] = field(default_factory=dict)


def plan(
    model: str, dtype: str, quantize: str | None, card: int | None, plot: str | None, **given: Any
) -> None:
    """Compute the memory of training, by part, from config.json alone, and the run that fits.

    Args:
        model: Hub id, folder or .gguf file, or the folder of a run, whose base is planned for.
        dtype: dtype of dense weights, or "auto".
        quantize: "nf4", "keep" or None.
        card: memory of a GPU in bytes; None gives no verdict.
        plot: file of a picture; None draws nothing.
        given: fields of LoRAConfig and TrainConfig.
    """
    model = str(split_source(model)[0])
    lora = {f.name: given[f.name] for f in fields(LoRAConfig) if f.name in given}
    training = {f.name: given[f.name] for f in fields(TrainConfig) if f.name in given}
    plans: list[MemoryPlan] = []
    for method in _methods(quantize, training):
        settings = method.training | training
        sets_itself = bool(method.training)
        full = settings.get("method") == "full"
        adapter = None
        if not full or (lora and not sets_itself):
            adapter = LoRAConfig(**lora)
        plans.append(
            plan_memory(
                model,
                adapter,
                TrainConfig(**settings),
                quantize=method.quantize,
                dtype="auto" if sets_itself else dtype,
                card=card,
            )
        )
    print(table(plans))
    if card is not None:
        for found in plans:
            print(f"{found.method} {found.verdict}")
    if plot is not None:
        plans[0].plot(plot, *plans[1:])
        print(plot)


def _methods(quantize: str | None, training: dict[str, Any]) -> list[_Method]:
    """Return the methods to compare: QLoRA, LoRA and full, unless the options name one."""
    if quantize is not None or "method" in training:
        return [_Method(quantize)]
    full = {"method": "full", "bf16": "fp16" not in training}
    return [_Method("nf4"), _Method(None), _Method(None, full)]


def _size(text: str) -> int:
    """Return a size in bytes, or the error that argparse expects."""
    try:
        return parse_bytes(text)
    except ValueError:
        raise ArgumentTypeError(f"expected a size such as 24GB or 16GiB, got {text!r}") from None


def env() -> None:
    """Print versions, processor, GPUs and settings, to copy into a bug report."""
    print(environment())


def add_commands(commands: Any) -> None:
    """Add the commands; the options of `plan` have the names of `minilora train`.

    Args:
        commands: the subparsers of the program.
    """
    add_command(commands, env)
    parser = add_command(commands, plan, "model")
    parser.add_argument(
        "--quantize",
        choices=["nf4", "keep"],
        help="QLoRA alone, in NF4 or in the bytes of a .gguf file; without this and --method: "
        "QLoRA, LoRA and full fine-tuning (bf16)",
    )
    parser.add_argument(
        "--card",
        type=_size,
        metavar="SIZE",
        help="memory of the GPU, such as 24GB (10^9 bytes) or 80GiB: prints the run that fits",
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="draw a stacked bar a method: .svg, .png or .pdf"
    )
    parser.add_argument(
        "--batch",
        dest="per_device_train_batch_size",
        type=int,
        default=SUPPRESS,
        help="samples in one forward pass",
    )
    add_fields(parser, LoRAConfig, LORA_FIELDS)
    add_fields(parser, TrainConfig, TRAIN_FIELDS)
