"""Slow tests that the compiled kernels use 64-bit offsets for tensors of more than 2^31 elements.

The cases are those of tests/gpu/interpreted/test_far_elements.py: only a program near the end runs.
"""

import pytest
import torch

from helpers.ptx import shared_cases
from minilora_kernels.triton import launch
from minilora_ptx import ptx_machine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(launch.interpreted(), reason="Triton interprets its kernels here"),
]

NAMES = [
    "test_dequantising_far_elements",
    "test_quantising_far_elements",
    "test_a_token_through_far_rows",
    "test_few_tokens_through_far_rows",
    "test_a_row_of_far_logits",
    "test_a_step_on_far_values",
    "test_a_norm_of_far_rows",
    "test_a_gate_of_far_values",
    "test_a_rotation_of_far_heads",
]
globals().update(shared_cases({"test_far_elements": NAMES}))


@pytest.fixture
def only_program():
    """Function only_program(i): of every launch, one program runs, with program id i."""
    chosen: list[int] = []

    def choose(number: int) -> None:
        chosen[:] = [number]

    torch.manual_seed(0)
    with ptx_machine("sm_86", ctas=chosen) as launches:
        yield choose
    assert not [str(f) for run in launches for f in run.machine.findings.all()]
