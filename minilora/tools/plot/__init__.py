"""Pictures of weights, batches, runs and memory, by matplotlib (pip install -e '.[plot]').

Each function returns a matplotlib Figure, and saves it if `path` is given (.svg, .png or .pdf). No
function shows or keeps a figure; in a notebook, `%matplotlib inline` displays the last value of a cell.

levels.py    the codebook and its error; a histogram of weights
layers.py    spectra of adapters; the error of merging
batch.py     packed rows and their attention mask
machine.py   memory by part; the roofline
logs.py      curves of runs
style.py     colours and sizes that all pictures share
"""

from minilora.tools.plot.batch import packed
from minilora.tools.plot.layers import merge_error, spectra
from minilora.tools.plot.levels import codebook, histogram
from minilora.tools.plot.logs import runs
from minilora.tools.plot.machine import memory, roofline

__all__ = [
    "codebook",
    "histogram",
    "memory",
    "merge_error",
    "packed",
    "roofline",
    "runs",
    "spectra",
]
