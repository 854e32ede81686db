"""A training step in minilora and in peft + transformers + bitsandbytes, on one machine.

    python benchmarks/training/peers.py [--rounds 5] [--dtype auto]
        [--only qlora,qlora-checkpointing,lora,full,load]

The model is SmolLM2-135M with 4 rows of 512 real tokens, without padding, all supervised; AdamW
(fused) at 1e-4, gradients clipped to 1. Every contender starts from one folder and one adapter file
(r = 16 on all linear layers, alpha 16) and computes in one dtype: bf16, or fp32 on a CPU without
it. The jobs:

    qlora       NF4, double quantisation, blocks of 64, the rest in that dtype
    lora        the base in that dtype
    full        every parameter in fp32, computed in bf16 by autocast: ml.train(method="full"),
                Trainer(bf16=True); without autocast where the dtype is fp32
    load        to 4 bits, and from process start to the first forward pass (bench_load.py)

The contenders:

    minilora    load_model, load_adapter, and the step of training/loop.py; adapters in fp32, cast
                once for each forward pass
    peers       from_pretrained, PeftModel, model(input_ids, labels=...); sdpa attention; adapters
                in that dtype, because PEFT's default of fp32 is slower with bf16; no preparation
                for k-bit training, because its fp32 head costs time and memory
    peers, bf16 the same with weights in bf16, only where the dtype is bf16. minilora does not train
                these: updates smaller than a rounding are lost
    peers, best the same as peers with eager attention, and a malloc that keeps freed memory (BEST)
    limit       the necessary parts of a step (limit.py); its "/ minilora" is the inverse of the
                time over the limit

"-checkpointing" means gradient checkpointing on both sides (use_reentrant=False). The script checks
that the losses of the first and of the last step agree. Without the packages of the peers, only
minilora is timed. The last line is one JSON document, which pictures.py draws. The run takes a
quarter of an hour on two cores.
"""

import argparse
import json
import sys
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

# The root of the repository: benchmarks import each other by their full names.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks._lib.side_by_side import (
    Contender,
    add_dtype,
    check_close,
    checkpoint,
    compute_dtype,
    dtype_name,
    machine,
    missing_peers,
    report,
    serve,
    spread,
    take_turns,
)
from benchmarks._lib.steps import Batches, four_bit, own_step, peer_step, trained_in
from benchmarks.inference import bench_load

BEST = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
JOBS = {
    "qlora": ("minilora", "peers", "peers, best", "limit"),
    "qlora-checkpointing": ("minilora", "peers"),
    "lora": ("minilora", "peers", "peers, best"),
    "full": ("minilora", "peers", "peers, bf16"),
}
WARM_UP = 2
# Relative, for the loss: bf16 rounds at other places, and a nested scale may be one code apart.
TOLERANCE = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default=",".join([*JOBS, "load"]), help="jobs, separated by commas"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument(
        "--short",
        action="store_true",
        help="a random model of two layers, two short rounds; one of loading",
    )
    add_dtype(parser)
    parser.add_argument(
        "--side", nargs=3, metavar=("SIDE", "JOB", "FOLDER"), help="run as this contender"
    )
    options = parser.parse_args()
    dtype = compute_dtype(options.dtype)
    if options.side:
        side, job, folder = options.side
        return contend(side, job, Path(folder), dtype)
    found: dict[str, Any] = {"benchmark": "peers", **machine(dtype)}
    missing = missing_peers()
    if missing:
        print(f"minilora alone: {missing}")
    jobs = options.only.split(",")
    known = [*JOBS, "load"]
    unknown = sorted(set(jobs) - set(known))
    if unknown:
        parser.error(f"--only: expected jobs from {', '.join(known)}, got {', '.join(unknown)}")
    if options.short:
        options.rounds, options.batch, options.length = 2, 2, 64
    found |= {"rounds": options.rounds, "batch": options.batch, "length": options.length}
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), options, dtype)
        for job in jobs:
            if job == "load":
                rounds, warm_up = (1, 0) if options.short else (options.rounds, 1)
                found[job] = bench_load.compare(Path(name) / "base", rounds, dtype, warm_up)
            else:
                found[job] = compare(job, Path(name), options, dtype)
    print(json.dumps(found))


