"""Tokens a second of greedy decoding, one row at a time: minilora, transformers, llama.cpp.

    python benchmarks/inference/bench_generate.py [--rounds 5] [--prompt 64] [--new 64]
        [--dtype auto]

The model is SmolLM2-135M, the prompt has real tokens, and `--new` tokens follow it. The time
includes the prompt. The contenders take turns:

    dense   all compute in one dtype: bf16, or fp32 on a CPU without it
    nf4     both in 4 bits with double quantisation (transformers with bitsandbytes). Both multiply
            each token directly from the codes, in C; without a C compiler minilora dequantises
            every weight for each token. "minilora, dense" is the 4-bit model within
            `ml.dequantized_weights`: dequantised once and dense in memory

            "llama.cpp, Q4_0" is llama.cpp on the same model in 4 bits of another kind, with 32
            weights a scale and 8 bits for the head

The script first checks that the contenders of a kind begin with the same tokens, except for
llama.cpp, whose weights are rounded otherwise. A token reads every weight once, so the speed is also
printed as GB of weights a second, which the memory limits. The last line is one JSON document.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

# The root of the repository: benchmarks import each other by their full names.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks._lib.side_by_side import (
    Contender,
    add_dtype,
    checkpoint,
    compute_dtype,
    dtype_name,
    machine,
    missing_peers,
    report,
    serve,
    take_turns,
)
from benchmarks._lib.steps import four_bit

# The first tokens that all contenders must share. Later ones may differ where two tokens are almost
# equally likely.
SAME = 4
LLAMA_CPP = "llama.cpp, Q4_0"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument(
        "--short", action="store_true", help="a random model of two layers, two short rounds"
    )
    add_dtype(parser)
    parser.add_argument(
        "--side", nargs=3, metavar=("SIDE", "KIND", "FOLDER"), help="run as this contender"
    )
    options = parser.parse_args()
    dtype = compute_dtype(options.dtype)
    if options.side:
        side, kind, folder = options.side
        prompt = json.loads((Path(folder) / "prompt.json").read_text())
        run = {"minilora": ours, "transformers": theirs, LLAMA_CPP: llama_cpp}[side]
        return run(kind, Path(folder) / "base", prompt, options.new, dtype)
    if options.short:
        options.rounds, options.prompt, options.new = 2, 8, 8
    found: dict[str, Any] = {"benchmark": "bench_generate", **machine(dtype)}
    found |= {"new": options.new, "prompt": options.prompt}
    sides = ("minilora", "transformers")
    missing = missing_peers("transformers", "bitsandbytes", "accelerate")
    if missing:
        print(f"minilora alone: {missing}")
        sides = ("minilora",)
    with tempfile.TemporaryDirectory() as name:
        rows = checkpoint(Path(name) / "base", options.short, 1, options.prompt, dtype)
        (Path(name) / "prompt.json").write_text(json.dumps(rows[0]))
        found["dense"] = compare("dense", sides, Path(name), options, dtype)
        if missing_peers("xllamacpp"):
            print(f"without llama.cpp: {missing_peers('xllamacpp')}")
        else:
            write_q4_0(Path(name))
            sides = (*sides, LLAMA_CPP)
        found["nf4"] = compare("nf4", sides, Path(name), options, dtype)
    print(json.dumps(found))


def compare(
    kind: str, sides: tuple[str, ...], folder: Path, options: argparse.Namespace, dtype: torch.dtype
) -> dict[str, Any]:
    """Run the contenders of a kind in turns; in 4 bits "minilora, dense" is one of them."""
    command = [__file__, "--new", options.new, "--dtype", dtype_name(dtype), "--side"]
    contenders = {side: Contender(side, [*command, side, kind, folder]) for side in sides}
    if kind == "nf4":
        contenders["minilora, dense"] = Contender(
            "minilora", [*command, "minilora", "made dense", folder]
        )
    found = take_turns(contenders, options.rounds)
    for contender in contenders.values():
        contender.close()
    answers = {side: one[0]["tokens"] for side, one in found.items() if side != LLAMA_CPP}
    shared = 0  # tokens that all answers share at their start
    for tokens in zip(*answers.values(), strict=True):
        if len(set(tokens)) > 1:
            break
        shared += 1
    print(f"\n{kind}: the first {shared} of {options.new} tokens are the same")
    if shared < min(SAME, options.new):
        raise SystemExit(f"{kind}: the contenders generate different tokens: {answers}")
    rows = report(f"{kind}: seconds for {options.new} tokens", found, "seconds", "minilora")
    for side, row in rows.items():
        per_second = options.new / row["seconds"]["median"]
        row["tokens_per_second"] = round(per_second, 1)
        row["weights_gb_per_second"] = round(per_second * found[side][0]["weight_bytes"] / 1e9, 2)
        print(f"{side:22}{row['tokens_per_second']:10.1f} tokens/s", end="")
        print(f"{row['weights_gb_per_second']:10.2f} GB/s of weights")
    return rows


def ours(kind: str, folder: Path, prompt: list[int], new: int, dtype: torch.dtype) -> None:
    """Serve greedy decoding in minilora, without an end token."""
    import minilora as ml
    from minilora.generation.generate import generate_ids
    from minilora.generation.sampling import Decoding

    model = ml.load_model(folder, quantize=None if kind == "dense" else "nf4", dtype=dtype)
    with ml.dequantized_weights(model) if kind == "made dense" else nullcontext():
        size = sum(parameter.nbytes for parameter in model.parameters())
        serve(timed(lambda: generate_ids(model, [prompt], Decoding(new))[0], size))


def theirs(kind: str, folder: Path, prompt: list[int], new: int, dtype: torch.dtype) -> None:
    """Serve greedy decoding with transformers' generate, without an end token."""
    from transformers import AutoModelForCausalLM

    quantized = {"quantization_config": four_bit(dtype)} if kind == "nf4" else {}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **quantized)
    ids = torch.tensor([prompt])
    settings = {
        "attention_mask": torch.ones_like(ids),
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "max_new_tokens": new,
        "min_new_tokens": new,
    }

    def generate() -> list[int]:
        return model.generate(ids, **settings)[0, len(prompt) :].tolist()

    size = sum(parameter.nbytes for parameter in model.parameters())
    serve(timed(generate, size))


def write_q4_0(folder: Path) -> None:
    """Write the base as a GGUF file in Q4_0."""
    import minilora as ml

    model = ml.load_model(folder / "base", dtype=torch.float32)
    ml.save_model(model, folder / "q4_0.gguf", format="gguf", dtype="q4_0")


def llama_cpp(kind: str, folder: Path, prompt: list[int], new: int, dtype: torch.dtype) -> None:
    """Serve greedy decoding in llama.cpp, without an end token."""
    from benchmarks._lib.llama_cpp import Llama

    with Llama(folder.parent / "q4_0.gguf") as llama:
        generate = llama.greedy(torch.get_num_threads())
        serve(timed(lambda: generate(prompt, new), llama.weight_bytes))


def timed(call: Callable[[], list[int]], weight_bytes: int) -> Callable[[], dict[str, Any]]:
    """Return a function that runs `call` and returns its seconds, its tokens and a constant."""

    def step() -> dict[str, Any]:
        begun = time.perf_counter()
        tokens = call()
        seconds = time.perf_counter() - begun
        return {"seconds": seconds, "tokens": tokens, "weight_bytes": weight_bytes}

    return step


if __name__ == "__main__":
    main()
