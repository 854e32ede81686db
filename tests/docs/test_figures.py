"""Tests that every figure in a text has a source.

`FIGURES` names the sources for each section that contains figures:

    log: HEADING     a script's output in that entry of docs/LOG.md, which has the same figure
    test: FILE       a test of that file prints the figure or computes it again
    given: REASON    a definition, a version or a setting: nothing was measured
    cell: CODE       code of the notebook that prints or asserts the figure

A figure is a number with decimals, or a number before a unit. Fenced code is left out, because
other tests run it or print its output. Each entry of the log names the script, test or command that
prints its figures.
"""

import re

import pytest

from helpers.source import ROOT, text
from tests.docs.test_pages import NOTEBOOKS, PAGES, prose

UNITS = "%|×|GB|MB|kB|TB|ms|µs|s\\b|seconds|minutes|times|nats"
FIGURE = re.compile(rf"(?<![\w.#/=:-])(?:\d[\d,]*\.\d+(?![\w.]*\d)|\d[\d,]*(?=\s?(?:{UNITS})))")
STUDIES = "log: ranks, targets, data, forgetting and prompts"
PEERS = "log: a training step beside peft + transformers + bitsandbytes, on cores without AMX"
SERVED = "log: many adapters in one batch, and the server"
FIGURES: dict[str, dict[str, list[str]]] = {
    "CONTRIBUTING.md": {"Contributing": ["given: what is called slow"]},
    "README.md": {
        "Run it": ["given: versions"],
        "How it compares": [PEERS, SERVED],
        "What the demo shows": ["test: test_demo.py"],
        "Reading order": ["test: test_pages.py"],
    },
    "docs/cli.md": {
        "Data options": ["given: an example of an option"],
        "chat": ["given: defaults of minilora/cli/chat.py"],
    },
    "docs/distributed.md": {"When something fails": ["given: torch's own time limits"]},
    "docs/formats.md": {
        "The types": ["test: test_gguf_formats.py"],
        "Training on the bytes of a GGUF file": ["log: the base in the bytes of its file"],
    },
    "docs/glossary.md": {"A weight, by hand": ["test: test_pages.py"]},
    "docs/gpu.md": {
        "What to expect": [
            "given: what is known of memory in general",
            "given: what bitsandbytes publishes",
        ]
    },
    "docs/memory.md": {"Will it fit?": ["given: sizes of cards"]},
    "docs/reference.md": {"Public functions and classes": ["given: weights in an example"]},
    "docs/serve.md": {
        "Speed": [SERVED],
        "Limits": ["given: a setting of minilora/serving/middleware.py"],
    },
    "docs/speed.md": {"Speed and memory": [PEERS]},
    "docs/variants.md": {"Several adapters": [SERVED]},
    "docs/when.md": dict.fromkeys(
        (
            "Prompt, retrieve or fine-tune?",
            "LoRA or QLoRA?",
            "Which rank, which learning rate?",
            "Which layers?",
            "How much data?",
            "What is forgotten?",
        ),
        [STUDIES],
    ),
    "kernels/README.md": {
        "What runs where": ["given: versions"],
        "Instruction counts": ["test: test_kernel_report.py"],
    },
    "notebooks/1_lora_from_scratch.py": {
        "2. A toy: how large must r be?": ["given: the toy's singular values"]
    },
    "notebooks/2_nf4_by_hand.py": {
        "1. Quantiles": ["given: half of a distribution"],
        "4. Sixteen other numbers": ['cell: "FP4 E3M0": mirrored(0.25, 0.5, 1, 2, 4, 8, 16)'],
    },
    "notebooks/3_double_quantisation.py": {
        "3. The dynamic map": ["cell: assert (table.abs() > 0.1).sum() == 129"],
        "6. The same bits, spent otherwise": [
            'cell: assert sum(bits["once"]) == 4 + 0.5',
            "cell: {plain_bits:.3f} bits",
        ],
    },
    "notebooks/4_a_triton_kernel.py": {
        "3. Why memory decides": ["cell: assert round(BYTES, 3) == 2.516"],
        "5. The fast kernel's ideas, one after another": ["cell: WORDS=128"],
        "7. The way back: 15 comparisons, or one look-up in 32 bins": [
            "cell: y.double() * 15.5 + 16 + 2**20"
        ],
    },
    "notebooks/6_qlora_end_to_end.py": {
        "QLoRA, end to end": ["cell: round(count.total - count.trainable, -5) == 134_500_000"],
        "9. The adapter is a file of its own": ["cell: assert round(size / 1e6) == 20"],
    },
    "notebooks/8_merging_measured.py": {
        "1. One matrix, and updates of every size": [
            'cell: assert 0.4 < small.error["bfloat16"] < 0.65',
            'cell: assert abs(small.error["original"] * 0.003 - 0.092) < 0.005',
            "cell: assert shares[1] < 0.001",
            "cell: assert 0.039 < gaps.min() / 2 < 0.041",
            'cell: assert 0.85 < reports[0].projection["original"] < 0.98',
            "cell: assert 2.5 < noise[2] / noise[0] < 3.8",
        ],
    },
}


