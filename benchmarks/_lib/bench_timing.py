"""Layer shapes, clocks and buffers with which kernel_bench.py times calls.

    clock = GpuClock(torch.device("cuda"))
    calls = {"ours": lambda turn: ..., "theirs": lambda turn: ...}
    times = measure(clock, calls, rounds=21)    # microseconds, a list for each call

The L2 cache must not make a call look faster than the memory is. A call therefore receives the
number of its turn and uses the buffers of that turn. Together the buffers exceed three times the L2
cache, or there is one buffer for each call of a batch: a copy of four times the L2 cache runs
before each batch. The copy also keeps the GPU busy while the host queues the batch, so the time
that Python needs to launch a kernel is not measured. The results that a batch writes for a small
layer may still be in the L2 cache when the batch ends; such a layer can appear faster than memory.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import torch

Call = Callable[[int], Any]
COPIED = 256 << 20  # bytes to copy at least: long enough that starting the copy does not count


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder's linear layers, from config.json on the Hugging Face Hub."""

    hidden: int  # hidden_size
    intermediate: int  # intermediate_size
    heads: int  # num_attention_heads
    kv_heads: int  # num_key_value_heads
    head_dim: int  # head_dim, else hidden_size / num_attention_heads


MODELS = {
    "Llama-3-8B": Sizes(4096, 14336, 32, 8, 128),  # meta-llama/Meta-Llama-3-8B
    "Mistral-7B": Sizes(4096, 14336, 32, 8, 128),  # mistralai/Mistral-7B-v0.1
    "Qwen2.5-7B": Sizes(3584, 18944, 28, 4, 128),  # Qwen/Qwen2.5-7B
    "SmolLM2-135M": Sizes(576, 1536, 9, 3, 64),  # HuggingFaceTB/SmolLM2-135M
    "tiny": Sizes(64, 192, 2, 1, 32),  # invented, to try the script on a CPU
}


def layers(model: str) -> list[tuple[int, int]]:
    """Return (out, in) of each distinct linear layer of a model.

    The output layer is left out, because it stays dense in QLoRA. Raises ValueError for a model
    that is not in MODELS.
    """
    if model not in MODELS:
        raise ValueError(
            f"models: expected names from {', '.join(MODELS)}, got {model!r}; "
            "add the sizes of another model to MODELS"
        )
    m = MODELS[model]
    queries = m.heads * m.head_dim
    keys = m.kv_heads * m.head_dim
    every = [
        (queries, m.hidden),  # q_proj
        (keys, m.hidden),  # k_proj, v_proj
        (m.hidden, queries),  # o_proj
        (m.intermediate, m.hidden),  # gate_proj, up_proj
        (m.hidden, m.intermediate),  # down_proj
    ]
    return list(dict.fromkeys(every))


def shapes_of(models: Sequence[str]) -> dict[tuple[int, int], list[str]]:
    """Map each shape to its models. Llama-3-8B and Mistral-7B have the same shapes."""
    found: dict[tuple[int, int], list[str]] = {}
    for model in models:
        for shape in layers(model):
            found.setdefault(shape, []).append(model)
    return found


class Clock(Protocol):
    """A clock that times batches of calls on one device."""

    cache: int  # size of the last cache in bytes
    turns: int  # calls in a batch

    def batch(self, call: Call, first: int) -> float:
        """Return the microseconds of one call: the mean of `turns` calls.

        The calls are call(first), call(first + 1) and so on.
        """
        ...

    def copy(self, turn: int) -> int:
        """Copy a large buffer; return the bytes read and written."""
        ...


class CpuClock:
    """A clock on perf_counter, to try a script. Caches stay warm."""

    cache, turns = 0, 2

    def __init__(self) -> None:
        self._source, self._target = torch.zeros(2, 1 << 24, dtype=torch.uint8)

    def copy(self, turn: int) -> int:
        self._target.copy_(self._source)
        return 2 * self._source.nbytes

    def batch(self, call: Call, first: int) -> float:
        start = time.perf_counter()
        for turn in range(first, first + self.turns):
            call(turn)
        return (time.perf_counter() - start) * 1e6 / self.turns


class GpuClock:
    """A clock on the GPU's own events, for CUDA and ROCm."""

    turns = 16  # few enough that the GPU's queue of launches holds them all

    def __init__(self, device: torch.device) -> None:
        self.cache = torch.cuda.get_device_properties(device).L2_cache_size
        if torch.version.hip:
            # PyTorch does not report AMD's Infinity Cache, which comes after the L2 cache.
            self.cache = max(self.cache, 256 << 20)
        size = max(2 * self.cache, COPIED)
        self._source, self._target = torch.zeros(2, size, dtype=torch.uint8, device=device)
        self._copy_us = math.inf
        self._copy_us = min(self.batch(self.copy, 0) for _ in range(3))

    def copy(self, turn: int) -> int:
        self._target.copy_(self._source)
        return 2 * self._source.nbytes

    def batch(self, call: Call, first: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        # An untimed batch shows how long the host takes to queue it.
        for turn in range(first, first + self.turns):
            call(turn)
        host_us = (time.perf_counter() - start) * 1e6
        before = torch.cuda.Event(enable_timing=True)
        after = torch.cuda.Event(enable_timing=True)
        copies = 1 + math.ceil(1.5 * host_us / self._copy_us)
        for _ in range(copies):
            self.copy(0)
        # A read of twice the cache: the data of the copies leaves the cache before the timing
        # starts, not during it.
        self._source.view(torch.int64).amax()
        before.record()
        for turn in range(first, first + self.turns):
            call(turn)
        after.record()
        after.synchronize()
        return before.elapsed_time(after) * 1e3 / self.turns


def measure(clock: Clock, calls: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    """Return microseconds of each call: `rounds` batches in turns, after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round in range(rounds + 1):
        for name, call in calls.items():
            us = clock.batch(call, round * clock.turns)
            if round:
                times[name].append(us)
    return times


def copy_gb_per_s(clock: Clock, rounds: int) -> float:
    """Return the bandwidth of copying a large buffer: 10^9 bytes a second, read and written."""
    microseconds = measure(clock, {"copy": clock.copy}, rounds)["copy"]
    return clock.copy(0) / statistics.median(microseconds) / 1e3


def buffers(bytes_of_one: int, clock: Clock) -> int:
    """Return the number of buffers of this size to use in turn: see the module's docstring."""
    return max(2, min(clock.turns, math.ceil(3 * clock.cache / bytes_of_one)))


def card(device: torch.device) -> dict[str, Any]:
    """Return the device and the versions of the packages."""
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        found: dict[str, Any] = {
            "device": p.name,
            "sms": p.multi_processor_count,
            "l2_mib": round(p.L2_cache_size / 2**20, 1),
            "memory_gib": round(p.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "rocm": torch.version.hip,
        }
    else:
        found = {
            "device": f"CPU, {torch.backends.cpu.get_cpu_capability()}",
            "threads": torch.get_num_threads(),
        }
    return found | {name: _version(name) for name in ("torch", "triton", "bitsandbytes")}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
