"""Configuration of all tests: threads, the hypothesis profile, skips and two fixtures.

`-ra` in pyproject.toml prints every skipped test with its reason.
"""

import gc
import os
import platform
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

# Threads of the tokenizers package conflict with pytest-xdist's processes.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

from helpers.cpu_budget import cpu_seconds, over_budget, room_of, table
from helpers.source import ROOT, constraints
from minilora.training import runtime

# Machines are shared, so there is no deadline and no health check of speed. The examples are the
# same on every machine, so that a failure in CI can be reproduced locally.
hypothesis.settings.register_profile(
    "house",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
# Triton's interpreter runs a kernel hundreds of times slower than a processor.
hypothesis.settings.register_profile(
    "few", parent=hypothesis.settings.get_profile("house"), max_examples=20
)
IN_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
hypothesis.settings.load_profile("few" if IN_INTERPRETER else "house")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # one core per worker, even if OMP_NUM_THREADS is not set


def off_the_pin() -> str:
    """Return the versions of torch and triton that differ from constraints.txt, as text.

    The text is empty if both are the pinned versions.
    """
    pinned = constraints()
    found = {name: version(name).partition("+")[0] for name in ("torch", "triton")}
    return ", ".join(
        f"{name} {got} instead of {pinned[name]}"
        for name, got in found.items()
        if got != pinned[name]
    )


# Tests of kernels in Triton's interpreter. tests/gpu/test_interpreter.py runs them in a process
# with TRITON_INTERPRET=1.
collect_ignore = [] if IN_INTERPRETER else ["gpu/interpreted"]


def processor() -> str:
    """Return the processor, the instruction set that torch uses, and the C compiler's flags.

    `make test ISA=` changes the last two.
    """
    from minilora_kernels.c.compiler import machine_flags

    kind = platform.processor() or platform.machine()
    with suppress(OSError):
        names = [
            line
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        kind = names[0].partition(":")[2].strip() if names else kind
    return f"cpu: {kind}; torch: {torch.backends.cpu.get_cpu_capability()}; C: {machine_flags()}"


if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
    # bitsandbytes computes its 8-bit map with torch.linspace, whose last bits depend on the
    # instruction set. Files come from machines with AVX2 or AVX-512, so the oracle uses their map.
    import bitsandbytes.functional

    from minilora_kernels import dynamic_map

    bitsandbytes.functional.name2qmap["dynamic"] = dynamic_map()


def pytest_report_header() -> str:
    return processor()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the processor (with -q pytest prints no header) and the version of Triton.

    tests/gpu/test_interpreter.py reads the version of Triton from this line.
    """
    if config.get_verbosity() < 0:
        terminalreporter.write_line(processor())
    if SPENT:
        terminalreporter.write_line(table(SPENT))
    for sentence in _over_budget():
        terminalreporter.write_line(sentence, red=True)
    if IN_INTERPRETER:
        import triton

        terminalreporter.write_line(f"in the interpreter of triton {triton.__version__}")


# CPU seconds of the fast tests by folder; in the main process those of all workers.
SPENT: Counter[str] = Counter()


def _over_budget() -> list[str]:
    """Return the folders over their budget; the budgets are not those of the interpreter."""
    return [] if IN_INTERPRETER else over_budget(SPENT)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Note the CPU seconds of a fast test, with its fixtures."""
    before = cpu_seconds()
    result = yield
    room = room_of(item.path, ROOT)
    if room is not None and not item.get_closest_marker("slow"):
        SPENT[room] += cpu_seconds() - before
    return result


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add the CPU seconds of a worker."""
    SPENT.update(getattr(node, "workeroutput", {}).get("spent", {}))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send the CPU seconds of a worker; in the main process a folder over its budget is a failure."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["spent"] = dict(SPENT)
    elif _over_budget() and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


# Time limit of a slow test that sets no limit itself. pyproject.toml has the limit of fast tests.
SLOW_SECONDS = 900


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests without an accelerator and `strict` tests with other versions.

    Slow tests get a longer time limit.
    """
    accelerator = torch.accelerator.is_available()
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_SECONDS))
        if item.get_closest_marker("gpu") and not accelerator:
            item.add_marker(
                pytest.mark.skip(reason="no accelerator on this machine: NOT TESTED here")
            )
        if item.get_closest_marker("strict") and (why := off_the_pin()):
            item.add_marker(pytest.mark.skip(reason=f"needs the pinned versions, got {why}"))


def pytest_collection_finish() -> None:
    """Hide the imported libraries from the garbage collector.

    They are hundreds of thousands of objects, and each run of `ml.train` starts with a collection.
    Within a block, `training_mode` freezes objects and then unfreezes all of them, these too. It
    keeps its own collections here and loses the other two calls.
    """
    gc.collect()
    gc.freeze()
    runtime.gc = SimpleNamespace(collect=gc.collect, freeze=Mock(), unfreeze=Mock())


@pytest.fixture(autouse=True, scope="module")
def later_imports() -> Iterator[None]:
    """Hide the libraries that the tests of a module imported, as `pytest_collection_finish`."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> None:
    """Seed torch, so that a test draws the same numbers whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def tiny_llama_config() -> dict:
    """The config.json of a small Llama: 2 layers, width 64, 4 heads, 2 KV heads, 384 tokens."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 384,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Hub id of SmolLM2-135M-Instruct, or the path of its GGUF file if the Hub is unreachable."""
    from minilora import samples

    return samples.smollm2()
