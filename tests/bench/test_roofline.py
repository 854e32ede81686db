"""Tests of roofline.py, which computes bytes / bandwidth and instructions / lanes.

Oracle: figures computed by hand from the datasheets. Property: times scale with the work, and the
slowest resource is reported as the bottleneck.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.gpu_model.fusing import D, branch, few_tokens, product_us
from benchmarks.gpu_model.roofline import (
    CARDS,
    HALF,
    LANES,
    WEIGHT,
    WEIGHT_DOUBLE_QUANT,
    binding,
    bounds,
    pressure,
)

SQUARE, LAYER = 4096 * 4096, 4096 * 14336


def test_bytes_of_a_weight():
    blocks = 256  # blocks of 64 weights: one group of the second level
    assert WEIGHT == (blocks * 64 * 4 / 8 + blocks * 4) / (blocks * 64) == 0.5625
    assert WEIGHT_DOUBLE_QUANT == (blocks * 64 * 4 / 8 + blocks * 1 + 4) / (blocks * 64)


@pytest.mark.parametrize(
    ("card", "elements", "bytes", "microseconds"),
    [
        ("RTX 4090", SQUARE, HALF + WEIGHT_DOUBLE_QUANT, 41.9),
        ("RTX 4090", LAYER, HALF + WEIGHT_DOUBLE_QUANT, 146.6),
        ("RTX 3060", SQUARE, HALF + WEIGHT, 119.4),
        ("RTX 3090", LAYER, WEIGHT_DOUBLE_QUANT, 32.4),
        ("RTX 4070", LAYER, HALF + WEIGHT_DOUBLE_QUANT, 293.1),
        ("RTX 5090", LAYER, HALF + WEIGHT, 84.0),
        ("T4", LAYER, HALF + WEIGHT, 470.2),
        ("A100-80", SQUARE, HALF + WEIGHT, 21.1),
        ("H100 SXM", LAYER, WEIGHT, 9.9),
    ],
)
def test_time_of_the_bytes(card, elements, bytes, microseconds):
    times = bounds(CARDS[card], elements, bytes, {"issue": 0.1})
    assert binding(times) == "DRAM"
    assert max(times.values()) == pytest.approx(microseconds, abs=0.05)  # rounded to a tenth


@pytest.mark.parametrize(
    ("card", "pipe", "instructions"),  # instructions per element that take as long as the bytes
    [
        ("T4", "issue", 64.0),
        ("RTX 3060", "alu", 22.3),
        ("RTX 3090", "issue", 47.8),
        ("RTX 4090", "alu", 51.5),
        ("A100-80", "issue", 24.1),
        ("H100 SXM", "alu", 11.6),
    ],
)
def test_instructions_that_take_as_long_as_the_bytes(card, pipe, instructions):
    times = bounds(CARDS[card], SQUARE, HALF + WEIGHT_DOUBLE_QUANT, {pipe: instructions})
    assert pressure(times) == (pipe, pytest.approx(1, abs=0.05 / instructions))


@pytest.mark.parametrize(
    ("card", "fma", "lsu"), [("T4", 64, 16), ("A100-80", 64, 32), ("H100 SXM", 128, 32)]
)
def test_one_element_per_lane_takes_one_clock(card, fma, lsu):
    """Elements in the number of the card's lanes take one clock cycle."""
    c = CARDS[card]
    for pipe, lanes in {"issue": 128, "alu": 64, "fma": fma, "lsu": lsu, "xu": 16}.items():
        times = bounds(c, c.sms * lanes, 0, {pipe: 1})
        assert binding(times) == pipe and times[pipe] == pytest.approx(1e-3 / c.ghz)


@given(
    st.sampled_from(list(CARDS)),
    st.integers(1, LAYER),
    st.floats(0.1, 10),
    st.sampled_from(list(LANES)),
)
def test_twice_the_work_takes_twice_the_time(card, elements, bytes, pipe):
    pipes = {"issue": 20.0, pipe: 30.0}
    once, twice = (bounds(CARDS[card], n * elements, bytes, pipes) for n in (1, 2))
    assert twice == pytest.approx({resource: 2 * time for resource, time in once.items()})
    assert (binding(once), pressure(once)[0]) == (binding(twice), pressure(twice)[0])


@pytest.mark.parametrize(
    ("elements", "bytes", "pipes", "message"),
    [
        (1, 1.0, {"tensor": 1.0}, "out of issue, alu, fma, lsu, xu, got tensor"),
        (-1, 1.0, {}, "elements=-1"),
        (1, -1.0, {}, "bytes_per_element=-1"),
        (1, 1.0, {"alu": -1.0}, "'alu': -1"),
    ],
)
def test_invalid_arguments_are_refused(elements, bytes, pipes, message):
    with pytest.raises(ValueError, match=message):
        bounds(CARDS["T4"], elements, bytes, pipes)


# ---- fusing.py: products on tensor cores, and the bytes of the LoRA branch


@pytest.mark.parametrize(
    ("card", "teraflops"),
    [  # dense bf16 (T4: fp16) with fp32 accumulation, from NVIDIA's datasheets
        ("T4", 65),
        ("RTX 3090", 71),
        ("RTX 4090", 165.2),
        ("RTX 5090", 209.5),
        ("A100-80", 312),
        ("H100 SXM", 989.4),
    ],
)
def test_a_product_takes_its_operations_at_the_rate_of_the_datasheet(card, teraflops):
    assert product_us(CARDS[card], 8192, D, D, 0) == pytest.approx(
        2 * 8192 * D * D / teraflops / 1e6, rel=0.005
    )


def test_lora_branch_moves_sixteen_bytes_a_value():
    """The branch reads x, dy, dy and x, and reads and writes y and dx, in 2 bytes each."""
    for card in CARDS.values():
        found = branch(card, 8192)
        assert found["branch"] == pytest.approx(8 * HALF * 8192 * D / card.gb_per_s / 1e3)
        assert found["saved: in the products' epilogues"] == pytest.approx(found["branch"] / 2)
        assert 0 < found["saved: q and dB from one reading"] < found["branch"] / 8
        assert found["saved: y += s z B alone"] == 0


def test_few_tokens_through_a_dense_weight_move_the_weight_twice():
    """Count bytes for kernels whose instructions take no time.

    A weight takes 0.516 bytes, and 4 more where the dense W is written and read. The sums of the 8
    parts of 4096 rows are written and read in fp32. x and y take 2 bytes per value.
    """
    idle = {"pipes": {}}
    for card in CARDS.values():
        found = few_tokens(card, 2, idle, idle)
        us, vector = card.gb_per_s * 1e3, 2 * D
        assert found["codes"] == pytest.approx(
            (D * D * WEIGHT_DOUBLE_QUANT + vector * (4 + 8 * 8)) / us
        )
        assert found["dense"] == pytest.approx(
            (D * D * (WEIGHT_DOUBLE_QUANT + 4) + vector * 4) / us
        )
        assert D * D * WEIGHT_DOUBLE_QUANT / us < found["dense, cached"] < found["dense"] / 4
        slow = few_tokens(card, 2, {"pipes": {"issue": 1e6}}, idle)
        assert slow["codes"] > 1e3 * found["codes"] and slow["dense"] == found["dense"]
