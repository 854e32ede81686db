"""Proves that the README's map is the territory: its annotated tree is the disk, its reading order leads to files, and
each of its claims about peers to a test."""

import re

from helpers.source import ALL_FILES, LIBRARY, LIBRARY_FILES, text


def fenced_tree(readme: str) -> list[str]:
    """Python files named by the README's tree: the fenced block with most of them, folders by indentation.

    A line is `name.py  caption` or `folder/  caption`, indented by spaces or box characters.
    """
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", readme, flags=re.M | re.S)
    block = max(blocks, key=lambda text: len(re.findall(r"^\W*[\w/]+\.py\s", text, flags=re.M)), default="")
    files, stack = [], []  # stack: (indent, folder)
    for line in block.splitlines():
        if not (found := re.match(r"[\s│├└─|`+-]*", line)) or not line[found.end() :].split():
            continue
        indent, name = found.end(), line[found.end() :].split()[0]
        while stack and stack[-1][0] >= indent:
            stack.pop()
        path = "/".join([*(folder for _, folder in stack), name.rstrip("/")])
        if name.endswith("/"):
            stack.append((indent, name.rstrip("/")))
        elif name.endswith(".py"):
            files.append(path)
    return files


def test_the_tree_parser():
    """Both ways to draw it, a caption that names a file, and a folder left again."""
    plain = "```\nminilora/          the library\n  lora.py          as inject.py needs it\n  models/\n"
    plain += (
        "    rope.py        turns\n  quant.py         4 bits\nkernels/minilora_kernels/\n  cpu.py           fast\n```\n"
    )
    boxes = "```text\nminilora/\n├── lora.py    a\n├── models/    b\n│   └── rope.py    c\n└── quant.py    d\n"
    boxes += "kernels/minilora_kernels/\n└── cpu.py    e\n```\n"
    want = ["minilora/lora.py", "minilora/models/rope.py", "minilora/quant.py", "kernels/minilora_kernels/cpu.py"]
    assert fenced_tree(plain) == fenced_tree(boxes) == want


def test_the_readme_tree_is_the_disk():
    drawn = fenced_tree(text("README.md"))
    drawn = [path for path in drawn if path.startswith(LIBRARY)]
    assert len(drawn) == len(set(drawn)), "a file stands in the tree twice"
    missing = {path for path in LIBRARY_FILES if not path.endswith("__init__.py")} - set(drawn)
    assert not missing, f"not in the README's tree: {sorted(missing)}"
    assert set(drawn) <= set(LIBRARY_FILES), f"not on the disk: {sorted(set(drawn) - set(LIBRARY_FILES))}"


def test_the_readme_numbers_the_reading_order():
    section = re.search(r"^#+ [^\n]*\bread(?:ing)?\b.*?(?=^#+ |\Z)", text("README.md"), flags=re.M | re.S | re.I)
    assert section, "the README has no heading about reading"
    steps = re.findall(r"^\s*\d+\. (.*)", section[0], flags=re.M)
    named = [set(re.findall(r"([\w./]+\.py)", step)) for step in steps]
    assert len(steps) >= 5 and all(named), "number the files to read, at least five"
    for name in set().union(*named):
        assert any(path == name or path.endswith("/" + name) for path in ALL_FILES), f"{name} is not on the disk"


def test_every_claim_about_peers_cites_its_test():
    rows = [line.split("|") for line in text("docs/peers.md").splitlines() if line.startswith("| ")][1:]
    for *_, cited, _ in rows:
        names = re.findall(r"`(test_\w+\.py)`", cited)
        assert names and all(any(path.endswith(f"/{name}") for path in ALL_FILES) for name in names), cited
    assert len(rows) >= 10
