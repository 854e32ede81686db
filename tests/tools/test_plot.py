"""Proves that every picture shows the library's numbers, and that invalid input raises.

Oracle: the data of the figure's artists, compared with the library or with a definition.
"""

import sys

import numpy as np
import pytest
import torch

import minilora as ml
from helpers.drawn import ROWS, SHAPE, adapted, batch, figures, plans, weight
from minilora.data.loss_mask import IGNORE
from minilora.models.config import DecoderConfig
from minilora.models.decoder import CausalLM
from minilora.tools.memory_plan.parts import PARTS

# ---- oracle: the drawn data


def test_every_function_is_drawn_here():
    assert {name.partition(",")[0] for name in figures()} == set(ml.plot.__all__)


def test_the_codebook_is_the_librarys_and_so_is_its_error():
    law, error = figures()["codebook"].axes
    stems = next(c for c in law.collections if c.get_label() == "level, with its code")
    assert [
        segment[0][0] for segment in stems.get_segments()
    ] == ml.plot.levels.nf4_codebook().tolist()
    x, y = (error.lines[0].get_data()[i] for i in (0, 1))
    values = torch.linspace(-1, 1, 997)  # none is a threshold, where the line jumps
    for start in range(0, len(values), 63):  # blocks whose absmax is 1
        block = torch.cat([torch.ones(1), values[start : start + 63]])
        rounded = ml.dequantize_nf4(ml.quantize_nf4(block, 64, double_quant=False)) - block
        assert np.interp(block, x, y) == pytest.approx(rounded, abs=1e-6)


def test_a_histogram_counts_the_codes():
    source, packed = weight()
    values, used = figures()["histogram"].axes
    codes = torch.stack([packed.packed >> 4, packed.packed & 15], 1).flatten()[: packed.numel]
    shares = [(codes == code).float().mean().item() for code in range(16)]
    assert [bar.get_width() * bar.get_height() for bar in values.patches[:16]] == pytest.approx(
        shares
    )
    assert [bar.get_height() for bar in used.patches] == pytest.approx(
        [100 * share for share in shares]
    )
    before = next(patch for patch in values.patches if patch.get_label() == "original").get_data()
    assert (before.values * np.diff(before.edges)).sum() == pytest.approx(1)
    error = ((ml.dequantize_nf4(packed) - source).norm() / source.norm()).item()
    assert values.get_title().endswith(f"= {error:.2%}")


def test_bars_of_memory_add_up():
    axes = figures()["memory"].axes[0]
    drawn = {c.get_label(): [bar.get_height() for bar in c.patches] for c in axes.containers}
    expected = {
        caption: [getattr(plan, part) / 1e9 for plan in plans()] for part, caption in PARTS.items()
    }
    assert drawn == {
        caption: pytest.approx(heights) for caption, heights in expected.items() if any(heights)
    }
    tops = [
        max(c.patches[i].get_y() + c.patches[i].get_height() for c in axes.containers)
        for i in range(3)
    ]
    assert tops == pytest.approx([plan.total / 1e9 for plan in plans()])
    assert plans()[0].plot(None, *plans()[1:]).axes[0].get_title() == axes.get_title()


def test_spectra_are_of_the_dense_update():
    curves, cells = figures()["spectra"].axes[:2]
    sigma: dict[str, list] = {}
    for name, module in adapted().named_modules():
        if isinstance(module, ml.LoRALayer):
            dense = torch.linalg.svdvals(module.adapters["default"].delta(torch.float64).detach())[
                :4
            ]
            sigma.setdefault(name.rpartition(".")[2], []).append(dense)
    assert [line.get_label() for line in curves.lines] == [*sigma]
    for line in curves.lines:
        median = torch.stack(sigma[line.get_label()]).median(0).values
        assert line.get_ydata() == pytest.approx(median, rel=1e-5)  # B and A are fp32
    check_cells(cells, {layer.name: layer.size for layer in ml.merge_report(adapted()).layers})


def check_cells(axes, values: dict[str, float]):
    """Check that a heat map has a cell for each layer, in its row and column."""
    grid = axes.collections[0].get_array()
    targets = [tick.get_text() for tick in axes.get_xticklabels()]
    assert grid.count() == len(values)
    for name, value in values.items():
        cell = grid[int(name.split(".")[2]), targets.index(name.rpartition(".")[2])]
        assert cell == pytest.approx(value, rel=1e-5)  # the grid is fp32


def test_a_cell_is_a_layers_merge_error():
    report = ml.merge_report(adapted())
    # axes without a title are colour bars
    panels = [axes for axes in figures()["merge_error"].axes if axes.get_title()]
    assert [axes.get_title().partition(":")[0] for axes in panels] == ["bfloat16", "float16", "nf4"]
    for axes in panels:
        target = axes.get_title().partition(":")[0]
        check_cells(axes, {layer.name: layer.error[target] for layer in report.layers})


