"""Every intermediate of LoRA and QLoRA by name, while a model runs.

run.py     run layers one statement at a time
nf4.py     the steps between a weight and its 4 bits
steps.py   the recorded steps, and their table
"""
