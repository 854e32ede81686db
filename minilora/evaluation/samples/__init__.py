"""Samples: a real model, real tasks and baselines for demos, examples and tests, without the Hub.

Every file is fetched on demand, pinned by size and sha256, and kept in a cache folder.

smollm2.py     smollm2(): a chat model of 135 million parameters
icd10.py       icd10(): diagnosis → chapter, 22 answers
address.py     address(): US address → JSON
prose.py       prose(): general English text
task.py        Task, and the split by groups
baselines.py   baselines that need no model
scoring.py     scores of JSON answers
download.py    pinned files from PyPI

The functions are imported here at once, because functions and modules share names: the functions
must be bound last. These imports need the standard library only.
"""

from minilora.evaluation.metrics import json_valid
from minilora.evaluation.samples.address import address
from minilora.evaluation.samples.baselines import majority_class, nearest_neighbour
from minilora.evaluation.samples.download import FilePin, Pin, fetch
from minilora.evaluation.samples.icd10 import icd10
from minilora.evaluation.samples.prose import prose
from minilora.evaluation.samples.scoring import field_f1
from minilora.evaluation.samples.smollm2 import smollm2
from minilora.evaluation.samples.task import (
    Row,
    Task,
    answer_of,
    chat_row,
    connected,
    question_of,
    split_by_group,
)

__all__ = [
    "FilePin",
    "Pin",
    "Row",
    "Task",
    "address",
    "answer_of",
    "chat_row",
    "connected",
    "fetch",
    "field_f1",
    "icd10",
    "json_valid",
    "majority_class",
    "nearest_neighbour",
    "prose",
    "question_of",
    "smollm2",
    "split_by_group",
]