def test_layers_with_one_last_name_or_no_number_have_their_own_cells():
    one = ml.merge_report(adapted()).total
    names = ["a.0.proj", "b.0.proj", "a.1.proj", "head"]
    layers = [
        type(one)(name, 0.1, {"nf4": float(i + 1)}, {"nf4": 0.5}) for i, name in enumerate(names)
    ]
    axes = ml.plot.merge_error(ml.MergeReport(tuple(layers), one), ["nf4"]).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["a.*.proj", "b.*.proj", "head"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["–", "0", "1"]
    grid = axes.collections[0].get_array()
    assert [grid[0, 2], grid[1, 0], grid[1, 1], grid[2, 0]] == [4, 1, 2, 3] and grid.count() == 4


def test_a_packed_batch_shows_its_attention_mask():
    strips, mask = figures()["packed"].axes
    documents, learned = batch()["document_ids"], batch()["labels"] != IGNORE
    row, T = documents[1], documents.shape[1]
    sees = np.zeros((T, T), dtype=bool)
    for area in mask.collections:
        (outline,) = area.get_paths()
        sees |= np.array(
            [
                [outline.contains_point((key + 0.5, query + 0.5)) for key in range(T)]
                for query in range(T)
            ]
        )
    expected = (row[:, None] == row) & (row[:, None] >= 0) & torch.ones(T, T).tril().bool()
    assert (sees == expected.numpy()).all()
    tall = [bar for bar in strips.patches if bar.get_height() > 0.5]
    for place, ids in enumerate(documents):
        here = sorted((b for b in tall if round(b.get_y() + 0.4) == place), key=lambda b: b.get_x())
        assert sum(bar.get_width() for bar in here) == T and len(here) == len(set(ids.tolist()))
    dark = sum(bar.get_width() for bar in strips.patches if bar.get_height() < 0.5)
    assert dark == learned.sum().item()


def test_points_are_on_the_roof_or_at_their_measured_speed():
    axes = figures()["roofline"].axes[0]
    x, y = axes.lines[0].get_data()
    assert list(y) == [min(100 * intensity, 1600) for intensity in x] and 16 in x
    drawn = np.array([c.get_offsets()[0] for c in axes.collections if len(c.get_offsets())])
    assert list(drawn[:, 0]) == [row["operations"] / row["bytes"] for row in ROWS]
    assert drawn[:, 1] == pytest.approx(np.minimum(100 * drawn[:, 0], 1600))
    timed = [
        {"job": "a", "bytes": 2e6, "operations": 4e6, "us": {"minilora": 100.0, "other": 50.0}}
    ]
    axes = ml.plot.roofline(timed, 100).axes[0]
    points = [c for c in axes.collections if len(c.get_offsets())]
    # 4e6 in 100 us: 40e9 a second
    assert [tuple(c.get_offsets()[0]) for c in points] == [(2, 40), (2, 80)]
    assert [len(c.get_facecolors()) for c in points] == [1, 0]  # the other marker is hollow


# ---- error


def test_invalid_input_raises_with_the_reason(monkeypatch, tmp_path):
    source, packed = weight()
    with pytest.raises(ValueError, match="expected ascending levels"):
        ml.plot.codebook({"wrong": torch.tensor([1.0, 0.0])})
    with pytest.raises(ValueError, match="expected an NF4Weight"):
        ml.plot.histogram(source)
    with pytest.raises(ValueError, match=r"expected the tensor that was quantised, \(48, 65\)"):
        ml.plot.histogram(packed, source.T)
    with pytest.raises(ValueError, match="expected plans"):
        ml.plot.memory([])
    with pytest.raises(ValueError, match="no document_ids"):
        ml.plot.packed({"labels": source})
    with pytest.raises(ValueError, match="row: expected 0 to 2"):
        ml.plot.packed(batch(), row=3)
    with pytest.raises(ValueError, match="'nf5' matches nothing. Nearest: 'nf4'"):
        ml.plot.merge_error(ml.merge_report(adapted()), ["nf5"])
    with pytest.raises(ValueError, match="expected at least one row, and bytes"):
        ml.plot.roofline([{"job": "a", "bytes": 0, "operations": 1}], 100)
    untrained = CausalLM(DecoderConfig(**SHAPE))
    for _ in range(2):
        with pytest.raises(ValueError, match="no active adapter changes anything"):
            ml.plot.spectra(untrained)
        ml.inject(untrained, ml.LoRAConfig(), name=f"adapter-{_}")
    with pytest.raises(ValueError, match="'xyz' is not supported"):
        ml.plot.codebook(path=tmp_path / "a.xyz")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[plot\]'"):
        ml.plot.codebook()