def prepare(folder: Path, options: argparse.Namespace, dtype: torch.dtype) -> None:
    """Write base/, adapter/ and batches.json, which every contender reads."""
    import minilora as ml

    rows = checkpoint(folder / "base", options.short, 3 * options.batch, options.length, dtype)
    batches = [rows[i : i + options.batch] for i in range(0, len(rows), options.batch)]
    (folder / "batches.json").write_text(json.dumps(batches))
    model = ml.load_model(folder / "base", dtype=dtype)
    ml.inject(model, ml.LoRAConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    ml.save_adapter(model, folder / "adapter")
    print(ml.count_parameters(model))


def sides_of(job: str, dtype: torch.dtype) -> list[str]:
    """Return the contenders of a job.

    In fp32 "peers, bf16" is left out, because it would be the same as "peers".
    """
    sides = [side for side in JOBS[job] if side != "peers, bf16" or dtype == torch.bfloat16]
    if missing_peers():
        sides = [side for side in sides if not side.startswith("peers")]
    return sides


def compare(
    job: str, folder: Path, options: argparse.Namespace, dtype: torch.dtype
) -> dict[str, Any]:
    """Run the contenders of a job in turns; return its figures."""
    command = [__file__, "--dtype", dtype_name(dtype), "--side"]
    sides: dict[str, Contender] = {}
    for side in sides_of(job, dtype):
        env = BEST if side == "peers, best" else None
        sides[side] = Contender(side, [*command, side, job, folder], env)
    found = take_turns(sides, options.rounds, WARM_UP)
    for contender in sides.values():
        contender.close()
    trained = {side: answers for side, answers in found.items() if side != "limit"}
    for loss in ("first_loss", "loss"):
        losses: dict[str, float] = {}
        for side, answers in trained.items():
            # bf16 weights learn differently, so only their first loss is equal.
            if loss == "first_loss" or "bf16" not in side:
                losses[side] = answers[-1][loss]
        check_close(f"{job}, {loss}", losses, TOLERANCE)
    rows = report(f"{job}: seconds a step", found, "seconds", "minilora")
    own, tokens = rows["minilora"], options.batch * options.length
    for side, row in rows.items():
        if side in trained:
            row["tokens_per_second"] = round(tokens / row["seconds"]["median"], 1)
            row["memory_ratio"] = round(own["resident_mb"] / row["resident_mb"], 3)
            row["anonymous_ratio"] = round(own["anonymous_mb"] / row["anonymous_mb"], 3)
            print(f"{side:22}{row['tokens_per_second']:8,.0f} tokens/s; ", end="")
            print(f"minilora's memory is {row['memory_ratio']:.2f} of this (RSS), ", end="")
            print(f"{row['anonymous_ratio']:.2f} (anonymous)")
    if "limit" in found:
        names = found["limit"][0].keys() - {"seconds", "resident", "anonymous"}
        parts: dict[str, float] = {}
        for part in sorted(names):
            parts[part] = spread([answer[part] for answer in found["limit"]])["median"]
        pairs = zip(found["minilora"], found["limit"], strict=True)
        over = spread([mine["seconds"] / least["seconds"] for mine, least in pairs])
        rows["limit"] |= {"parts": parts, "over": over}
        span = f"{over['min']:.2f}-{over['max']:.2f}"
        print(f"time over the limit: {over['median']:.2f} ({span}); parts of the limit, seconds:")
        print(", ".join(f"{part} {value:.3f}" for part, value in parts.items()))
    return rows


# ---- the contenders


def contend(side: str, job: str, folder: Path, dtype: torch.dtype) -> None:
    """Run one contender until the comparing process closes the pipe."""
    batches = json.loads((folder / "batches.json").read_text())
    if side == "limit":
        from benchmarks.training.limit import Limit
        from minilora.models.checkpoint import SafetensorsCheckpoint

        config = SafetensorsCheckpoint(folder / "base").config
        return serve(Limit(config, len(batches[0]), len(batches[0][0]), dtype).seconds)
    if side == "minilora":
        ours(job, folder, batches, dtype)
    else:
        peers(job, folder, batches, side, dtype)


def ours(job: str, folder: Path, batches: Batches, dtype: torch.dtype) -> None:
    """Serve steps of minilora, with its public functions."""
    import minilora as ml
    from minilora.training import runtime

    quantize = "nf4" if job.startswith("qlora") else None
    kept = torch.float32 if job == "full" else dtype
    model = ml.load_model(folder / "base", quantize=quantize, dtype=kept)
    if job == "full":
        model.requires_grad_(True)
    else:
        ml.load_adapter(model, folder / "adapter", allow_untrained=True)
    with runtime.training_mode(model, "checkpointing" in job):
        serve(own_step(model, batches, autocast(kept, dtype)))


def peers(job: str, folder: Path, batches: Batches, side: str, dtype: torch.dtype) -> None:
    """Serve steps of peft + transformers + bitsandbytes, with their public functions."""
    from transformers import AutoModelForCausalLM

    kept = torch.float32 if job == "full" and side != "peers, bf16" else dtype
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder / "base",
        dtype=kept,
        attn_implementation="eager" if side == "peers, best" else "sdpa",
        **({"quantization_config": four_bit(dtype)} if job.startswith("qlora") else {}),
    )
    if job != "full":
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(model, str(folder / "adapter"), is_trainable=True)
        model = trained_in(adapted, dtype)
    if "checkpointing" in job:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    serve(peer_step(model, batches, autocast(kept, dtype)))


def autocast(kept: torch.dtype, dtype: torch.dtype) -> AbstractContextManager | None:
    """Return autocast if the weights have another dtype than the computation; else None."""
    return None if kept == dtype else torch.autocast("cpu", dtype)


if __name__ == "__main__":
    main()
