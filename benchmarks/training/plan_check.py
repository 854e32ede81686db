"""Planned and measured peak memory of each method.

    python benchmarks/training/plan_check.py

Each run trains SmolLM2-135M-Instruct on full rows for two steps, in a separate process, in bf16, or
in fp32 on a CPU without it (--dtype); in fp32 "full" has no autocast. On a CPU the script samples
the anonymous memory of the process (RssAnon) every 2 ms. It subtracts the memory after a run on one
short row: Python, torch, and the libraries that they load. glibc's malloc gives freed blocks back
(MALLOC_MMAP_THRESHOLD_) and the pool takes none, so the measured memory is that of the tensors.
`--malloc default` leaves both at their defaults, which keep much memory. On a GPU the measured
memory is the peak that torch allocated. The last line is one JSON document.
"""

import argparse
import gc
import json
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch

# The root of the repository: benchmarks import each other by their full names.
sys.path.append(str(Path(__file__).resolve().parents[2]))

import minilora as ml
from benchmarks._lib.side_by_side import add_dtype, compute_dtype, dtype_name, fresh, machine
from minilora_kernels import allocator

RUNS = {  # method, gradient checkpointing
    "qlora": ("qlora", False),
    "qlora, checkpointing": ("qlora", True),
    "lora": ("lora", False),
    "lora, checkpointing": ("lora", True),
    "full": ("full", False),
    "full, checkpointing": ("full", True),
}
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
LORA = ml.LoRAConfig(r=16, lora_alpha=16, target_modules="all-linear")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--optim", default="adamw_torch")
    parser.add_argument("--malloc", choices=["exact", "default"], default="exact")
    add_dtype(parser)
    parser.add_argument("--run", choices=RUNS, help="do only this run, in this process")
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run(options.run, options)))
        return
    dtype = compute_dtype(options.dtype)
    found = vars(options) | {"benchmark": "plan_check"} | machine(dtype)
    options.dtype = dtype_name(dtype)
    given = [
        f"--{name}={getattr(options, name)}"
        for name in ("batch", "max_length", "optim", "malloc", "dtype")
    ]
    env = EXACT if options.malloc == "exact" else None
    figures = {name: fresh(__file__, "--run", name, *given, env=env) for name in RUNS}
    print(f"\n{'GB':<22}{'planned':>10}{'measured':>10}{'ratio':>8}  peak during")
    for name, f in figures.items():
        sizes = f"{f['planned'] / 1e9:>10.3f}{f['measured'] / 1e9:>10.3f}"
        print(f"{name:<22}{sizes}{f['measured'] / f['planned']:>8.3f}  {f['moment']}")
    print(
        f"{options.batch} x {options.max_length} tokens, {options.optim}; malloc {options.malloc}"
    )
    print(json.dumps(found | {"runs": figures}))


def run(name: str, options: argparse.Namespace) -> dict:
    """Train in this process; return planned and measured bytes."""
    if options.malloc == "exact":
        allocator.SMALL = sys.maxsize
    method, checkpointing = RUNS[name]
    full = method == "full"
    source = ml.samples.smollm2()
    dtype = compute_dtype(options.dtype)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = ml.TrainConfig(
        method="full" if full else "lora",
        bf16=True if full and dtype == torch.bfloat16 else None,
        max_steps=2,
        per_device_train_batch_size=options.batch,
        max_length=options.max_length,
        gradient_checkpointing=checkpointing,
        optim=options.optim,
    )
    kept = torch.float32 if full else dtype
    loading = {"quantize": "nf4" if method == "qlora" else None, "dtype": dtype_name(kept)}
    plan = ml.plan_memory(source, None if full else LORA, config, **loading)
    tokenizer = ml.load_tokenizer(source)
    text = "\n".join(row["text"] for row in ml.samples.prose())
    ids = tokenizer.encode(text * 8)
    size = options.max_length
    rows = [
        {"text": tokenizer.decode(ids[i * size : (i + 2) * size])} for i in range(2 * options.batch)
    ]

    def train(rows: list, config: ml.TrainConfig) -> None:
        model = ml.load_model(source, device=device, **loading)
        if not full:
            ml.inject(model, LORA)
        ml.train(model, tokenizer, rows, config)

    train(rows[:1], replace(config, max_length=16, max_steps=1))
    gc.collect()
    with Peak(device) as peak:
        train(rows, config)
    return {
        "planned": plan.total,
        "measured": peak.most,
        "moment": plan.moment,
        "device": device.type,
    }


class Peak:
    """Peak of memory inside the context, in addition to the memory before: `most` bytes."""

    def __init__(self, device: torch.device):
        self.device, self.most, self._open = device, 0, True

    def _held(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024

    def _sample(self) -> None:
        while self._open:
            self.most = max(self.most, self._held() - self._before)
            time.sleep(0.002)

    def __enter__(self) -> "Peak":
        self._before = self._held()
        self._thread = threading.Thread(target=self._sample)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False
        if self.device.type == "cuda":
            self.most = torch.cuda.max_memory_allocated(self.device) - self._before
        else:
            self._thread.join()


if __name__ == "__main__":
    main()
