"""Tests that minilora's kernels, as Triton compiles them for a GPU, have the bits of the reference.

The cases are those of tests/gpu/interpreted/, which compare each kernel with its reference
implementation. Here the PTX for a GPU runs in place of the interpreter. No launch may have a
finding: no race, no divergent barrier, no read of shared memory before it is written.

The slow tests run more cases, and each for the targets that differ: sm_80, sm_86 and sm_89 have
the same PTX, sm_75 has no bf16 arithmetic, sm_90 has wgmma, and sm_120 packed fp32.
"""

import pytest
import torch

from helpers.kernel_parts import dense, normal, parts_of
from helpers.ptx import shared_cases
from minilora_kernels.triton import launch, nf4_dequantize
from minilora_ptx import ptx_machine

pytestmark = pytest.mark.skipif(launch.interpreted(), reason="Triton interprets its kernels here")

CASES = {
    "test_kernels": [
        "test_quantize_of_ties_and_their_neighbours",
        "test_quantize_gives_zeros_for_a_block_below_the_smallest_normal",
        "test_a_value_that_is_not_finite_reaches_absmax",
        "test_double_quantize_has_the_bits_of_the_reference",
        "test_quantize_writes_only_its_results",
        "test_gemv_writes_only_its_result",
    ],
    "test_training_kernels": [
        "test_a_gradient_that_is_not_finite_affects_only_its_block",
        "test_an_adamw_step_writes_only_its_results",
        "test_cross_entropy_of_distant_and_infinite_logits",
        "test_cross_entropy_writes_only_its_results",
    ],
    "test_step_kernels": [
        "test_rms_norm_of_zeros_and_of_values_that_are_not_finite",
        "test_gated_passes_on_values_that_are_not_finite",
        "test_views_give_the_results_of_their_contiguous_copies",
    ],
    "test_few_tokens": ["test_matmul_of_few_tokens_writes_only_its_result"],
}
globals().update(shared_cases(CASES))


@pytest.fixture(autouse=True)
def on_the_machine():
    torch.manual_seed(0)
    with ptx_machine("sm_86") as launches:
        yield launches
    found = [str(finding) for run in launches for finding in run.machine.findings.all()]
    assert not found, found


@pytest.mark.parametrize("start", [0, 1])
def test_dequantising_one_element_past_alignment(start, on_the_machine):
    """A pointer that is not aligned compiles to narrower accesses: one more kernel."""
    parts = parts_of(normal(1000), 64, True)
    out = torch.full((1000 + start + 64,), 77.0, dtype=torch.bfloat16)
    nf4_dequantize.dequantize(*parts, 64, out[start : 1000 + start])
    assert torch.equal(out[start : 1000 + start], dense(parts, 64, (1000,), torch.bfloat16))
    assert (out[:start] == 77).all() and (out[1000 + start :] == 77).all()
    widths = {op for op in on_the_machine[0].machine.counts.opcodes() if op.startswith("st.global")}
    assert widths == ({"st.global.b16"} if start else {"st.global.v4.b32"})
