"""Tests of packing by best-fit decreasing.

No bin is overfull, every example is in exactly one bin, the number of bins is within the known
bound, and the order of the examples has no effect. Oracles: a packing that searches every bin, and
the optimum found by trying all packings.
"""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.data import Example
from minilora.data.packing import best_fit, pack
from minilora.training.batch_sampler import BatchPlan
from minilora.training.config import TrainConfig


def naive(lengths: list[int], room: int) -> list[list[int]]:
    """Pack by the definition of best-fit decreasing: search every bin."""
    bins: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        left = [room - sum(lengths[i] for i in found) for found in bins]
        fitting = [b for b in range(len(bins)) if left[b] >= lengths[index]]
        if fitting:
            bins[min(fitting, key=lambda b: left[b])].append(index)
        else:
            bins.append([index])
    return bins


def filled(lengths: list[int], bins: list[list[int]]) -> list[list[int]]:
    return sorted(sorted(lengths[i] for i in found) for found in bins)


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40))
def test_bins_are_best_fit_decreasing(lengths, room):
    bins = best_fit(lengths, room)
    assert sorted(i for found in bins for i in found) == list(range(len(lengths)))  # each once
    sums = [sum(lengths[i] for i in found) for found in bins]
    assert all(0 < total <= room for total in sums)
    assert sorted(sums) == sorted(sum(lengths[i] for i in found) for found in naive(lengths, room))
    # no two bins would fit into one
    assert all(a + b > room for a, b in itertools.combinations(sums, 2))


@given(st.lists(st.integers(1, 20), max_size=40), st.randoms(use_true_random=False))
def test_the_order_of_the_examples_does_not_matter(lengths, random):
    shuffled = random.sample(lengths, len(lengths))
    assert filled(lengths, best_fit(lengths, 25)) == filled(shuffled, best_fit(shuffled, 25))


def optimum(lengths: list[int], room: int) -> int:
    """Return the smallest number of bins, found by trying all packings."""
    best = len(lengths)

    def place(index: int, left: list[int]) -> None:
        nonlocal best
        if len(left) >= best:
            return
        if index == len(lengths):
            best = len(left)
            return
        for at in range(len(left)):
            if left[at] >= lengths[index]:
                place(index + 1, [*left[:at], left[at] - lengths[index], *left[at + 1 :]])
        place(index + 1, [*left, room - lengths[index]])

    place(0, [])
    return best


@given(st.lists(st.integers(1, 10), min_size=1, max_size=8))
def test_at_most_11_ninths_of_the_optimum(lengths):
    assert len(best_fit(lengths, 10)) <= 11 / 9 * optimum(lengths, 10) + 6 / 9


def test_a_batch_plan_of_packed_rows_covers_every_row_once():
    packed = pack([Example([1] * n, [1] * n) for n in (9, 8, 5, 5, 2, 1)], [9, 8, 5, 5, 2, 1], 10)
    assert (
        sorted(packed.lengths) == [10, 10, 10]
        and str(packed) == "6 examples in 3 rows of 10 tokens, 0.0% of them padding"
    )
    plan = BatchPlan(
        packed.lengths, TrainConfig(packing=True, max_length=10, per_device_train_batch_size=2)
    )
    assert plan.identity["packing"] == 10 and plan.identity["samples"] == 3
    assert sorted(i for step in range(2) for micro in plan[step] for i in micro) == [0, 1, 2]


def test_an_example_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="example 1 has 11 tokens, expected at most max_length 10"):
        best_fit([3, 11], 10)
