"""What every test shares: threads, hypothesis' profile, what is skipped where, and two fixtures.

A skip is loud: `-ra` in pyproject.toml prints each with its reason.
"""

import os
import platform
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault(
    "TOKENIZERS_PARALLELISM", "false"
)  # its threads and pytest-xdist's processes do not mix

import hypothesis
import pytest
import torch

from helpers.source import constraints

# No deadline, no health check of speed: machines are shared. Derandomised: the same examples
# everywhere, so that a failure seen in CI is seen at home.
hypothesis.settings.register_profile(
    "house",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("house")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # one core a worker; OMP_NUM_THREADS may not have reached us


def off_the_pin() -> str:
    """Which of torch and triton differ from constraints.txt, as text; empty if none does."""
    pinned = constraints()
    found = {name: version(name).partition("+")[0] for name in ("torch", "triton")}
    return ", ".join(
        f"{name} {got} instead of {pinned[name]}"
        for name, got in found.items()
        if got != pinned[name]
    )


# Kernels in Triton's interpreter: tests/gpu/test_interpreter.py runs them, in a process that has it
# switched on.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["gpu/interpreted"]


def processor() -> str:
    """The processor, what torch takes of it, and what the C compiler is told: `make test ISA=` changes the last two."""
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


def pytest_report_header() -> str:
    return processor()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """The processor where -q left the header out. Which Triton: tests/gpu/test_interpreter.py looks for it."""
    if config.get_verbosity() < 0:
        terminalreporter.write_line(processor())
    if os.environ.get("TRITON_INTERPRET") == "1":
        import triton

        terminalreporter.write_line(f"in the interpreter of triton {triton.__version__}")


SLOW_SECONDS = (
    900  # limit of a slow test that sets none; pyproject.toml has the limit of the others
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`gpu` tests skip without an accelerator, `strict` tests off the pinned versions; slow tests get more time."""
    accelerator = torch.accelerator.is_available()
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_SECONDS))
        if item.get_closest_marker("gpu") and not accelerator:
            item.add_marker(
                pytest.mark.skip(reason="no accelerator on this machine: NOT TESTED here")
            )
        if item.get_closest_marker("strict") and (why := off_the_pin()):
            item.add_marker(pytest.mark.skip(reason=f"strict, and here is {why}"))


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers every time, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def tiny_llama_config() -> dict:
    """The config.json of a Llama small enough for a CPU: 2 layers, width 64, 4 heads on 2 KV heads, 384 tokens."""
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
    """What load_model and load_tokenizer take for SmolLM2-135M-Instruct: the Hub id, or the path of its GGUF."""
    from minilora import samples

    return samples.smollm2()
