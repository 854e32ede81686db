"""A dataset ready to train on: examples, and what became of the rows."""

from collections.abc import Iterable
from typing import Any


class Encoded(list[Any]):
    """Examples, each with a `len` in tokens, and a printable `report`."""

    def __init__(self, examples: Iterable[Any], report: str):
        super().__init__(examples)
        self.report = report