def sections(page: str) -> dict[str, str]:
    """Return heading -> the text up to the next heading of any level."""
    parts = re.split(r"^#+ (.*)$", prose(page), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def entries() -> dict[str, str]:
    """Return title without date -> text, for each entry of the log."""
    parts = re.split(r"^## [\d-]+: (.*)$", text("docs/LOG.md"), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_figure_matches_decimals_and_numbers_before_units():
    said = "1.37 times, 0.32, 1,429 MB, 40 %, 12 ms; "
    said += "but torch 2.13.0, 2 cores, arXiv:2305.18290, r = 16, #7.5, bf16"
    assert FIGURE.findall(said) == ["1.37", "0.32", "1,429", "40", "12"]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page not in ("docs/LOG.md", "CHANGELOG.md")] + NOTEBOOKS
)
def test_every_figure_has_its_source(page: str):
    known = FIGURES.get(page, {})
    found = {heading: FIGURE.findall(said) for heading, said in sections(page).items()}
    found = {heading: figures for heading, figures in found.items() if figures}
    assert set(known) == set(found), f"{page}: sections with figures are {found}"
    for heading, figures in found.items():
        kept = ""
        for kind, _, where in (source.partition(": ") for source in known[heading]):
            match kind:
                case "log":
                    kept += entries()[where]
                case "test":
                    assert [*(ROOT / "tests").rglob(where)]
                case "cell":
                    assert where in text(page) and f"# {where}" not in text(page), (
                        f"{page} has no cell with {where}"
                    )
                case _:
                    assert kind == "given" and where
        if kept:
            missing = [
                figure
                for figure in figures
                if not re.search(rf"(?<![\d.,]){re.escape(figure)}(?!\d)", kept)
            ]
            assert not missing, f"{page}, {heading}: the entry of the log does not have {missing}"


def rows(said: str) -> dict[str, list[str]]:
    """Return first cell -> other cells, for each row of the tables in a text."""
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in said.splitlines()
        if line.startswith("|")
    ]
    return {first: rest for first, *rest in lines}


def test_rows_of_tables_equal_those_of_the_log():
    """Compare whole rows, and the figures of the README with those of docs/speed.md."""
    pages = {"docs/when.md": 20, "docs/serve.md": 3}  # page -> least rows
    for page, least in pages.items():
        found = [
            line for line in text(page).splitlines() if re.match(r"\| [^|]+ \| [\d,.]+ \|", line)
        ]
        assert len(found) >= least and not set(found) - set(text("docs/LOG.md").splitlines()), page
    speed, kept = rows(text("docs/speed.md")), rows(entries()[PEERS.removeprefix("log: ")])
    for name in ("QLoRA", "QLoRA, gradient checkpointing", "LoRA, bf16", "full, fp32 + autocast"):
        assert [*speed[name][:3], speed[name][-1]] == [*kept[name][:3], kept[name][-1]], name
    *_, ratio, amx, memory = speed["QLoRA"]
    readme = rows(text("README.md"))
    shown = f"{ratio.split()[0]} times as fast; {amx.split()[0]} with AMX"
    assert readme["a step of QLoRA on two CPU cores"][1] == shown
    assert readme["its memory at the peak"][1] == memory.split()[-1]


RENAMED = {
    "test_parity.py": "test_compare_exports.py",
    "test_selftest.py": "test_check_training.py",
}


def found_today(path: str) -> bool:
    """Return True if a file that the log names exists in its folder or below.

    A notebook may have another number.
    """
    folder, _, name = path.partition("/")
    name = re.sub(r"^\d+_", "", name.rpartition("/")[2])
    name = RENAMED.get(name, name)
    return any(re.sub(r"^\d+_", "", file.name) == name for file in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("title", entries())
def test_an_entry_of_the_log_names_a_script_or_command(title: str):
    said = entries()[title]
    named = re.findall(
        r"(?:python|pytest)[^`\n]*?((?:benchmarks|examples|notebooks|tests)/[\w/]+\.py)", said
    )
    assert named or "`minilora " in said or "by hand" in said.lower(), f"{title}: no command"
    assert all(found_today(path) for path in named)
