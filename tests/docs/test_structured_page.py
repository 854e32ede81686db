"""Runs the examples of docs/structured.md with the real model."""

import re

import pytest

from helpers.source import ROOT

PAGE = (ROOT / "docs" / "structured.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)


@pytest.mark.slow
def test_the_examples_of_the_page_run():
    variables = {}
    for example in EXAMPLES:
        exec(compile(example, "docs/structured.md", "exec"), variables)
    assert variables["answer"]["continent"]
