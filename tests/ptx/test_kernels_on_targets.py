"""Slow tests of the kernels on the PTX machine: more cases, and every target whose PTX differs."""

import pytest
import torch

from helpers.ptx import shared_cases
from minilora_kernels.triton import launch
from minilora_ptx import ptx_machine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(launch.interpreted(), reason="Triton interprets its kernels here"),
]

CASES = {
    "test_kernels": [
        "test_quantize_has_the_bits_of_the_reference",
        "test_quantize_of_ties_and_their_neighbours",
        "test_quantize_at_every_bin_edge",
        "test_double_quantize_has_the_bits_of_the_reference",
        "test_double_quantize_of_ties",
        "test_dequantize_has_the_bits_of_the_reference",
        "test_gemv_of_a_one_hot_x_gives_a_column",
        "test_gemv_of_a_token_is_within_its_error_bound",
        "test_other_tiles_have_the_same_bits",
    ],
    "test_training_kernels": [
        "test_an_adamw_step_has_the_bits_of_the_reference_step",
        "test_every_code_begins_at_its_midpoint",
        "test_values_next_to_a_midpoint_get_the_code_of_the_reference_step",
        "test_a_block_around_the_smallest_normal_number",
        "test_a_gradient_that_is_not_finite_affects_only_its_block",
        "test_loss_and_gradient_of_a_chunk",
        "test_an_invalid_label_or_logit_gives_nan_in_its_row",
    ],
    "test_step_kernels": [
        "test_rms_norm_and_its_gradients",
        "test_gated_over_the_whole_range_of_values",
        "test_rotate_has_the_bits_of_the_reference_implementation",
    ],
    "test_few_tokens": [
        "test_matmul_of_few_tokens_equals_the_dense_product",
        "test_other_tiles_give_the_same_columns",
    ],
}
globals().update(shared_cases(CASES))


@pytest.fixture(autouse=True, params=["sm_75", "sm_86", "sm_90", "sm_120"])
def on_the_machine(request):
    target = request.param
    if target == "sm_75" and request.function.__name__ in CASES["test_few_tokens"]:
        pytest.skip("sm_75 does not use this kernel")
    torch.manual_seed(0)
    with ptx_machine(target) as launches:
        yield launches
    found = [str(finding) for run in launches for finding in run.machine.findings.all()]
    assert not found, found
