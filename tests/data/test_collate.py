"""Tests of collate, which pads examples on the right to the longest example of the batch.

Oracle: the collator of transformers. Property: a batch without its padding is its examples.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.chats import theirs
from minilora.data import IGNORE, Example, collate

PAD = 99
token = st.integers(0, 50)
example = st.lists(st.tuples(token, st.booleans()), min_size=1, max_size=9).map(
    lambda rows: Example([t for t, _ in rows], [t if trained else IGNORE for t, trained in rows])
)


@given(st.lists(example, min_size=1, max_size=5), st.sampled_from([1, 8]))
def test_equal_to_the_collator_of_transformers(examples, multiple):
    from transformers import DataCollatorForSeq2Seq

    tokenizer = theirs("chatml")
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True, pad_to_multiple_of=multiple)
    expected = collator(
        [{"input_ids": list(e.input_ids), "labels": list(e.labels)} for e in examples]
    )
    batch = collate(examples, tokenizer.pad_token_id, multiple)
    assert set(batch) == set(expected)
    for key, tensor in batch.items():
        assert tensor.dtype == torch.long and torch.equal(tensor, expected[key]), key


@given(st.lists(example, min_size=1, max_size=5), st.integers(1, 7))
def test_a_batch_holds_its_examples_and_is_no_longer_than_needed(examples, multiple):
    batch = collate(examples, PAD, multiple)
    longest = max(len(e.input_ids) for e in examples)
    T = batch["input_ids"].shape[1]
    assert T % multiple == 0 and longest <= T < longest + multiple
    for row, e in enumerate(examples):
        n = len(e.input_ids)
        assert batch["attention_mask"][row].tolist() == [1] * n + [0] * (T - n)
        assert batch["input_ids"][row].tolist() == e.input_ids + [PAD] * (T - n)
        assert batch["labels"][row].tolist() == e.labels + [IGNORE] * (T - n)


def test_an_empty_batch_raises():
    with pytest.raises(ValueError, match="at least one example"):
        collate([], PAD)
