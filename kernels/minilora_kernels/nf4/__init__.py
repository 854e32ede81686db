"""The NF4 format.

codebook.py     the 16 levels, and the map of double quantisation
reference.py    the specification: quantise and dequantise, bit by bit
weight.py       NF4Weight: packed codes and scales
state_dict.py   the checks of a weight that is read from a state dict
operands.py     the checks of the tensors that an op takes
torch_cpu.py    the fast implementation in PyTorch for CPUs
functional.py   the custom operators, which choose an implementation
"""
