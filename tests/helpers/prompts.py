"""Models and random prompts for the tests of generation.

A small transformers model, and minilora's decoder with the same weights.
"""

from functools import cache
from typing import Any

from helpers.tiny import oracle, tokens, twin

EOS = 5
VOCABULARY = 300  # room for the byte tokenizers of chats.py


@cache
def pair(family: str = "llama", **fields: Any):
    """Return (transformers model, minilora's decoder) with the same weights, logits of about 10."""
    theirs = oracle(
        family, vocab_size=VOCABULARY, max_position_embeddings=256, eos_token_id=EOS, **fields
    )
    return theirs, twin(theirs)


def ragged(*lengths: int, common: int = 0) -> list[list[int]]:
    """Return random prompts of these lengths, each after the same `common` tokens."""
    front = tokens(1, common, seed=9)[0].tolist()
    return [front + tokens(1, n, seed=i)[0].tolist() for i, n in enumerate(lengths)]
