"""US address → JSON: a task whose answers one can look at, scored by validity and by field.

Source: `training/labeled.xml` of the sdist of `usaddress` 0.5.16 on PyPI (DataMade and contributors, MIT): 1,488
different addresses, each word tagged by hand, of which 1,479 are used (the rest hold words that are no address).
Fetched at run time; none of it is in here. `usaddress` has 29 tags; we fold them into the ten fields a form would
have, so that the JSON is short enough for a small model.

Many addresses are one another's neighbours ("222 N. LaSalle St., Chicago", "221 N. LaSalle St., Chicago"). Two that
share 0.7 of their words, digits masked, are joined (also through a third); a group is trained on or held out, never
both, and held out with one row.
"""

import json
import re
from pathlib import Path

from minilora.evaluation.samples.download import FilePin, Pin, fetch
from minilora.evaluation.samples.task import Task, chat_row, connected, split_by_group

SDIST = Pin(
    "usaddress",
    "0.5.16",
    FilePin(
        "usaddress-0.5.16.tar.gz",
        914927,
        "f7e614e2489c159cf85be1b6f86edbfaf329dbeedef4d002a025757afd1ec6c6",
    ),
    FilePin(
        "usaddress-0.5.16/training/labeled.xml",
        428370,
        "dbd125fa01fbdbc4e25cce722c648ce4e224e4c9bdb9b5a14498aa8a042aee32",
    ),
)
INSTRUCTION = "Address to JSON."
# Field → the beginnings of the tags it takes in. `NotAddress` is no field: such rows are left out.
FIELDS = {
    "recipient": ("Recipient",),
    "number": ("AddressNumber",),
    "street": ("StreetName", "IntersectionSeparator", "CornerOf"),
    "building": ("BuildingName", "LandmarkName"),
    "unit": ("Occupancy", "Subaddress"),
    "box": ("USPSBox",),
    "city": ("PlaceName",),
    "state": ("StateName",),
    "zip": ("Zip",),
    "country": ("CountryName",),
}
NEAR_DUPLICATE = 0.7  # share of common words, |a ∩ b| / |a ∪ b|, from which two addresses count as the same


def read_labeled(path: Path) -> dict[str, str]:
    """Address → compact JSON of its fields, in the order in which the address names them; each address once."""
    from xml.etree import ElementTree  # here: `import minilora` is to stay light

    pairs: dict[str, str] = {}
    for address in ElementTree.parse(path).getroot().findall("AddressString"):
        words = [(word.tag, (word.text or "").strip()) for word in address]
        if not words or any(tag == "NotAddress" for tag, _ in words):
            continue
        fields: dict[str, list[str]] = {}
        for tag, text in words:
            fields.setdefault(_field(tag), []).append(text)
        record = {field: " ".join(texts).strip(" ,;") for field, texts in fields.items()}
        answer = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
        pairs.setdefault(" ".join(text for _, text in words), answer)
    return pairs


def address(test_rows: int = 200, seed: int = 0) -> Task:
    """The task, the same for the same arguments: 1,236 rows to train on beside the `test_rows` held out."""
    return make_task(read_labeled(fetch(SDIST)), test_rows, seed)


def make_task(pairs: dict[str, str], test_rows: int, seed: int) -> Task:
    """Group near-duplicates, then split by group."""
    groups = [[chat_row(INSTRUCTION, text, pairs[text]) for text in group] for group in near_duplicates(list(pairs))]
    train, test = split_by_group(groups, test_rows, seed)
    return Task("address", train, test, None, f"{SDIST.project} {SDIST.version}, training/labeled.xml (MIT)")


def near_duplicates(texts: list[str], threshold: float = NEAR_DUPLICATE) -> list[list[str]]:
    """The connected components of "shares `threshold` of its words with", over all pairs."""
    words = [frozenset(re.findall(r"[a-z0]+", re.sub(r"\d+", "0", text.lower()))) for text in texts]
    pairs = (
        (i, j)
        for i, mine in enumerate(words)
        for j in range(i)
        if len(mine & words[j]) >= threshold * len(mine | words[j])
    )
    return [[texts[i] for i in group] for group in connected(len(texts), pairs)]


def _field(tag: str) -> str:
    for field, beginnings in FIELDS.items():
        if tag.startswith(beginnings):
            return field
    raise ValueError(f"the address tag {tag!r} belongs to none of the fields {list(FIELDS)}")
