"""A model in the shape of Llama 3 8B: loading to 4 bits and training an adapter.

    python benchmarks/training/scale_8b.py --folder FOLDER-WITH-16-GB [--peers] [--keep]
        [--dtype auto]

The script writes a checkpoint of random weights (34 shards, bf16, 16.06 GB), loads it to NF4 with
double quantisation, and runs QLoRA steps with r = 16 and AdamW: 1 x 64 tokens on q, k, v, o;
1 x 64 on all linear layers; 1 x 512 on all, with gradient checkpointing. The file is in bf16, as
Llama's is; the computation is in bf16, or in fp32 on a CPU without it. The figures are seconds and
the peak of anonymous memory. A machine must have this memory, whereas the pages of mapped files can
be dropped.

With --peers, transformers + bitsandbytes + peft do the same in turns, step by step, with adapters
in that dtype (here in fp32). Each side loads once, one after the other; about half of so large a
file may be in the page cache. The script checks that the losses of the first steps agree. The last
line is one JSON document.

Without --folder the model has two small layers. This only shows that the script works.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# The root of the repository: benchmarks import each other by their full names.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks._lib.side_by_side import (
    TINY,
    Contender,
    add_dtype,
    check_close,
    compute_dtype,
    dtype_name,
    machine,
    missing_peers,
    report,
    serve,
    take_turns,
)
from benchmarks._lib.steps import four_bit, own_step, peer_step, trained_in

LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
LLAMA |= {
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
}
LLAMA |= {"rms_norm_eps": 1e-5, "tie_word_embeddings": False}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
JOBS = {  # name -> (target_modules, tokens, gradient checkpointing)
    "1 x 64, q k v o": (ATTENTION, 64, False),
    "1 x 64, all-linear": ("all-linear", 64, False),
    "1 x 512, all-linear, checkpointing": ("all-linear", 512, True),
}
TOLERANCE = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, help="folder for the 16 GB; an existing checkpoint in it is used"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="steps of each job, after one to warm up"
    )
    parser.add_argument("--jobs", default="0,1,2", help="the numbers of the jobs to run")
    parser.add_argument(
        "--peers", action="store_true", help="also run transformers + bitsandbytes + peft"
    )
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint")
    add_dtype(parser)
    parser.add_argument("--side", nargs=2, metavar=("SIDE", "FOLDER"), help="run as this contender")
    options = parser.parse_args()
    dtype = compute_dtype(options.dtype)
    jobs = [list(JOBS)[int(number)] for number in options.jobs.split(",") if number]
    if options.side:
        side, folder = options.side
        run = ours if side == "minilora" else peers
        return run(Path(folder), jobs, options.rounds + 1, dtype)
    missing = missing_peers() if options.peers else ""
    if missing:
        raise SystemExit(f"--peers needs packages that are {missing}")
    found: dict[str, Any] = {"benchmark": "scale_8b", **machine(dtype)}
    with nullcontext(options.folder) if options.folder else tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "llama-3-8b-shape"
        begun = time.perf_counter()
        make(folder, LLAMA if options.folder else TINY)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        found["gigabytes"] = round(size / 1e9, 2)
        print(f"{found['gigabytes']} GB in {folder}, {time.perf_counter() - begun:.0f} s")
        try:
            print(json.dumps(found | measure(folder, jobs, options, dtype)))
        finally:
            if not options.keep:
                shutil.rmtree(folder)


def measure(
    folder: Path, jobs: list[str], options: argparse.Namespace, dtype: torch.dtype
) -> dict[str, Any]:
    """Load the sides one after the other, then train them in turns; return the figures."""
    sides: dict[str, Contender] = {}
    loaded: dict[str, Any] = {}
    for side in ("minilora", "peers")[: 1 + options.peers]:
        command = [__file__, "--jobs", options.jobs, "--rounds", options.rounds]
        command += ["--dtype", dtype_name(dtype), "--side", side, folder]
        sides[side] = Contender(side, command)
        loaded[side] = [sides[side].ready]
    title = "load to NF4, double quantisation: seconds"
    figures = {"load": report(title, loaded, "load_seconds", "minilora")}
    for job in jobs:
        for contender in sides.values():
            contender.anonymous = (
                0  # the peak of this job alone; the table above has that of loading
            )
        found = take_turns(sides, options.rounds, warm_up=1)
        losses = {side: answers[0]["first_loss"] for side, answers in found.items()}
        check_close(f"{job}, loss", losses, TOLERANCE)
        figures[job] = report(f"{job}: seconds a step", found, "seconds", "minilora")
    for contender in sides.values():
        contender.close()
    return figures


def make(folder: Path, fields: dict[str, Any]) -> None:
    """Write config.json and a shard for the embedding, for each layer, and for the head.

    The values are random bf16 from one pool.
    """
    if (folder / "config.json").is_file():  # written last
        return
    from safetensors.torch import save_file

    width, inner, vocabulary = (
        fields[name] for name in ("hidden_size", "intermediate_size", "vocab_size")
    )
    keys = width // fields["num_attention_heads"] * fields["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    shards: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens": (vocabulary, width)}]
    for i in range(fields["num_hidden_layers"]):
        shards.append({f"model.layers.{i}.{name}": shape for name, shape in shapes.items()})
    head: dict[str, tuple[int, ...]] = {"model.norm": (width,)}
    if not fields["tie_word_embeddings"]:
        head["lm_head"] = (vocabulary, width)
    shards.append(head)
    folder.mkdir(parents=True, exist_ok=True)
    pool = torch.randn(2**24 + 3, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(
            {f"{name}.weight": _random(shape, pool, number) for name, shape in shard.items()},
            folder / file,
        )
        places |= {f"{name}.weight": file for name in shard}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )
    config = fields | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def _random(shape: tuple[int, ...], pool: Tensor, number: int) -> Tensor:
    """Ones for a norm; else the pool, over and over, from another place in each shard."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=pool.dtype)
    size, pool = shape[0] * shape[1], pool.roll(number * 1009)
    return pool.repeat(-(-size // len(pool)))[:size].view(shape).clone()


def batches(tokens: int, vocabulary: int) -> list[list[list[int]]]:
    """Return one batch with one row of random ids."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocabulary, (1, tokens), generator=generator).tolist()]


def ours(folder: Path, jobs: list[str], steps: int, dtype: torch.dtype) -> None:
    """Load the model, then serve the steps of each job on the base that the last job left."""
    import minilora as ml
    from minilora.training import runtime

    begun = time.perf_counter()
    model = ml.load_model(folder, quantize="nf4", dtype=dtype)
    seconds = time.perf_counter() - begun

    def every_step(targets: Any, tokens: int, checkpointing: bool) -> Iterator[dict[str, float]]:
        ml.inject(model, ml.LoRAConfig(r=16, lora_alpha=16, target_modules=targets))
        with runtime.training_mode(model, checkpointing):
            step = own_step(model, batches(tokens, model.config.vocab_size))
            for _ in range(steps):
                yield step()
        ml.eject(model)

    # The state of a job ends with the job.
    answers = chain.from_iterable(every_step(*JOBS[job]) for job in jobs)
    serve(lambda: next(answers), load_seconds=seconds)


def peers(folder: Path, jobs: list[str], steps: int, dtype: torch.dtype) -> None:
    """Load the model with the peers, then serve the steps of each job."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    begun = time.perf_counter()
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=four_bit(dtype), dtype=dtype
    )
    seconds = time.perf_counter() - begun

    def every_step(targets: Any, tokens: int, checkpointing: bool) -> Iterator[dict[str, float]]:
        config = LoraConfig(r=16, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
        adapted: Any = trained_in(get_peft_model(model, config), dtype)
        if checkpointing:
            adapted.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        step = peer_step(adapted, batches(tokens, model.config.vocab_size))
        for _ in range(steps):
            yield step()
        adapted.unload()

    answers = chain.from_iterable(every_step(*JOBS[job]) for job in jobs)
    serve(lambda: next(answers), load_seconds=seconds)


if __name__ == "__main__":
    main()
