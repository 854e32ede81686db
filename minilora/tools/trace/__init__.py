"""Every intermediate of LoRA and QLoRA by name, while a model runs.

run.py       trace: the context manager, and the choice of layers
forward.py   the equations of a layer, step by step
nf4.py       the steps between a weight and its 4 bits
steps.py     the recorded steps, and their table
"""
