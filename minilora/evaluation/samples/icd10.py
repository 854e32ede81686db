"""Diagnosis → chapter of ICD-10-CM: a real task with 22 short answers, used by the demo.

Source: the tabular list of ICD-10-CM, April 2026 (US government work, public domain: CDC/NCHS and
CMS), as shipped in `simple-icd-10-cm` 1.5.0 on PyPI (Stefano Travasci, MIT). The file is fetched at
run time and not shipped.

The leaves of the code tree are the rows: 36,343 descriptions in 1,918 three-character categories
("H40 Glaucoma") of 22 chapters. A category is either trained on, with at most three rows, or held
out, with one row: on a random split, a lookup of the nearest neighbour alone scores 0.70, so only
a split by category shows learning.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.evaluation.samples.download import FilePin, Pin, fetch
from minilora.evaluation.samples.task import Row, Task, chat_row, split_by_group

WHEEL = Pin(
    "simple-icd-10-cm",
    "1.5.0",
    FilePin(
        "simple_icd_10_cm-1.5.0-py3-none-any.whl",
        1076390,
        "6d461d71dc26aedc530ae65f02cfb578a154e49507c32e8241e75f701d4b7e42",
    ),
    FilePin(
        "simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml",
        9747661,
        "f161f8182aff3ce3a2a78e202f8259c08eaee2c670a9e45b0072445c52302935",
    ),
)
INSTRUCTION = "ICD-10 chapter?"
# Range of categories → answer. The range identifies a chapter. Each answer is one plain word of one
# or two tokens, and no two answers begin with the same token.
SHORT_NAMES = {
    "A00-B99": "infection",
    "C00-D49": "neoplasm",
    "D50-D89": "blood",
    "E00-E89": "endocrine",
    "F01-F99": "mental",
    "G00-G99": "nerve",
    "H00-H59": "eye",
    "H60-H95": "ear",
    "I00-I99": "circulation",
    "J00-J99": "respiratory",
    "K00-K95": "digestive",
    "L00-L99": "skin",
    "M00-M99": "bone",
    "N00-N99": "urinary",
    "O00-O9A": "pregnancy",
    "P00-P96": "newborn",
    "Q00-QA0": "congenital",
    "R00-R99": "symptom",
    "S00-T88": "injury",
    "V00-Y99": "external",
    "Z00-Z99": "health",
    "U00-U85": "special",
}


@dataclass(frozen=True)
class Diagnosis:
    """A leaf of the code tree.

    Attributes:
        code: for example "A00.0".
        description: its text.
        chapter: range of its chapter, for example "A00-B99".
    """

    code: str
    description: str
    chapter: str

    @property
    def category(self) -> str:
        """First three characters, which all codes of one disease share."""
        return self.code[:3]


def read_tabular(path: Path) -> list[Diagnosis]:
    """Return the leaves of the tabular list, in its order, each description once.

    Descriptions are compared without case and punctuation.

    Args:
        path: the XML file.

    Raises:
        ValueError: a chapter is unknown, or an element lacks its text.
    """
    from xml.etree import ElementTree  # imported here to keep `import minilora` light

    leaves: dict[str, Diagnosis] = {}
    for chapter in ElementTree.parse(path).getroot().findall("chapter"):
        title = _text(chapter, "desc")
        span = re.search(r"\(([A-Z]\w\w-[A-Z]\w\w)\)$", title)
        if span is None or span[1] not in SHORT_NAMES:
            raise ValueError(
                f"{path}: the chapter {title!r} ends in no known range; known: {list(SHORT_NAMES)}"
            )
        for diagnosis in chapter.iter("diag"):
            if diagnosis.find("diag") is None:
                leaf = Diagnosis(_text(diagnosis, "name"), _text(diagnosis, "desc"), span[1])
                words = re.findall(r"\w+", leaf.description.lower())
                leaves.setdefault(" ".join(words), leaf)
    return list(leaves.values())


def icd10(
    test_rows: int = 500,
    seed: int = 0,
    *,
    train_rows: int | None = None,
    rows_per_category: int = 3,
) -> Task:
    """Return the task: 3,798 rows to train on next to the default 500 held out.

    Args:
        test_rows: number of held-out rows, one of each held-out category.
        seed: seed of the draw and the split; equal arguments give equal tasks.
        train_rows: number of training rows to keep, so that baselines see the rows of one run; None
            keeps all.
        rows_per_category: largest number of training rows of a category.
    """
    return make_task(read_tabular(fetch(WHEEL)), test_rows, seed, train_rows, rows_per_category)


def make_task(
    diagnoses: list[Diagnosis],
    test_rows: int,
    seed: int,
    train_rows: int | None = None,
    rows_per_category: int = 3,
) -> Task:
    """Draw rows of each category, then split by category.

    Args:
        diagnoses: all leaves.
        test_rows: number of held-out rows.
        seed: seed of the draw and the split.
        train_rows: number of training rows to keep; None keeps all.
        rows_per_category: largest number of rows of a category.

    Raises:
        ValueError: a number is out of range.
    """
    if rows_per_category < 1:
        raise ValueError(f"rows_per_category is {rows_per_category}, expected at least 1")
    categories: dict[str, list[Diagnosis]] = {}
    for diagnosis in diagnoses:
        categories.setdefault(diagnosis.category, []).append(diagnosis)
    rng = random.Random(seed)
    groups = []
    for leaves in categories.values():
        drawn = rng.sample(leaves, min(rows_per_category, len(leaves)))
        groups.append([_row(leaf) for leaf in drawn])
    train, test = split_by_group(groups, test_rows, seed)
    if train_rows is not None and not 0 < train_rows <= len(train):
        raise ValueError(
            f"train_rows is {train_rows}, expected 1 to {len(train)} with {test_rows} held-out rows"
        )
    source = f"ICD-10-CM (US government) from {WHEEL.project} {WHEEL.version} (MIT)"
    return Task("icd10", train[:train_rows], test, list(SHORT_NAMES.values()), source)


def _row(diagnosis: Diagnosis) -> Row:
    return chat_row(INSTRUCTION, diagnosis.description, SHORT_NAMES[diagnosis.chapter])


def _text(element: Any, tag: str) -> str:
    text = (element.findtext(tag) or "").strip()
    if not text:
        raise ValueError(f"the tabular list contains a <{element.tag}> without a <{tag}>")
    return text
