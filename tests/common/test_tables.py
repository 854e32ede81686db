"""Proves that results are tables in notebooks, with the cells of the printed text, escaped."""

import html
import re

import pytest
import torch

import minilora as ml
from helpers.toy import lora
from minilora.tools.check_training import Check
from minilora.tools.compare_exports import Stage

EXPORTS = ml.ExportComparison(
    (Stage("merged", "rounded", 1e-5, 0.25, 0.875), Stage("gguf", "left out", note="<no gguf>")),
    64,
    0.01,
)
TRAINING = ml.TrainingCheck((Check("split", 1e-7, 1e-6, "a < b"), Check("moved", 0.0, 0.5, "c")))
COUNT = ml.count_parameters(lora())


def cells(page: str) -> list[str]:
    """Return the texts of the cells and remarks of a page."""
    return [html.unescape(text) for text in re.findall(r"<(?:td|th|p)(?: [^>]*)?>(.*?)</", page)]


@pytest.mark.parametrize("result", [EXPORTS, TRAINING], ids=["exports", "training"])
def test_table_has_the_cells_of_the_printed_text(result):
    printed = str(result)
    page = result._repr_html_()
    for text in cells(page):
        assert text in printed, text
    assert page.count("<tr>") == 3 and "<no" not in page and "a < b" not in page


def test_parameter_count_is_a_table():
    found = cells(COUNT._repr_html_())
    assert f"{COUNT.trainable:,}" in found and f"{COUNT.total:,}" in found


def test_plan_and_inspection_keep_their_columns(tmp_path):
    model = lora()
    torch.nn.init.normal_(model.model.layers[0].mlp.up_proj.adapters["default"].lora_B)
    ml.save_adapter(model, tmp_path)
    for result in (ml.inspect(tmp_path), ml.plan_memory(model)):
        assert html.unescape(result._repr_html_()) == f"<pre>{result}</pre>"
