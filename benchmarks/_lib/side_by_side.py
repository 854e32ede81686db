"""Tools of the benchmarks against other libraries: processes that take turns, and their costs.

    a, b = Contender("a", [__file__, "--side", "a"]), Contender("b", [__file__, "--side", "b"])
    found = take_turns({"a": a, "b": b}, rounds=5)        # name -> its answers
    report("seconds a step", found, "seconds", own="a")   # medians, min-max, ratios in each round

A contender is a Python program that calls `serve`. It stays alive and sleeps between its turns, so
one side keeps nothing in the memory of the other. If the machine is slower for a minute, it is
slower for both sides: only ratios within one round are compared. The memory of a contender is read
from outside (Linux), every 10 ms while it works: the peak of its resident memory and of its
anonymous memory. Anonymous memory leaves out the pages of mapped files, because the system can drop
them at any time.

All sides of a benchmark compute in one dtype. `--dtype auto` selects the dtype that is fast on this
hardware, by the rule of `load_model`, because an emulated dtype takes many times as long.
"""

import argparse
import json
import math
import os
import queue
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch  # at run time it is imported in functions: bench_load.py times the import

PEERS = ("transformers", "peft", "bitsandbytes", "accelerate")
DTYPES = ("auto", "bfloat16", "float32")  # in which a benchmark can compute a model
PROMPT = "> "  # before each answer; other output of a library goes to stderr
TINY = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}


# ---- in the process of a contender


def serve(step: Callable[[], dict[str, Any]], **ready: Any) -> None:
    """Answer when everything is loaded; then answer each input line with the result of a step."""
    print(PROMPT + json.dumps(ready), flush=True)
    for _ in sys.stdin:
        print(PROMPT + json.dumps(step()), flush=True)


# ---- in the process that compares


