"""Helpers for the whole library.

atomic_files.py   atomic writes; safetensors and JSON files
suggestions.py    errors with the nearest names
options.py        checked fields of a dataclass
modules.py        modules of a model and their paths
left_out.py       the matrices that a step over a whole model leaves out
sequences.py      types and lengths of sequences, batches of them; widths of columns
extras.py         errors for optional packages that are missing
notebook.py       output in notebooks: notes, tables, curves
progress.py       progress of long tasks: on a terminal, in a notebook, in a log file
wrappers.py       models inside torch.compile, DDP, FSDP, PEFT, and around their wrapped layers
"""

from minilora.common.atomic_files import (
    atomic_write,
    atomic_writes,
    check_writable,
    path_in_errors,
    read_json,
    read_tensors,
    write_tensors,
    write_text,
)
from minilora.common.left_out import LeftOut, left_out
from minilora.common.modules import (
    ends_with,
    ends_with_any,
    is_conv1d,
    is_within,
    output_layer,
    tied_modules,
)
from minilora.common.options import Options, check_options, option
from minilora.common.sequences import (
    batch_tokens,
    batches_by_tokens,
    column_widths,
    comma_separated,
    is_list_of,
    order_by_length,
)
from minilora.common.suggestions import nearest, unknown_name
from minilora.common.wrappers import (
    get_submodule,
    named_modules,
    named_parameters,
    plain_key,
    set_submodule,
    unwrap_model,
)

__version__ = "0.1.0"

__all__ = [
    "LeftOut",
    "Options",
    "atomic_write",
    "atomic_writes",
    "batch_tokens",
    "batches_by_tokens",
    "check_options",
    "check_writable",
    "column_widths",
    "comma_separated",
    "ends_with",
    "ends_with_any",
    "get_submodule",
    "is_conv1d",
    "is_list_of",
    "is_within",
    "left_out",
    "named_modules",
    "named_parameters",
    "nearest",
    "option",
    "order_by_length",
    "output_layer",
    "path_in_errors",
    "plain_key",
    "read_json",
    "read_tensors",
    "set_submodule",
    "tied_modules",
    "unknown_name",
    "unwrap_model",
    "write_tensors",
    "write_text",
]
