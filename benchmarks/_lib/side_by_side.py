"""What the benchmarks against peers share: contenders in processes of their own, taking turns, and what they cost.

    a, b = Contender("a", [__file__, "--side", "a"]), Contender("b", [__file__, "--side", "b"])
    found = take_turns({"a": a, "b": b}, rounds=5)        # name -> what each of its answers said
    report("seconds a step", found, "seconds", own="a")   # medians, min-max, ratios of the same round

A contender is a Python program that calls `serve`. It stays alive between its turns and sleeps
meanwhile, so nothing of one side is in the other's memory, and a machine that is slower for a
minute is so for both: only ratios within one round are compared. Its memory is read from outside
(Linux), every 10 ms while it works: resident at the peak, and anonymous, which leaves out the pages
of mapped files, as they can be dropped at any time.

All sides of a benchmark compute in one dtype. `--dtype auto` takes the one that this hardware is
fast in, by the rule of `load_model`, because an emulated dtype takes many times as long.
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
    import torch  # at run time it is imported late: bench_load.py counts the seconds of an import

PEERS = ("transformers", "peft", "bitsandbytes", "accelerate")
DTYPES = ("auto", "bfloat16", "float32")  # that a benchmark computes a model in
PROMPT = "> "  # before each answer; whatever else a library prints goes to stderr
TINY = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}


# ---- the contender's half


def serve(step: Callable[[], dict[str, Any]], **ready: Any) -> None:
    """Answer that everything is loaded, then do a step for each line that comes and answer with what it returns."""
    print(PROMPT + json.dumps(ready), flush=True)
    for _ in sys.stdin:
        print(PROMPT + json.dumps(step()), flush=True)


# ---- the judge's half


class Contender:
    """A process that answers. `resident`, `anonymous`: its bytes at the peak so far; `now`: its anonymous ones at the
    last look. All are 0 where they cannot be known."""

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
        self.ready["start_seconds"] = (
            time.perf_counter() - self._begun
        )  # from nothing to its first answer

    def step(self) -> dict[str, Any]:
        """Let it work once; its answer, and the memory so far."""
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End it, and wait until its memory is free."""
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
        if not (found := memory(self._process.pid)):
            return
        self.resident = max(self.resident, found.get("VmHWM", 0))
        self.now = found.get("RssAnon", 0)
        self.anonymous = max(self.anonymous, self.now)


def memory(process: int) -> dict[str, int]:
    """Bytes of a process: the most that was resident (VmHWM), and what is anonymous now (RssAnon); {} without Linux."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:  # or it has just ended
        return {}
    return {
        name: int(kb) * 1024
        for name, kb in re.findall(r"^(VmHWM|RssAnon):\s+(\d+) kB", status, re.M)
    }


def take_turns(
    contenders: Mapping[str, Any], rounds: int, warm_up: int = 2
) -> dict[str, list[dict[str, Any]]]:
    """Name -> the answers of `rounds` rounds, after some that are not counted; every other round goes backwards."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(warm_up + rounds):
        for name in names if number % 2 else names[::-1]:
            answer = contenders[name].step()
            if number >= warm_up:
                found[name].append(answer)
    return found


