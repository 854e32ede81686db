"""Script that every rank runs for test_distributed.py: `torchrun ranks.py FOLDER few|all`.

Rank 0 saves the results in the folder. After the runs of `few`, one rank is killed, so that the
same start of two processes also tests this.
"""

import io
import os
import signal
import sys
from contextlib import redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from helpers.toy import FAST, Letters, adapters, llama, lora, rows
from minilora import DPO, KLToBase, LoRAConfig, inject, quantize_model
from minilora.losses.sft import SFT
from minilora.training import run_folder
from minilora.training.config import TrainConfig
from minilora.training.distributed import Parallel
from minilora.training.loop import TrainResult, train
from minilora.training.process import full

# Steps have 8 samples in micro-batches of 2. The last step of an epoch has one sample, so that one
# of two ranks has none, or five samples in three micro-batches.
SAMPLES = {"lora": 17, "nf4": 21, "dpo": 21, "full": 17, "biases": 17, "norms": 17}
KINDS = tuple(SAMPLES)
ENGINES = ("ddp", "fsdp")
RUNS = {
    "few": ("lora ddp", "nf4 fsdp", "dpo ddp", "full fsdp"),
    "all": tuple(f"{kind} {engine}" for kind in KINDS for engine in ENGINES),
}


def model(kind: str) -> Any:
    """Return a small model with an adapter, its base in fp32 or in 4 bits; for "full" no adapter.

    The adapter has dropout, which must not depend on the rank that draws it.
    """
    base = llama(attention_bias=kind == "biases")
    if kind in ("nf4", "dpo"):
        quantize_model(base)
    if kind in ("biases", "norms"):
        norms = {"modules_to_save": ["norm", "input_layernorm"]}
        inject(
            base,
            LoRAConfig(
                r=4, target_modules="all-linear", **({"bias": "all"} if kind == "biases" else norms)
            ),
        )
        return base
    return base if kind == "full" else lora(base, dropout=0.1)


def config(world: int, **fields: Any) -> TrainConfig:
    """Return the settings of all compared runs: 8 samples per step in micro-batches of 2."""
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4 // world}
    return TrainConfig(
        **FAST | sizes | {"max_steps": 6, "eval_steps": 3, "eval_metrics": "token_f1"} | fields
    )


def run(kind: str, world: int, **fields: Any) -> tuple[nn.Module, TrainResult]:
    """Train a new model; return the model and the result."""
    m, data, held_out, objective = model(kind), rows(SAMPLES[kind]), rows(5, seed=1), None
    if kind == "full":
        fields |= {"method": "full", "learning_rate": 1e-3}
    if kind == "biases":  # see test_distributed.py
        fields |= {"adam_epsilon": 1e-3}
    if kind == "norms":  # the trained norms are switched off with the adapter
        objective = KLToBase(0.5)
    if kind == "dpo":  # the loss runs the model twice, once without adapters, and logs more sums
        fields, objective = fields | {"eval_metrics": None}, DPO()
        data, held_out = ([_preference(row) for row in part] for part in (data, held_out))
    return m, train(
        m, Letters(), data, config(world, **fields), objective=objective, eval_dataset=held_out
    )


def _preference(row: dict[str, str]) -> dict[str, str]:
    return {"prompt": row["prompt"], "chosen": row["completion"], "rejected": "f"}


def outcome(m: nn.Module, result: TrainResult) -> dict[str, Any]:
    """Return the values that test_distributed.py compares."""
    return {
        "losses": result.losses,
        "metrics": result.metrics,
        "evals": result.evals,
        "adapters": adapters(m),
    }


def refusal(kind: str = "lora", objective: Any = None, **fields: Any) -> str:
    """Return the message of the ValueError that a run raises, or "none"."""
    try:
        train(model(kind), Letters(), rows(17), config(2, **fields), objective=objective)
    except ValueError as error:
        return str(error)
    return "none"


class Broken(SFT):
    """Objective whose loss is NaN on rank 1."""

    def loss(self, model: Any, batch: Any) -> Any:
        loss, further = super().loss(model, batch)
        return loss * (torch.nan if dist.get_rank() else 1.0), further


