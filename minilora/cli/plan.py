"""`minilora plan`, and what training says where memory runs out."""

import argparse
from dataclasses import fields
from typing import Any

from minilora.cli.values import add_fields
from minilora.lora.config import LoRAConfig
from minilora.tools.memory_plan.plan import MemoryPlan, plan_memory, table
from minilora.training.config import TrainConfig

_FIELDS = {  # what memory depends on
    LoRAConfig: "r target_modules exclude_modules rank_pattern layers_to_transform layers_pattern lora_bias bias "
    "modules_to_save tie",
    TrainConfig: "method per_device_train_batch_size gradient_accumulation_steps max_length optim "
    "gradient_checkpointing bf16 fp16",
}


def plan(model: str, dtype: str, quantize: str | None, card: str | None, plot: str | None, **given: Any) -> None:
    """Say how much memory training takes, by part, from config.json alone, and what fits a card."""
    lora, run = ({f.name: given[f.name] for f in fields(c) if f.name in given} for c in _FIELDS)
    ways: list[tuple[str | None, dict[str, Any]]] = [(quantize, {})]
    if quantize is None and "method" not in run:
        ways = [("nf4", {}), (None, {}), (None, {"method": "full", "bf16": "fp16" not in run})]
    plans: list[MemoryPlan] = []
    for bits, further in ways:
        full = (run | further).get("method") == "full"
        adapter = LoRAConfig(**lora) if not full or (lora and not further) else None
        kind = "auto" if further else dtype
        plans.append(plan_memory(model, adapter, TrainConfig(**further | run), quantize=bits, dtype=kind, card=card))
    print(table(plans))
    for found in plans if card is not None else ():
        print(f"{found.method} {found.verdict}")
    if plot is not None:
        plans[0].plot(plot, *plans[1:])
        print(plot)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `minilora plan`, named as those of `minilora train`."""
    text = "QLoRA alone; with neither this nor --method: QLoRA, LoRA and full fine-tuning (bf16) side by side"
    parser.add_argument("--quantize", choices=["nf4"], help=text)
    parser.add_argument("--card", help="what it is to fit in, such as 24GB (10^9 bytes) or 80GiB: says what would")
    parser.add_argument("--plot", metavar="FILE", help="a stacked bar a method: .svg, .png or .pdf")
    text = "samples in one forward pass"
    parser.add_argument("--batch", dest="per_device_train_batch_size", type=int, default=argparse.SUPPRESS, help=text)
    for config, names in _FIELDS.items():
        add_fields(parser, config, names.split())