def check_close(what: str, values: Mapping[str, float], tolerance: float) -> None:
    """SystemExit unless all contenders found the same, so that no time is compared of work that is not."""
    first = next(iter(values.values()))
    if not all(
        abs(value - first) <= tolerance * abs(first) for value in values.values()
    ):  # NaN is close to nothing
        raise SystemExit(
            f"{what}: the contenders do not do the same work: {values}, tolerance {tolerance:.1%}"
        )
    print(f"{what}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest."""
    rounded = [
        float(f"{value:.5g}") for value in (statistics.median(values), min(values), max(values))
    ]
    return dict(zip(("median", "min", "max"), rounded, strict=True))


def ratios(
    found: Mapping[str, Sequence[Mapping[str, Any]]], key: str, own: str
) -> dict[str, dict[str, float]]:
    """Each other contender's figure over that of `own` in the same round."""
    return {
        name: spread(
            [other[key] / mine[key] for other, mine in zip(answers, found[own], strict=True)]
        )
        for name, answers in found.items()
        if name != own
    }


def report(
    title: str, found: Mapping[str, Sequence[Mapping[str, Any]]], key: str, own: str
) -> dict[str, Any]:
    """Print a table of `key`, with the ratio of others to `own` (above 1: own is better where less is); its figures."""
    compared = ratios(found, key, own)
    print(
        f"\n{title}\n{'':22}{'median':>10}{'min':>9}{'max':>9}{f'/ {own}':>14}{'min-max':>15}{'RSS MB':>9}{'anon':>8}"
    )
    rows: dict[str, Any] = {}
    for name, answers in found.items():
        rows[name] = {key: spread([answer[key] for answer in answers])}
        memory = [answers[-1].get(kind, 0) / 1e6 for kind in ("resident", "anonymous")]
        rows[name] |= dict(zip(("resident_mb", "anonymous_mb"), map(round, memory), strict=True))
        line = f"{name:22}{rows[name][key]['median']:10.3f}{rows[name][key]['min']:9.3f}{rows[name][key]['max']:9.3f}"
        if name in compared:
            rows[name]["ratio"] = compared[name]
            span = f"{compared[name]['min']:.2f}-{compared[name]['max']:.2f}"
            line += f"{compared[name]['median']:14.2f}{span:>15}"
        else:
            line += f"{'':29}"
        print(line + "".join(f"{mb:{width},.0f}" for mb, width in zip(memory, (9, 8), strict=True)))
    return rows


def fresh(*command: object, env: Mapping[str, str] | None = None) -> Any:
    """What a Python program's last line says, as JSON, of a process of its own: a peak of memory is a process's."""
    given = [sys.executable, *map(str, command)]
    done = subprocess.run(
        given, stdout=subprocess.PIPE, text=True, env=os.environ | dict(env or {})
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(given[1:])}: ended with status {done.returncode}: see above.")
    return json.loads(done.stdout.splitlines()[-1])


# ---- what is measured, and on what


def missing_peers(*names: str) -> str:
    """A sentence that says which peers are not installed; empty if all are."""
    absent = [name for name in names or PEERS if find_spec(name) is None]
    return (
        f"not installed: {', '.join(absent)}; pip install -c constraints.txt -e '.[test]'"
        if absent
        else ""
    )


def add_dtype(parser: argparse.ArgumentParser, choices: Sequence[str] = DTYPES) -> None:
    """Give a script the option --dtype."""
    told = "what every side computes in; auto (the default) is what this hardware is fast in"
    parser.add_argument("--dtype", choices=choices, default="auto", help=told)


def compute_dtype(name: str) -> "torch.dtype":
    """The dtype of --dtype. "auto" gives what `load_model` takes for "auto" on this machine.

    That is bf16 on a GPU or a CPU with bf16 arithmetic, fp16 on an older GPU, fp32 on other CPUs.
    """
    import torch

    from minilora.models.loader import pick_dtype

    return pick_dtype(name, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def dtype_name(dtype: "torch.dtype") -> str:
    """As --dtype and load_model have it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def cpu_class() -> str:
    """What multiplies matrices on this CPU: AMX or AVX512-BF16, which have bf16; else AVX512, AVX2 and so on."""
    import torch

    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    if torch.cpu._is_avx512_bf16_supported():
        return "AVX512-BF16"
    return torch.backends.cpu.get_cpu_capability()


def machine(dtype: "torch.dtype") -> dict[str, Any]:
    """What the figures belong to: dtype and class of CPU first; how busy the machine was when it was asked."""
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
    """Write a random model of two layers with SmolLM2's tokenizer to `folder`: for short forms; the folder."""
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
    """Write SmolLM2 (short: a random model of two layers) to `folder`; `rows` rows of `length` real tokens.

    The text is English reference prose (minilora/evaluation/samples/prose.py), one long stream that
    is cut without padding.
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
    stream *= math.ceil(rows * length / len(stream))  # long rows read some of it again
    return [stream[row * length : (row + 1) * length] for row in range(rows)]
