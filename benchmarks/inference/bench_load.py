"""How soon a model is there: loading to 4 bits, and from the process's start to the first forward pass.

    python benchmarks/inference/bench_load.py [--rounds 5] [--folder
    A-FOLDER-OR-NOTHING-FOR-SMOLLM2] [--dtype auto]

Each sample is a fresh process that imports, loads a folder whose files are in the page cache, and
runs one forward pass over 64 tokens, without a compiler; this library and transformers (+
bitsandbytes) in turns. The folder holds the dtype that both compute in: bf16, or fp32 on a CPU
without it. "load" is the call that loads, imports left out; "start" is everything from the moment
the process is made. Each to 4 bits ("nf4") and as the folder is ("dense"). Checked: the losses on
the 64 tokens agree. The last line is one JSON document.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.append(
    str(Path(__file__).resolve().parents[2])
)  # the root: benchmarks are imported by their full names

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
)

TOKENS = 64
TOLERANCE = {
    "nf4": 0.02,
    "dense": 0.01,
}  # of the loss; bf16 rounds elsewhere, nested scales may be one code apart


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="a checkpoint to load in place of SmolLM2")
    parser.add_argument(
        "--short", action="store_true", help="a random model of two layers, one round"
    )
    add_dtype(parser)
    parser.add_argument("--side", nargs=2, metavar=("SIDE", "KIND"), help="be this contender")
    options = parser.parse_args()
    if options.side:
        side, kind = options.side
        return (ours if side == "minilora" else theirs)(kind, options.folder, options.dtype)
    dtype = compute_dtype(options.dtype)
    found: dict[str, Any] = {"benchmark": "bench_load", **machine(dtype)}
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name) / "base"
        if not options.folder:
            checkpoint(folder, options.short, 1, TOKENS, dtype)
        rounds, warm_up = (1, 0) if options.short else (options.rounds, 1)
        print(json.dumps(found | compare(folder, rounds, dtype, warm_up)))


def compare(folder: Path, rounds: int, dtype: Any, warm_up: int = 1) -> dict[str, Any]:
    """Both kinds, both figures; also what peers.py reports as `load`. The round to warm up fills the page cache."""
    sides = ("minilora", "transformers")
    if why := missing_peers("transformers", "bitsandbytes", "accelerate"):
        print(f"minilora alone: {why}")
        sides = sides[:1]
    command = [__file__, "--folder", folder, "--dtype", dtype_name(dtype), "--side"]
    tables: dict[str, Any] = {}
    for kind in TOLERANCE:
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for number in range(warm_up + rounds):
            for side in sides if number % 2 else sides[::-1]:
                contender = Contender(side, [*command, side, kind])
                contender.close()
                if number >= warm_up:
                    found[side].append(contender.ready)
        check_close(
            f"{kind}, loss",
            {side: answers[0]["loss"] for side, answers in found.items()},
            TOLERANCE[kind],
        )
        tables[kind] = {
            "load": report(f"{kind}: seconds to load", found, "load_seconds", "minilora"),
            "start": report(
                f"{kind}: seconds to the first forward pass", found, "start_seconds", "minilora"
            ),
        }
    return tables


def ours(kind: str, folder: Path, dtype: str) -> None:
    """Import, load, run once."""
    import torch

    import minilora as ml

    begun = time.perf_counter()
    model = ml.load_model(folder, quantize="nf4" if kind == "nf4" else None, dtype=dtype)
    seconds = time.perf_counter() - begun
    with torch.no_grad():
        answer(model(tokens(model.config.vocab_size)), seconds)


def theirs(kind: str, folder: Path, dtype: str) -> None:
    """The same in transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks._lib.steps import four_bit

    quantized = {"quantization_config": four_bit(getattr(torch, dtype))} if kind == "nf4" else {}
    begun = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **quantized)
    seconds = time.perf_counter() - begun
    with torch.no_grad():
        answer(model(tokens(model.config.vocab_size)).logits, seconds)


def tokens(vocabulary: int) -> Any:
    """Ids (1, TOKENS), the same on both sides."""
    import torch

    return torch.randint(0, vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))


def answer(logits: Any, seconds: float) -> None:
    """Say how long loading took, and what the model makes of the tokens."""
    from torch.nn.functional import cross_entropy

    ids = tokens(logits.shape[-1])
    loss = cross_entropy(logits[0, :-1].float(), ids[0, 1:]).item()
    serve(dict, loss=loss, load_seconds=seconds)


if __name__ == "__main__":
    main()
