"""Comparison of QLoRA training in minilora and in peft + transformers + bitsandbytes.

    python benchmarks/quality/qlora_parity.py

Both stacks start from one folder (SmolLM2 in bf16, or in fp32 on a CPU without it, or --dtype) and
quantise it themselves, to NF4 with double quantisation. For each seed they start from one adapter
file and read the same batches in the same order, with the same AdamW and schedule. The result is
the loss on held-out rows after training: the stacks agree if the means differ by at most one seed's
standard deviation. First the script checks that the 4-bit bases have the same values. The last line
is one JSON document.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

# The root of the repository: benchmarks import each other by their full names.
sys.path.append(str(Path(__file__).resolve().parents[2]))

import minilora as ml
from benchmarks._lib.side_by_side import add_dtype, compute_dtype, machine, missing_peers
from benchmarks._lib.steps import four_bit
from minilora.data import encode_dataset
from minilora.losses.sft import mean_loss, padded, trained_tokens
from minilora.training.batch_sampler import BatchPlan
from minilora.training.optim.lr_schedule import learning_rate


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--test_rows", type=int, default=200)
    add_dtype(parser)
    options = parser.parse_args()
    dtype = compute_dtype(options.dtype)
    found: dict[str, Any] = {"benchmark": "qlora_parity", **machine(dtype)}
    missing = missing_peers()
    if missing:
        print(f"nothing to compare with: {missing}")
        return print(json.dumps(found | {"agree": None}))
    task, source = ml.samples.icd10(test_rows=options.test_rows), ml.samples.smollm2()
    tokenizer = ml.load_tokenizer(source)
    held_out = encode_dataset(task.test, tokenizer, 256).examples
    losses: dict[str, list[float]] = {"minilora": [], "peers": []}
    seconds: dict[str, list[float]] = {"minilora": [], "peers": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ml.save_model(ml.load_model(source, dtype=dtype), folder / "base")
        for seed in range(options.seeds):
            config = ml.TrainConfig(
                max_steps=options.steps,
                per_device_train_batch_size=options.batch,
                learning_rate=5e-4,
                seed=seed,
                lr_scheduler_type="linear",
                warmup_ratio=0.05,
                max_length=256,
            )
            model = ml.load_model(folder / "base", quantize="nf4", dtype=dtype)
            ml.inject(
                model, ml.LoRAConfig(r=16, lora_alpha=16, target_modules="all-linear"), seed=seed
            )
            ml.save_adapter(model, folder / f"adapter-{seed}")
            started = time.perf_counter()
            ml.train(model, tokenizer, task.train, config)
            seconds["minilora"].append(time.perf_counter() - started)
            losses["minilora"].append(mean_loss(model.eval(), held_out, 20)[0])
            theirs = peers(folder / "base", folder / f"adapter-{seed}", dtype)
            if seed == 0:
                check_bases(model, theirs)
            del model
            started = time.perf_counter()
            train_peers(theirs, encode_dataset(task.train, tokenizer, 256).examples, config)
            seconds["peers"].append(time.perf_counter() - started)
            losses["peers"].append(peers_loss(theirs, held_out))
            shown = ", ".join(f"{name} {values[-1]:.4f}" for name, values in losses.items())
            print(f"seed {seed}: {shown}", flush=True)
    print(json.dumps(found | report(losses, seconds, options)))


def peers(base: Path, adapter: Path, dtype: torch.dtype):
    """Load the base and adapter in peft + transformers + bitsandbytes, with defaults for QLoRA."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=four_bit(dtype), dtype=dtype
    )
    return PeftModel.from_pretrained(model, str(adapter), is_trainable=True)


def check_bases(ours, theirs) -> None:
    """Check that every 4-bit layer dequantises to the same values on both sides.

    They may differ by bitsandbytes' rounding of nested scales.
    """
    from bitsandbytes.functional import dequantize_4bit

    compared = 0
    for name, layer in ours.named_modules():
        if isinstance(layer, ml.NF4Linear):
            weight = theirs.get_submodule(f"base_model.model.{name}").weight
            dense = dequantize_4bit(weight.data, weight.quant_state)  # in the base's dtype
            difference = layer.dequantize(dense.dtype).float() - dense.float()
            error = difference.norm() / dense.float().norm()
            # Nested codes may be one apart, and bf16 rounds by up to 2^-9.
            assert error < 4e-3, f"{name}: relative difference {error}"
            compared += 1
    assert compared == 210, compared
    print(f"{compared} layers hold the same 4-bit weights")


def train_peers(model, examples, config: ml.TrainConfig) -> None:
    """Train with a plain loop on the batches that minilora.training reads."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    plan = BatchPlan([len(example.input_ids) for example in examples], config)
    model.train()
    for step in range(config.max_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, config.max_steps)
        batches = [padded([examples[i] for i in micro]) for micro in plan[step]]
        tokens = sum(map(trained_tokens, batches))
        for batch in batches:
            (summed_loss(model, batch) / tokens).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


def summed_loss(model, batch) -> torch.Tensor:
    """Return the loss of a batch, summed over its tokens."""
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    logits = output.logits[:, :-1].flatten(0, 1).float()  # (B (T-1), V)
    labels = batch["labels"][:, 1:].flatten()  # (B (T-1),)
    return F.cross_entropy(logits, labels, reduction="sum")


def peers_loss(model, examples) -> float:
    """Return the mean loss of the examples.

    The model stays in train mode, because on a CPU bitsandbytes repacks its weights in eval mode.
    The model has no dropout.
    """
    total, tokens = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(examples), 20):
            batch = padded(examples[start : start + 20])
            total += summed_loss(model, batch).item()
            tokens += trained_tokens(batch)
    return total / tokens


def report(losses: dict, seconds: dict, options: argparse.Namespace) -> dict[str, Any]:
    """Print the result and return it for the document."""
    means = {name: statistics.mean(values) for name, values in losses.items()}
    deviation = statistics.stdev(losses["peers"]) if options.seeds > 1 else float("nan")
    difference = means["minilora"] - means["peers"]
    for name, values in losses.items():
        shown = " ".join(f"{value:.4f}" for value in values)
        median = statistics.median(seconds[name])
        print(f"{name:<10} eval loss {means[name]:.4f} ({shown}), {median:.0f} s a run")
    print(f"difference {difference:+.4f}, one seed's standard deviation {deviation:.4f}")
    document = {
        "losses": losses,
        "difference": difference,
        "seconds": seconds,
        "standard_deviation": deviation,
    }
    document |= {"steps": options.steps, "batch": options.batch, "test_rows": options.test_rows}
    return document | {"agree": abs(difference) <= deviation}


if __name__ == "__main__":
    main()
