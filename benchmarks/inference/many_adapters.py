"""A batch with a different adapter for each row, compared with a batch that uses one adapter.

    python benchmarks/inference/many_adapters.py

    plain         one adapter for all rows, through set_adapter
    1 by row      the same adapter for every row, through ml.per_row_adapters
    4, 16 by row  that number of adapters over the rows

The script times reading a prompt of --length tokens and writing --new tokens separately, greedily,
without an end token, and in turns. The ratio is to "plain" in the same round. All compute in bf16,
or in fp32 on a CPU without it (--dtype). First it checks that the logits of each row are those of
its adapter alone, up to 1e-4 of the largest (in 16 bits 0.05). The last line is one JSON document.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

# The root of the repository: benchmarks import each other by their full names.
sys.path.append(str(Path(__file__).resolve().parents[2]))

import minilora as ml
from benchmarks._lib.side_by_side import add_dtype, compute_dtype, dtype_name, machine, spread
from minilora.generation.generate import generate_ids
from minilora.generation.sampling import Decoding
from minilora.models.config import DecoderConfig
from minilora.models.decoder import CausalLM
from minilora.models.padded_batch import inference

COUNT = 16  # adapters, and rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    add_dtype(parser)
    parser.add_argument("--short", action="store_true", help="a tiny random model, two rounds")
    options = parser.parse_args()
    if options.short:
        options.rounds, options.length, options.new = 2, 8, 4
    dtype = compute_dtype(options.dtype)
    found: dict[str, Any] = {"benchmark": "many_adapters", **machine(dtype)}
    model = build(options, dtype)
    vocabulary = model.config.vocab_size
    prompts = torch.randint(
        3, vocabulary, (COUNT, options.length), generator=torch.Generator().manual_seed(0)
    ).tolist()
    check(model, prompts)
    contenders = {
        f"{n} by row": [f"adapter{row % n}" for row in range(COUNT)] for n in (1, 4, COUNT)
    }
    runs: dict[str, Callable[[int], Any]] = {
        "plain": lambda new: generate_ids(model, prompts, Decoding(new))
    }
    for name, adapters in contenders.items():
        runs[name] = lambda new, adapters=adapters: generate_ids(
            model, prompts, Decoding(new), adapters
        )
    seconds: dict[str, dict[str, list[float]]] = {name: {"read": [], "write": []} for name in runs}
    for _ in range(options.rounds + 1):  # the first round is not counted
        for name, run in runs.items():
            read = clock(run, 1)
            total = clock(run, 1 + options.new)
            seconds[name]["read"].append(read)
            seconds[name]["write"].append((total - read) / options.new)
    table = {}
    print(f"{'':<14}{'prompt s':>10}{'ratio':>8}{'token s':>10}{'ratio':>8}")
    for name, measured in seconds.items():
        table[name] = row = {}
        for part, values in measured.items():
            pairs = zip(values, seconds["plain"][part], strict=True)
            ratios = [value / plain for value, plain in pairs]
            row[part] = {"seconds": spread(values[1:]), "ratio": spread(ratios[1:])}
        prompt, token = row["read"], row["write"]
        line = f"{name:<14}{prompt['seconds']['median']:>10.3f}{prompt['ratio']['median']:>8.2f}"
        print(f"{line}{token['seconds']['median']:>10.4f}{token['ratio']['median']:>8.2f}")
    layers = f"r = {options.r} on all linear layers, {dtype_name(dtype)}"
    print(f"{COUNT} rows of {options.length} tokens, {layers}")
    print(json.dumps(found | {"by_row": table}))


def build(options: argparse.Namespace, dtype: torch.dtype) -> Any:
    """Return the model with COUNT adapters, each with a random B, as if it were trained."""
    if options.short:
        config = DecoderConfig(
            97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = CausalLM(config).to(dtype).eval()
    else:
        model = ml.load_model(ml.samples.smollm2(), dtype=dtype).eval()
    for number in range(COUNT):
        ml.inject(
            model,
            ml.LoRAConfig(r=options.r, target_modules="all-linear"),
            name=f"adapter{number}",
            seed=number,
        )
        for key, tensor in ml.adapter_state_dict(model, f"adapter{number}").items():
            if "lora_B" in key:
                tensor.normal_(std=0.02, generator=torch.Generator().manual_seed(number))
    return model


def check(model: Any, prompts: list[list[int]]) -> None:
    """Raise AssertionError unless each row has the logits of a batch with its adapter alone."""
    tokens, names = torch.tensor(prompts)[:4, :8], [f"adapter{row}" for row in range(4)]
    with inference(model):
        with ml.per_row_adapters(model, names):
            found = model(tokens).float()
        for row, name in enumerate(names):
            ml.set_adapter(model, name)
            expected = model(tokens)[row].float()
            limit = 1e-4 if found.dtype == expected.dtype == model.lm_head.weight.dtype else 0.05
            assert (found[row] - expected).abs().max() <= limit * expected.abs().max(), name
    ml.set_adapter(model, "adapter0")


def clock(run: Callable[[int], Any], new: int) -> float:
    """Return the seconds of one run."""
    begun = perf_counter()
    run(new)
    return perf_counter() - begun


if __name__ == "__main__":
    main()
