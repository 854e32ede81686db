"""The frozen layers that adapters correct: which layers can be one, and their dense weight.

dense_weight.py    the dense weight W of a layer, for every kind of storage that can be read
linear_forward.py  which linear layers compute W x + b, and which compute something else
"""
