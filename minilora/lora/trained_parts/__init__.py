"""Parts of a model that train besides the low-rank factors.

modules_to_save.py   whole modules and biases that train together with an adapter
fp32_copies.py       their copies, which train in fp32
trained_state.py     their names in state dicts
trained_tokens.py    rows of single tokens that train
vocabulary.py        the embedding and output layer, and a resize of them
"""
