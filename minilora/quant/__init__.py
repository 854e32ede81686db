"""The frozen base in 4 bits.

nf4_linear.py       NF4Linear: the 4-bit layer, and the backward pass that dequantises again
quantize_model.py   quantize_model: replace the linear layers of a model
storage.py          the storage of a base: dense, or the kind of its 4 bits
fingerprint.py      hashes that identify a weight
"""
