"""A real model, real tasks and honest baselines for demos, examples and tests, with or without the Hub.

Everything is fetched when asked for, pinned by size and sha256, and kept in a cache folder (see `download`).
Imported eagerly on purpose: functions named like their files would else be hidden by the modules. It is cheap, for
only the standard library comes with it.
"""

from minilora.evaluation.metrics import json_valid
from minilora.evaluation.samples.address import address
from minilora.evaluation.samples.baselines import majority_class, nearest_neighbour
from minilora.evaluation.samples.icd10 import icd10
from minilora.evaluation.samples.prose import prose
from minilora.evaluation.samples.scoring import field_f1
from minilora.evaluation.samples.smollm2 import smollm2
from minilora.evaluation.samples.task import Task

__all__ = [
    "Task",
    "address",
    "field_f1",
    "icd10",
    "json_valid",
    "majority_class",
    "nearest_neighbour",
    "prose",
    "smollm2",
]
