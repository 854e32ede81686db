"""Pictures of what the library holds, by matplotlib (pip install 'minilora[plot]'), all in one look: style.py.

Each function takes things of the library, returns a matplotlib Figure, and saves it if `path` is given (.svg, .png or
.pdf). Nothing is shown or kept by itself; in a notebook, `%matplotlib inline` displays what a cell ends in.
"""

from minilora.tools.plot.batch import packed
from minilora.tools.plot.layers import merge_error, spectra
from minilora.tools.plot.levels import codebook, histogram
from minilora.tools.plot.logs import runs
from minilora.tools.plot.machine import memory, roofline

__all__ = ["codebook", "histogram", "memory", "merge_error", "packed", "roofline", "runs", "spectra"]
