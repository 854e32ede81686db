"""Diagnosis → chapter of ICD-10-CM: a real task with 22 answers, checkable at a glance. The demo's task.

Source: the tabular list of ICD-10-CM, April 2026 (US government work, public domain: CDC/NCHS and CMS), as shipped
in `simple-icd-10-cm` 1.5.0 on PyPI (Stefano Travasci, MIT). Fetched at run time; not a line of it is in here.

The leaves of the code tree are the rows: 36,343 descriptions in 1,918 three-character categories ("H40 Glaucoma")
of 22 chapters. A category is either trained on, with at most three rows, or held out, with one, never both: on a
random split a 1-nearest-neighbour lookup alone scores 0.70, so only a split by category shows learning.
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
# A chapter is known by its range of categories, the only part of its title that is short; the answer to give for it
# is one plain word of one or two tokens, and no two of them begin with the same token.
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
    """A leaf of the code tree: `code` "A00.0", its description, and the range of its chapter, "A00-B99"."""

    code: str
    description: str
    chapter: str

    @property
    def category(self) -> str:
        """The three characters that all codes of one disease share."""
        return self.code[:3]


def read_tabular(path: Path) -> list[Diagnosis]:
    """The leaves of the tabular list, in its order, each description once (case and punctuation do not count)."""
    from xml.etree import ElementTree  # here: `import minilora` is to stay light

    leaves: dict[str, Diagnosis] = {}
    for chapter in ElementTree.parse(path).getroot().findall("chapter"):
        title = _text(chapter, "desc")
        span = re.search(r"\(([A-Z]\w\w-[A-Z]\w\w)\)$", title)
        if span is None or span[1] not in SHORT_NAMES:
            raise ValueError(f"{path}: the chapter {title!r} ends in none of the ranges {list(SHORT_NAMES)}")
        for diagnosis in chapter.iter("diag"):
            if diagnosis.find("diag") is None:
                leaf = Diagnosis(_text(diagnosis, "name"), _text(diagnosis, "desc"), span[1])
                leaves.setdefault(" ".join(re.findall(r"\w+", leaf.description.lower())), leaf)
    return list(leaves.values())


def icd10(test_rows: int = 500, seed: int = 0, *, train_rows: int | None = None, rows_per_category: int = 3) -> Task:
    """The task, the same for the same arguments: 3,798 rows to train on beside the default 500 held out.

    `train_rows` keeps that many of the former. Give what one run trains on, so that a baseline learns from it too.
    """
    return make_task(read_tabular(fetch(WHEEL)), test_rows, seed, train_rows, rows_per_category)


def make_task(
    diagnoses: list[Diagnosis], test_rows: int, seed: int, train_rows: int | None = None, rows_per_category: int = 3
) -> Task:
    """Draw `rows_per_category` rows of each category, then split by category."""
    if rows_per_category < 1:
        raise ValueError(f"rows_per_category is {rows_per_category}, expected at least 1")
    categories: dict[str, list[Diagnosis]] = {}
    for diagnosis in diagnoses:
        categories.setdefault(diagnosis.category, []).append(diagnosis)
    rng = random.Random(seed)
    drawn = [rng.sample(leaves, min(rows_per_category, len(leaves))) for leaves in categories.values()]
    train, test = split_by_group([[_row(leaf) for leaf in leaves] for leaves in drawn], test_rows, seed)
    if train_rows is not None and not 0 < train_rows <= len(train):
        raise ValueError(f"train_rows is {train_rows}, expected 1 to {len(train)} beside {test_rows} held-out rows")
    source = f"ICD-10-CM (US government) from {WHEEL.project} {WHEEL.version} (MIT)"
    return Task("icd10", train[:train_rows], test, list(SHORT_NAMES.values()), source)


def _row(diagnosis: Diagnosis) -> Row:
    return chat_row(INSTRUCTION, diagnosis.description, SHORT_NAMES[diagnosis.chapter])


def _text(element: Any, tag: str) -> str:
    text = (element.findtext(tag) or "").strip()
    if not text:
        raise ValueError(f"the tabular list has a <{element.tag}> without a <{tag}>")
    return text
