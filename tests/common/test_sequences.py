"""Tests of batches of sequences: every row is in one batch, and no batch is larger than it may be."""

from hypothesis import given
from hypothesis import strategies as st

from minilora.common import batch_tokens, batches_by_tokens
from minilora.common.sequences import MOST_ROWS


@given(st.lists(st.integers(0, 60), max_size=600), st.integers(1, 900))
def test_batches_by_tokens_have_every_row_once_within_the_limit(lengths, most):
    batches = batches_by_tokens(lengths, most)
    numbers = [index for batch in batches for index in batch]
    assert sorted(numbers) == list(range(len(lengths)))
    in_order = [lengths[index] for index in numbers]
    assert in_order == sorted(lengths, reverse=True)  # so a batch has rows of similar length
    starts = 0
    for batch in batches:
        width = lengths[batch[0]]
        assert 1 <= len(batch) <= MOST_ROWS
        assert len(batch) == 1 or len(batch) * width <= most
        starts += len(batch)
        if starts < len(lengths):  # the next row had no room
            assert len(batch) == MOST_ROWS or (len(batch) + 1) * width > most


def test_tokens_of_a_batch():
    assert batch_tokens([3, 9, 4], 2) == 18
    assert batch_tokens([3, 9, 4], None) == 4096
    assert batch_tokens([], 2) == 0
