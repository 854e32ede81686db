"""US address → JSON: a task with readable answers, scored by validity and by field.

Source: `training/labeled.xml` of the sdist of `usaddress` 0.5.16 on PyPI (DataMade and
contributors, MIT): 1,488 different addresses, each word tagged by hand, of which 1,479 are used
(the others contain words outside the address). The file is fetched at run time and not shipped.
`usaddress` has 29 tags; this module maps them to the ten fields of a form, so that the JSON is
short enough for a small model.

Many addresses are near-duplicates ("222 N. LaSalle St., Chicago", "221 N. LaSalle St., Chicago").
Two addresses that share 0.7 of their words, digits masked, belong to one group, also through a
third address. A group is either trained on or held out, and a held-out group has one row.
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
# Field → prefixes of its tags. Rows with the tag `NotAddress` are left out.
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
NEAR_DUPLICATE = 0.7  # |a ∩ b| / |a ∪ b| of two addresses' words that makes them near-duplicates


def read_labeled(path: Path) -> dict[str, str]:
    """Return address → compact JSON of its fields, in the order of the address; each address once.

    Args:
        path: labeled.xml.
    """
    from xml.etree import ElementTree  # imported here to keep `import minilora` light

    pairs: dict[str, str] = {}
    for address in ElementTree.parse(path).getroot().findall("AddressString"):
        words = [(word.tag, (word.text or "").strip()) for word in address]
        tags = [tag for tag, _ in words]
        if not words or "NotAddress" in tags:
            continue
        fields: dict[str, list[str]] = {}
        for tag, text in words:
            fields.setdefault(_field(tag), []).append(text)
        record = {field: " ".join(texts).strip(" ,;") for field, texts in fields.items()}
        answer = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
        pairs.setdefault(" ".join(text for _, text in words), answer)
    return pairs


def address(test_rows: int = 200, seed: int = 0) -> Task:
    """Return the task: 1,236 rows to train on next to the default 200 held out.

    Args:
        test_rows: number of held-out rows.
        seed: seed of the split; equal arguments give equal tasks.
    """
    return make_task(read_labeled(fetch(SDIST)), test_rows, seed)


def make_task(pairs: dict[str, str], test_rows: int, seed: int) -> Task:
    """Group near-duplicates, then split by group.

    Args:
        pairs: address → JSON.
        test_rows: number of held-out rows.
        seed: seed of the split.
    """
    groups = []
    for texts in near_duplicates(list(pairs)):
        groups.append([chat_row(INSTRUCTION, text, pairs[text]) for text in texts])
    train, test = split_by_group(groups, test_rows, seed)
    source = f"{SDIST.project} {SDIST.version}, training/labeled.xml (MIT)"
    return Task("address", train, test, None, source)


def near_duplicates(texts: list[str], threshold: float = NEAR_DUPLICATE) -> list[list[str]]:
    """Return the texts in groups of near-duplicates, joined also through a third text.

    Args:
        texts: the addresses.
        threshold: share of common words that makes two texts near-duplicates.
    """
    words = [_masked_words(text) for text in texts]
    pairs = []
    for i, mine in enumerate(words):
        for j in range(i):
            if len(mine & words[j]) >= threshold * len(mine | words[j]):
                pairs.append((i, j))
    groups = []
    for numbers in connected(len(texts), pairs):
        groups.append([texts[i] for i in numbers])
    return groups


def _masked_words(text: str) -> frozenset[str]:
    """Return the set of words, every number replaced by 0."""
    masked = re.sub(r"\d+", "0", text.lower())
    return frozenset(re.findall(r"[a-z0]+", masked))


def _field(tag: str) -> str:
    for field, beginnings in FIELDS.items():
        if tag.startswith(beginnings):
            return field
    raise ValueError(f"the address tag {tag!r} belongs to no field; the fields are {list(FIELDS)}")
