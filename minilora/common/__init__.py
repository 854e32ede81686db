"""Helpers for the whole library.

atomic_files.py   atomic writes; safetensors files
suggestions.py    errors with the nearest names
options.py        checked fields of a dataclass
modules.py        modules of a model and their paths
sequences.py      types and lengths of sequences; widths of columns
"""

from minilora.common.atomic_files import (
    naming,
    read_tensors,
    together,
    whole,
    write_tensors,
    write_text,
)
from minilora.common.modules import (
    ends_with,
    ends_with_any,
    is_conv1d,
    output_layer,
    tied_modules,
    within,
)
from minilora.common.options import check_options, option
from minilora.common.sequences import (
    column_widths,
    comma_separated,
    is_list_of,
    order_by_length,
)
from minilora.common.suggestions import nearest, unknown

__version__ = "0.1.0"

__all__ = [
    "check_options",
    "column_widths",
    "comma_separated",
    "ends_with",
    "ends_with_any",
    "is_conv1d",
    "is_list_of",
    "naming",
    "nearest",
    "option",
    "order_by_length",
    "output_layer",
    "read_tensors",
    "tied_modules",
    "together",
    "unknown",
    "whole",
    "within",
    "write_tensors",
    "write_text",
]
