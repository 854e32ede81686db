"""What kernel_bench.py needs to time a call: real layers' shapes, clocks that the cache cannot fool.

    clock = GpuClock(torch.device("cuda"))
    times = measure(clock, {"ours": lambda turn: ..., "theirs": lambda turn: ...}, rounds=21)    # us, a list for each

A call gets the number of its turn and takes that turn's buffers: there are enough that together
they exceed three times the L2 cache, or as many as a batch has calls, since a copy of four times
the L2 runs before each batch. The copy also keeps the GPU busy while the host queues the batch, so
that Python's time to launch a kernel is not measured. What a batch on a small layer writes may
still sit in the L2 at its end: such a layer can come out faster than memory.
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
    """What a decoder's linear layers measure, as in config.json on the Hugging Face Hub."""

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
    "tiny": Sizes(64, 192, 2, 1, 32),  # nobody's: to try the script out on a CPU
}


def layers(model: str) -> list[tuple[int, int]]:
    """(out, in) of a model's distinct linear layers; the output layer stays dense in QLoRA and is not among them.

    Raises ValueError for a model that MODELS does not have.
    """
    if model not in MODELS:
        raise ValueError(
            f"models: expected names out of {', '.join(MODELS)}, got {model!r}; or add its sizes there"
        )
    m = MODELS[model]
    queries, keys = m.heads * m.head_dim, m.kv_heads * m.head_dim
    every = [
        (queries, m.hidden),  # q_proj
        (keys, m.hidden),  # k_proj, v_proj
        (m.hidden, queries),  # o_proj
        (m.intermediate, m.hidden),  # gate_proj, up_proj
        (m.hidden, m.intermediate),  # down_proj
    ]
    return list(dict.fromkeys(every))


def shapes_of(models: Sequence[str]) -> dict[tuple[int, int], list[str]]:
    """Shape -> the models that have it: Llama-3-8B and Mistral-7B share all of theirs."""
    found: dict[tuple[int, int], list[str]] = {}
    for model in models:
        for shape in layers(model):
            found.setdefault(shape, []).append(model)
    return found


class Clock(Protocol):
    """Times batches of calls on one device."""

    cache: int  # bytes that its last cache may hold
    turns: int  # calls of a batch

    def batch(self, call: Call, first: int) -> float:
        """Microseconds of a call, the mean of call(first), call(first + 1) ... `turns` of them."""
        ...

    def copy(self, turn: int) -> int:
        """Copy a large buffer; the bytes read and written."""
        ...


class CpuClock:
    """perf_counter, to try a script out: caches are left warm."""

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
    """The GPU's own events, on CUDA and on ROCm."""

    turns = 16  # few enough that the GPU's queue of launches holds them all

    def __init__(self, device: torch.device) -> None:
        self.cache = torch.cuda.get_device_properties(device).L2_cache_size
        if torch.version.hip:
            self.cache = max(
                self.cache, 256 << 20
            )  # AMD's Infinity Cache behind the L2 is not reported
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
        for turn in range(
            first, first + self.turns
        ):  # untimed: how long does the host take to queue them?
            call(turn)
        host_us = (time.perf_counter() - start) * 1e6
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(1 + math.ceil(1.5 * host_us / self._copy_us)):
            self.copy(0)
        self._source.view(
            torch.int64
        ).amax()  # reads twice the cache: what the copies wrote leaves it before, not within
        before.record()
        for turn in range(first, first + self.turns):
            call(turn)
        after.record()
        after.synchronize()
        return before.elapsed_time(after) * 1e3 / self.turns


def measure(clock: Clock, calls: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    """Microseconds of each call, `rounds` batches of each, in turns, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round in range(rounds + 1):
        for name, call in calls.items():
            us = clock.batch(call, round * clock.turns)
            if round:
                times[name].append(us)
    return times


def copy_gb_per_s(clock: Clock, rounds: int) -> float:
    """10^9 bytes a second, read and written, of copying a large buffer: what the memory really gives."""
    return (
        clock.copy(0)
        / statistics.median(measure(clock, {"copy": clock.copy}, rounds)["copy"])
        / 1e3
    )


def buffers(bytes_of_one: int, clock: Clock) -> int:
    """How many buffers of this size to take in turn, see above."""
    return max(2, min(clock.turns, math.ceil(3 * clock.cache / bytes_of_one)))


def card(device: torch.device) -> dict[str, Any]:
    """What the figures belong to: the device and the versions."""
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        found: dict[str, Any] = {"device": p.name, "sms": p.multi_processor_count}
        found |= {
            "l2_mib": round(p.L2_cache_size / 2**20, 1),
            "memory_gib": round(p.total_memory / 2**30, 1),
        }
        found |= {"cuda": torch.version.cuda, "rocm": torch.version.hip}
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
