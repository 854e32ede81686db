"""Proves that every picture shows the library's numbers, and can be read: in grey, small, with no word cut or covered.

Oracle: what is drawn is the data of the figure's artists, compared with the library or with a definition. Property: no
text leaves its figure or meets another, series are told apart without colour, equal figures are equal bytes. Round
trip: the pictures in docs/ are what the script draws. Errors: what cannot be drawn says why.
"""

import sys
from functools import cache
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch

import minilora as ml
import pictures
from minilora.data.collate import collate
from minilora.data.labels import IGNORE, Example
from minilora.data.packing import pack
from minilora.memory.plan import PARTS
from minilora.models.config import DecoderConfig
from minilora.models.decoder import CausalLM
from minilora.plot import style
from source import ROOT

pytest.importorskip("matplotlib")
SHAPE = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2}
RUN = {"per_device_train_batch_size": 2, "max_length": 128}


@cache
def adapted() -> torch.nn.Module:
    """A decoder of three layers in 4 bits with an adapter that is not zero."""
    torch.manual_seed(0)
    model = CausalLM(DecoderConfig(**SHAPE))
    ml.quantize_model(model)
    ml.inject(model, ml.LoRAConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


@cache
def plans() -> list[ml.MemoryPlan]:
    lora = ml.LoRAConfig(r=4, target_modules="all-linear")
    config = DecoderConfig(**SHAPE)
    found = [ml.plan_memory(config, lora, ml.TrainConfig(**RUN), quantize=q, card="20MB") for q in ("nf4", None)]
    return [*found, ml.plan_memory(config, None, ml.TrainConfig(method="full", **RUN))]


@cache
def batch() -> dict[str, torch.Tensor]:
    lengths = [31, 12, 20, 5, 17, 9, 26, 14]
    examples = [Example([1] * n, [IGNORE] * (n // 2) + [1] * (n - n // 2), row) for row, n in enumerate(lengths)]
    return collate([*pack(examples, lengths, 48)], 0)


@cache
def weight() -> tuple[torch.Tensor, ml.NF4Weight]:
    source = torch.randn(48, 65, generator=torch.Generator().manual_seed(0))  # blocks run over row ends
    return source, ml.quantize_nf4(source)


ROWS = [
    {"job": job, "bytes": size, "operations": 2 * n, "label": f"{n} tokens"}
    for job, size in (("4 bits", 0.5), ("bf16", 2))
    for n in (1, 8, 64)
]


def log(folder, seed: int):
    rng = np.random.default_rng(seed)
    lines = [{"step": s, "loss": 3 - s / 20 + rng.random(), "learning_rate": 1e-4, "grad_norm": 1.0,
              "tokens_per_second": 900.0, "eval_loss": 2.5, "eval_exact_match": 0.5} for s in range(1, 20)]  # fmt: skip
    folder.mkdir()
    (folder / "log.jsonl").write_text("\n".join(map(str, lines)).replace("'", '"'))
    return folder


@pytest.fixture(scope="module")
def figures(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("runs")
    report = ml.merge_report(adapted())
    return {
        "codebook": ml.plot.codebook(),
        "histogram": ml.plot.histogram(weight()[1], weight()[0]),
        "memory": ml.plot.memory(plans()),
        "merge_error": ml.plot.merge_error(report),
        "merge_error, one": ml.plot.merge_error(report, ["nf4"]),
        "packed": ml.plot.packed(batch(), row=1),
        "roofline": ml.plot.roofline(ROWS, 100, 1600, "a title"),
        "runs": ml.plot.runs([log(folder / "short", 0), log(folder / "a-run-with-a-longer-name", 1)]),
        "spectra": ml.plot.spectra(adapted()),
    }


# ---- oracle: what is drawn


def test_every_function_is_drawn_here(figures):
    assert {name.partition(",")[0] for name in figures} == set(ml.plot.__all__)


def test_the_codebook_is_the_librarys_and_so_is_its_error(figures):
    law, error = figures["codebook"].axes
    stems = next(c for c in law.collections if c.get_label() == "a level and its code")
    assert [segment[0][0] for segment in stems.get_segments()] == ml.plot.levels.nf4_codebook().tolist()
    x, y = (error.lines[0].get_data()[i] for i in (0, 1))
    values = torch.linspace(-1, 1, 997)  # none of them a threshold, where the line jumps
    for start in range(0, len(values), 63):  # blocks whose absmax is 1
        block = torch.cat([torch.ones(1), values[start : start + 63]])
        rounded = ml.dequantize_nf4(ml.quantize_nf4(block, 64, double_quant=False)) - block
        assert np.interp(block, x, y) == pytest.approx(rounded, abs=1e-6)


def test_a_histogram_counts_the_codes(figures):
    source, packed = weight()
    values, used = figures["histogram"].axes
    codes = torch.stack([packed.packed >> 4, packed.packed & 15], 1).flatten()[: packed.numel]
    shares = [(codes == code).float().mean().item() for code in range(16)]
    assert [bar.get_width() * bar.get_height() for bar in values.patches[:16]] == pytest.approx(shares)
    assert [bar.get_height() for bar in used.patches] == pytest.approx([100 * share for share in shares])
    before = next(patch for patch in values.patches if patch.get_label() == "before").get_data()
    assert (before.values * np.diff(before.edges)).sum() == pytest.approx(1)
    error = ((ml.dequantize_nf4(packed) - source).norm() / source.norm()).item()
    assert values.get_title().endswith(f"= {error:.2%}")


def test_bars_of_memory_add_up(figures):
    axes = figures["memory"].axes[0]
    drawn = {c.get_label(): [bar.get_height() for bar in c.patches] for c in axes.containers}
    expected = {caption: [getattr(plan, part) / 1e9 for plan in plans()] for part, caption in PARTS.items()}
    assert drawn == {caption: pytest.approx(heights) for caption, heights in expected.items() if any(heights)}
    tops = [max(c.patches[i].get_y() + c.patches[i].get_height() for c in axes.containers) for i in range(3)]
    assert tops == pytest.approx([plan.total / 1e9 for plan in plans()])
    assert plans()[0].plot(None, *plans()[1:]).axes[0].get_title() == axes.get_title()


def test_spectra_are_of_the_dense_update(figures):
    curves, cells = figures["spectra"].axes[:2]
    sigma: dict[str, list] = {}
    for name, module in adapted().named_modules():
        if isinstance(module, ml.LoRALayer):
            dense = torch.linalg.svdvals(module.adapters["default"].delta(torch.float64))[:4]
            sigma.setdefault(name.rpartition(".")[2], []).append(dense)
    assert [line.get_label() for line in curves.lines] == [*sigma]
    for line in curves.lines:
        median = torch.stack(sigma[line.get_label()]).median(0).values
        assert line.get_ydata() == pytest.approx(median, rel=1e-5)  # B and A are fp32
    check_cells(cells, {layer.name: layer.size for layer in ml.merge_report(adapted()).layers})


def check_cells(axes, values: dict[str, float]):
    """A heat map has a cell for each layer, in its row and column."""
    grid = axes.collections[0].get_array()
    targets = [tick.get_text() for tick in axes.get_xticklabels()]
    assert grid.count() == len(values)
    for name, value in values.items():
        cell = grid[int(name.split(".")[2]), targets.index(name.rpartition(".")[2])]
        assert cell == pytest.approx(value, rel=1e-5)  # the grid is fp32


def test_a_cell_is_a_layers_merge_error(figures):
    report = ml.merge_report(adapted())
    panels = [axes for axes in figures["merge_error"].axes if axes.get_title()]  # the others are colour bars
    assert [axes.get_title().partition(":")[0] for axes in panels] == ["bfloat16", "float16", "nf4"]
    for axes in panels:
        target = axes.get_title().partition(":")[0]
        check_cells(axes, {layer.name: layer.error[target] for layer in report.layers})


def test_layers_that_share_a_last_word_and_layers_without_a_number_have_their_cells():
    one = ml.merge_report(adapted()).total
    names = ["a.0.proj", "b.0.proj", "a.1.proj", "head"]
    layers = [type(one)(name, 0.1, {"nf4": float(i + 1)}, {"nf4": 0.5}) for i, name in enumerate(names)]
    axes = ml.plot.merge_error(ml.MergeReport(tuple(layers), one), ["nf4"]).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["a.*.proj", "b.*.proj", "head"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["–", "0", "1"]
    grid = axes.collections[0].get_array()
    assert [grid[0, 2], grid[1, 0], grid[1, 1], grid[2, 0]] == [4, 1, 2, 3] and grid.count() == 4


def test_a_packed_batch_shows_who_sees_whom(figures):
    strips, mask = figures["packed"].axes
    documents, learned = batch()["document_ids"], batch()["labels"] != IGNORE
    row, T = documents[1], documents.shape[1]
    sees = np.zeros((T, T), dtype=bool)
    for area in mask.collections:
        (outline,) = area.get_paths()
        sees |= np.array([[outline.contains_point((key + 0.5, query + 0.5)) for key in range(T)] for query in range(T)])
    expected = (row[:, None] == row) & (row[:, None] >= 0) & torch.ones(T, T).tril().bool()
    assert (sees == expected.numpy()).all()
    tall = [bar for bar in strips.patches if bar.get_height() > 0.5]
    for place, ids in enumerate(documents):
        here = sorted((b for b in tall if round(b.get_y() + 0.4) == place), key=lambda b: b.get_x())
        assert sum(bar.get_width() for bar in here) == T and len(here) == len(set(ids.tolist()))
    dark = sum(bar.get_width() for bar in strips.patches if bar.get_height() < 0.5)
    assert dark == learned.sum().item()


def test_points_lie_on_the_roof_or_where_they_were_timed(figures):
    axes = figures["roofline"].axes[0]
    x, y = axes.lines[0].get_data()
    assert list(y) == [min(100 * intensity, 1600) for intensity in x] and 16 in x
    drawn = np.array([c.get_offsets()[0] for c in axes.collections if len(c.get_offsets())])
    assert list(drawn[:, 0]) == [row["operations"] / row["bytes"] for row in ROWS]
    assert drawn[:, 1] == pytest.approx(np.minimum(100 * drawn[:, 0], 1600))
    timed = [{"job": "a", "bytes": 2e6, "operations": 4e6, "us": {"minilora": 100.0, "other": 50.0}}]
    axes = ml.plot.roofline(timed, 100).axes[0]
    points = [c for c in axes.collections if len(c.get_offsets())]
    assert [tuple(c.get_offsets()[0]) for c in points] == [(2, 40), (2, 80)]  # 4e6 in 100 us: 40e9 a second
    assert [len(c.get_facecolors()) for c in points] == [1, 0]  # the other is hollow


# ---- property: it can be read


def texts(figure) -> list[tuple[str, Any]]:
    """(text, box in pixels) of everything that is written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    canvas = FigureCanvasAgg(figure)
    with_look = canvas.get_renderer()
    canvas.draw()
    hidden = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):  # ticks beyond the limits
        low, high = sorted(axis.get_view_interval())
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not low <= tick.get_loc() <= high:
                hidden |= {tick.label1, tick.label2}
    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return [(t.get_text(), t.get_window_extent(with_look)) for t in found if t not in hidden]


def test_no_text_is_cut_or_covered_by_another(figures):
    for name, figure in figures.items():
        written = texts(figure)
        assert len(written) > 5, name
        for text, box in written:
            inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
            assert inside, f"{name}: {text!r} is cut"
        for (text, box), (other, second) in combinations(written, 2):
            width = min(box.x1, second.x1) - max(box.x0, second.x0)
            height = min(box.y1, second.y1) - max(box.y0, second.y0)
            assert min(width, height) < 1, f"{name}: {text!r} meets {other!r}"  # boxes are a pixel larger than letters


def lightness(colour: str) -> float:
    """CIE L*, 0 to 100, of "#rrggbb": what a grey copy keeps of it."""
    rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance


def test_neighbours_differ_in_grey():
    assert len(set(style.COLOURS)) == len(style.COLOURS) >= len(PARTS)
    for one, other in pairwise(style.COLOURS):
        assert abs(lightness(one) - lightness(other)) >= 20, (one, other)
    for i, j in combinations(range(len(style.LINES)), 2):
        one, other = style.line(i), style.line(j)
        told = one["linestyle"] != other["linestyle"]
        assert told or abs(lightness(one["color"]) - lightness(other["color"])) >= 20, (i, j)
    assert len({str(style.line(i)) for i in range(35)}) == 35
    assert max(map(lightness, style.LINES)) < 75  # on white
    for one, other in combinations(ml.plot.batch.SHADES, 2):
        assert abs(lightness(one) - lightness(other)) >= 15  # a black line is between them


def test_areas_and_lines_are_told_apart_without_colour(figures):
    axes = figures["memory"].axes[0]
    looks = [(c.patches[0].get_hatch(), round(lightness_of(c.patches[0].get_facecolor()), -1)) for c in axes.containers]
    assert len(set(looks)) == len(looks)
    for name in ("spectra", "codebook", "runs"):
        lines = [ln for ln in figures[name].axes[0 if name != "codebook" else 1].lines if ln.get_linestyle() != "None"]
        lines = [ln for ln in lines if not ln.get_label().startswith("_")]
        assert len({(str(ln.get_linestyle()), str(ln._dash_pattern), ln.get_marker()) for ln in lines}) == len(lines)


def lightness_of(rgba: tuple[float, ...]) -> float:
    return lightness("#" + "".join(f"{round(255 * c):02x}" for c in rgba[:3]))


def test_equal_figures_are_equal_bytes_small_and_searchable(tmp_path):
    for name in ("one.svg", "two.svg"):
        ml.plot.codebook(path=tmp_path / name)
    svg = (tmp_path / "one.svg").read_text()
    assert svg == (tmp_path / "two.svg").read_text() and len(svg) < 60_000
    assert ">what rounding to the nearest level adds</text>" in svg and "<dc:date>" not in svg
    ml.plot.codebook(path=tmp_path / "one.png")
    ml.plot.codebook(path=tmp_path / "one.pdf")
    assert (tmp_path / "one.png").read_bytes()[:4] == b"\x89PNG" and (tmp_path / "one.pdf").read_bytes()[:4] == b"%PDF"


def test_every_picture_without_figures_of_its_own_is_held():
    assert {*pictures.PLAIN} == {"codebook", "packed", "roofline", "plan"}


def test_nothing_of_the_look_stays_behind():
    import matplotlib

    before = dict(matplotlib.rcParams)
    ml.plot.codebook()
    assert {name for name in before if before[name] != matplotlib.rcParams[name]} <= {"backend"}  # it is found by then


# ---- round trip


@pytest.mark.strict
@pytest.mark.parametrize("name", ["codebook", "packed", "roofline", pytest.param("plan", marks=pytest.mark.slow)])
def test_the_pictures_of_the_docs_are_what_the_script_draws(name: str, tmp_path):
    pictures.PLAIN[name](tmp_path / "again.svg")
    kept = ROOT / "docs" / f"{name}.svg"
    assert (tmp_path / "again.svg").read_bytes() == kept.read_bytes(), "run python benchmarks/pictures.py"
    assert kept.stat().st_size < 60_000


# ---- error


def test_what_cannot_be_drawn_says_why(monkeypatch, tmp_path):
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
    with pytest.raises(ImportError, match=r"pip install 'minilora\[plot\]'"):
        ml.plot.codebook()