class Contender:
    """A process that answers.

    `resident` and `anonymous` are its peaks so far in bytes; `now` is its anonymous memory at the
    last reading. All three are 0 where they cannot be read.
    """

    def __init__(
        self, name: str, command: Sequence[object], env: Mapping[str, str] | None = None
    ) -> None:
        self.name, self.resident, self.anonymous, self.now = name, 0, 0, 0
        self._begun = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=os.environ | dict(env or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.ready = self._answer()
        # from the start of the process to its first answer
        self.ready["start_seconds"] = time.perf_counter() - self._begun

    def step(self) -> dict[str, Any]:
        """Run one step; return its answer and the memory so far."""
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process and wait until its memory is free."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith(PROMPT):
                self._lines.put(line.removeprefix(PROMPT))
            else:
                sys.stderr.write(line)
        self._lines.put(None)

    def _answer(self) -> dict[str, Any]:
        while True:
            try:
                line = self._lines.get(timeout=0.01)
                break
            except queue.Empty:
                self._watch()
        if line is None:
            raise SystemExit(f"{self.name} ended with status {self._process.wait()}: see above.")
        self._watch()
        return json.loads(line) | {"resident": self.resident, "anonymous": self.anonymous}

    def _watch(self) -> None:
        found = memory(self._process.pid)
        if not found:
            return
        self.resident = max(self.resident, found.get("VmHWM", 0))
        self.now = found.get("RssAnon", 0)
        self.anonymous = max(self.anonymous, self.now)


def memory(process: int) -> dict[str, int]:
    """Return peak resident (VmHWM) and present anonymous (RssAnon) bytes; {} without Linux."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:  # no Linux, or the process has just ended
        return {}
    lines = re.findall(r"^(VmHWM|RssAnon):\s+(\d+) kB", status, re.M)
    return {name: int(kilobytes) * 1024 for name, kilobytes in lines}


def take_turns(
    contenders: Mapping[str, Any], rounds: int, warm_up: int = 2
) -> dict[str, list[dict[str, Any]]]:
    """Return the answers of each contender in `rounds` rounds, after the rounds to warm up.

    Every other round runs in reverse order.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(warm_up + rounds):
        for name in names if number % 2 else names[::-1]:
            answer = contenders[name].step()
            if number >= warm_up:
                found[name].append(answer)
    return found


def check_close(label: str, values: Mapping[str, float], tolerance: float) -> None:
    """Raise SystemExit unless all contenders have the same value, so that equal work is timed."""
    first = next(iter(values.values()))
    limit = tolerance * abs(first)
    # With NaN this comparison is false.
    if not all(abs(value - first) <= limit for value in values.values()):
        raise SystemExit(
            f"{label}: the contenders do not do the same work: {values}, tolerance {tolerance:.1%}"
        )
    shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
    print(f"{label}: {shown}")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, minimum and maximum, rounded to five digits."""
    figures = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.5g}") for name, value in figures.items()}


def ratios(
    found: Mapping[str, Sequence[Mapping[str, Any]]], key: str, own: str
) -> dict[str, dict[str, float]]:
    """Return each other contender's figure divided by that of `own` in the same round."""
    compared: dict[str, dict[str, float]] = {}
    for name, answers in found.items():
        if name != own:
            pairs = zip(answers, found[own], strict=True)
            compared[name] = spread([other[key] / mine[key] for other, mine in pairs])
    return compared


def report(
    title: str, found: Mapping[str, Sequence[Mapping[str, Any]]], key: str, own: str
) -> dict[str, Any]:
    """Print a table of `key` with the ratio of the others to `own`; return its figures.

    Where less is better, a ratio above 1 means that `own` is better.
    """
    compared = ratios(found, key, own)
    print(f"\n{title}")
    print(f"{'':22}{'median':>10}{'min':>9}{'max':>9}", end="")
    print(f"{f'/ {own}':>14}{'min-max':>15}{'RSS MB':>9}{'anon':>8}")
    rows: dict[str, Any] = {}
    for name, answers in found.items():
        figures = spread([answer[key] for answer in answers])
        resident = answers[-1].get("resident", 0) / 1e6
        anonymous = answers[-1].get("anonymous", 0) / 1e6
        rows[name] = {
            key: figures,
            "resident_mb": round(resident),
            "anonymous_mb": round(anonymous),
        }
        line = f"{name:22}{figures['median']:10.3f}{figures['min']:9.3f}{figures['max']:9.3f}"
        if name in compared:
            ratio = compared[name]
            rows[name]["ratio"] = ratio
            span = f"{ratio['min']:.2f}-{ratio['max']:.2f}"
            line += f"{ratio['median']:14.2f}{span:>15}"
        else:
            line += f"{'':29}"
        print(f"{line}{resident:9,.0f}{anonymous:8,.0f}")
    return rows


def fresh(*command: object, env: Mapping[str, str] | None = None) -> Any:
    """Run a Python program in a new process and return the JSON of its last line.

    Each run has a new process, because the peak of memory belongs to a process.
    """
    arguments = [str(argument) for argument in command]
    done = subprocess.run(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | dict(env or {}),
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: ended with status {done.returncode}: see above.")
    return json.loads(done.stdout.splitlines()[-1])


# ---- packages, dtype, machine and model


def missing_peers(*names: str) -> str:
    """Return a message that names the peers that are not installed; empty if all are installed."""
    absent = [name for name in names or PEERS if find_spec(name) is None]
    if not absent:
        return ""
    return f"not installed: {', '.join(absent)}; pip install -c constraints.txt -e '.[test]'"


def add_dtype(parser: argparse.ArgumentParser, choices: Sequence[str] = DTYPES) -> None:
    """Add the option --dtype to a parser."""
    text = "dtype in which every side computes; auto (the default): the one that is fast here"
    parser.add_argument("--dtype", choices=choices, default="auto", help=text)


def compute_dtype(name: str) -> "torch.dtype":
    """Return the dtype of --dtype; "auto" is the choice of `load_model` on this machine.

    That is bf16 on a GPU or a CPU with bf16 arithmetic, fp16 on an older GPU, fp32 on other CPUs.
    """
    import torch

    from minilora.models.loader import pick_dtype

    return pick_dtype(name, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def dtype_name(dtype: "torch.dtype") -> str:
    """Return the name that --dtype and load_model use: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def cpu_class() -> str:
    """Return the unit that multiplies matrices on this CPU.

    AMX and AVX512-BF16 support bf16; other names are AVX512, AVX2 and so on.
    """
    import torch

    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    if torch.cpu._is_avx512_bf16_supported():
        return "AVX512-BF16"
    return torch.backends.cpu.get_cpu_capability()


def machine(dtype: "torch.dtype") -> dict[str, Any]:
    """Print and return dtype, class of CPU, cores, threads, present load average and versions."""
    import torch

    found: dict[str, Any] = {
        "dtype": dtype_name(dtype),
        "cpu": cpu_class(),
        "cores": os.cpu_count(),
    }
    found |= {"threads": torch.get_num_threads(), "load_average": round(os.getloadavg()[0], 2)}
    for name in ("torch", *PEERS):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    print(", ".join(f"{name} {value}" for name, value in found.items()), flush=True)
    return found


def small_chat_model(folder: Path, dtype: "torch.dtype") -> Path:
    """Write a random two-layer model with SmolLM2's tokenizer to `folder`; return `folder`."""
    import torch

    import minilora as ml
    from minilora.models.config import DecoderConfig
    from minilora.models.decoder import CausalLM

    tokenizer = ml.load_tokenizer(ml.samples.smollm2())
    torch.manual_seed(0)
    sizes: dict[str, Any] = {**TINY, "vocab_size": len(tokenizer), "max_position_embeddings": 2048}
    ml.save_model(
        CausalLM(DecoderConfig(**sizes, dtype=dtype_name(dtype))).to(dtype),
        folder,
        tokenizer=tokenizer,
    )
    return folder


def checkpoint(
    folder: Path, short: bool, rows: int, length: int, dtype: "torch.dtype"
) -> list[list[int]]:
    """Write SmolLM2 to `folder`; return `rows` rows of `length` real tokens.

    The text is English reference prose (minilora/evaluation/samples/prose.py): one long stream, cut
    without padding. With `short` the model is a random one of two layers, and the tokens are
    random.
    """
    import torch

    import minilora as ml

    torch.manual_seed(0)
    if short:
        from minilora.models.config import DecoderConfig
        from minilora.models.decoder import CausalLM

        config: dict[str, Any] = {
            **TINY,
            "dtype": dtype_name(dtype),
            "max_position_embeddings": 2048,
        }
        ml.save_model(CausalLM(DecoderConfig(**config)).to(dtype), folder)
        return torch.randint(0, TINY["vocab_size"], (rows, length)).tolist()
    source = ml.samples.smollm2()
    ml.save_model(ml.load_model(source, dtype=dtype), folder)
    tokenizer = ml.load_tokenizer(source)
    stream = tokenizer.encode("\n\n".join(row["text"] for row in ml.samples.prose(36)))
    stream *= math.ceil(rows * length / len(stream))  # long rows repeat the text
    return [stream[row * length : (row + 1) * length] for row in range(rows)]