class Signalled(SFT):
    """Objective that sends a signal to rank 1 in its fifth micro-batch."""

    number, calls = signal.SIGINT, 0

    def loss(self, model: Any, batch: Any) -> Any:
        if dist.get_rank() == 1 and model.training:
            type(self).calls += 1
            if self.calls == 5:
                os.kill(os.getpid(), self.number)
        return super().loss(model, batch)


class Killed(Signalled):
    """Objective that kills rank 1 in its fifth micro-batch."""

    number, calls = signal.SIGKILL, 0


def bytes_of_shards() -> dict[str, list[bool]]:
    """Check each frozen 4-bit tensor.

    For each name, the list states if the shard is in bytes, if it is at most half of the tensor,
    and if the gathered tensor equals the original.
    """
    given = model("nf4")
    parallel = Parallel(torch.device("cpu"), fsdp=True)
    parallel.wrap(
        given, SFT(), torch.optim.AdamW([p for p in given.parameters() if p.requires_grad])
    )
    # The forward pass gathers the shards and frees them again.
    parallel.loss(SFT().collate(SFT().encode(rows(2), Letters(), 64).examples))
    shards, found = dict(parallel.model.named_parameters()), {}
    for name, p in given.named_parameters():
        if p.dtype == torch.uint8:
            shard: Any = shards[name]
            whole = full(shard)
            local = shard.to_local()
            found[name] = [
                local.dtype == torch.uint8,
                local.numel() <= -(-p.numel() // 2),
                torch.equal(whole, p),
            ]
    return found


def facts(folder: Path) -> dict[str, Any]:
    """Return the results of a rank that do not belong to the compared runs."""
    rank = dist.get_rank()
    interrupted = train(model("lora"), Letters(), rows(17), config(2), objective=Signalled())
    return {
        "shards": bytes_of_shards(),
        "not finite": refusal(objective=Broken()),
        "other seed": refusal(seed=rank),
        "8 bits in shards": refusal(optim="adamw_8bit", fsdp=True),
        "biases in shards": refusal("biases", KLToBase(), fsdp=True),
        "interrupted": (interrupted.interrupted, interrupted.steps),
    }


def main(folder: Path, chosen: str) -> None:
    """Run the chosen comparisons, then collect the facts of all ranks."""
    saved: list[Path] = []
    save = run_folder.save_checkpoint
    run_folder.save_checkpoint = lambda path, *rest: saved.append(path) or save(path, *rest)
    found: dict[str, Any] = {}
    for name in RUNS[chosen]:
        kind, engine = name.split()
        fsdp, out = engine == "fsdp", folder / name.replace(" ", "-")
        # These runs also save, recompute activations, and resume a run of one process.
        checkpoints = kind == "nf4"
        fields: dict[str, Any] = {"output_dir": out, "save_steps": 3} if checkpoints else {}
        found[name] = outcome(
            *run(kind, 2, fsdp=fsdp, gradient_checkpointing=checkpoints, **fields)
        )
        if checkpoints:
            start = str(folder / "one" / "checkpoint-3")
            found[f"{name} resumed"] = outcome(
                *run(kind, 2, fsdp=fsdp, resume_from_checkpoint=start)
            )
    if chosen == "all":
        found["fp16"] = outcome(*run("lora", 2, fsdp=True, fp16=True))
        found["fp16 ddp"] = outcome(*run("lora", 2, fp16=True))
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, facts(folder) | {"saved": [path.name for path in saved]})
    if dist.get_rank() == 0:
        torch.save(found | {"facts": everyone}, folder / "found.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    place, chosen = sys.argv[1:]
    main(Path(place), chosen)
    dist.barrier()  # wait until the other rank has written its results
    if chosen == "few":
        sys.stdout.flush()  # a killed process loses output that is not flushed
        with redirect_stdout(io.StringIO()):
            train(model("lora"), Letters(), rows(17), config(2), objective=Killed())
    dist.destroy_process_group()
