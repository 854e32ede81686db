"""Merging of adapters into weights, and arithmetic on adapters.

changes.py      the change of one layer's weight; `weight` of a layer with active adapters
merge.py        merge: W + s · B A in a new model; dequantized_weights
four_bits.py    rounding of a merged weight to the 4-bit codes of its base
arithmetic.py   AdapterWeights: adapters as values, sums and truncation
combine.py      combine_adapters: linear, SVD, TIES, DARE
"""
