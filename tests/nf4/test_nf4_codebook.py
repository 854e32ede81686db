"""Proves that the derived code tables equal bitsandbytes' bit for bit and cannot be changed.

Oracles: the sha256 of the tables' bytes, bitsandbytes' own tables, and the 15 thresholds written
out in its CUDA source.
"""

import hashlib

import bitsandbytes.functional as bnb
import pytest
import torch

from minilora_kernels import dynamic_map, nf4_codebook, nf4_thresholds

EPS = torch.finfo(torch.float32).eps
NF4_SHA256 = "8501941daa1b8a90ad1bbfeb632e5101b5dddbc4bb52d6e55abcfd777e60c06a"
DYNAMIC_SHA256 = "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
CUDA_THRESHOLDS = [
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544,
    -0.23460740596055984, -0.13791173323988914, -0.045525018125772476, 0.03979014977812767,
    0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683,
    0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
]  # fmt: skip


def sha256(table: torch.Tensor) -> str:
    return hashlib.sha256(table.numpy().tobytes()).hexdigest()


def test_tables_have_the_known_digests():
    assert sha256(nf4_codebook()) == NF4_SHA256
    assert sha256(dynamic_map()) == DYNAMIC_SHA256


def test_tables_are_bitsandbytes_tables():
    assert torch.equal(nf4_codebook(), bnb.get_4bit_type("nf4", device="cpu"))
    computed = bnb.create_dynamic_map()
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":  # two roundings instead of one
        torch.testing.assert_close(dynamic_map(), computed, rtol=2 * EPS, atol=0)
    else:
        assert torch.equal(dynamic_map(), computed)


def test_thresholds_are_the_literals_of_the_cuda_source():
    assert nf4_thresholds().tolist() == torch.tensor(CUDA_THRESHOLDS).tolist()


def test_levels_span_minus_one_to_one_around_an_exact_zero():
    levels, values = nf4_codebook(), dynamic_map()
    assert levels[0] == -1 and levels[7] == 0 and levels[15] == 1
    # bitsandbytes' signed map has no -1
    assert values[127] == 0 and values[255] == 1 and values.min() > -1
    assert (levels.diff() > 0).all() and (values.diff() > 0).all()


@pytest.mark.parametrize("table", [nf4_codebook, nf4_thresholds, dynamic_map])
def test_a_caller_cannot_change_the_table(table):
    before = table()
    table().zero_()
    assert torch.equal(table(), before)


@pytest.mark.parametrize("table", [nf4_codebook, nf4_thresholds, dynamic_map])
def test_tables_are_real_where_models_are_built_on_meta(table):
    from minilora_kernels.nf4 import codebook

    codebook._nf4_levels.cache_clear(), codebook._dynamic_values.cache_clear()
    with torch.device("meta"), torch.inference_mode():
        assert table().device.type == "cpu"
    assert not table().is_inference()
