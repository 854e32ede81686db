"""Optimisation.

gradients.py      the gradient of a call, over its micro-batches and processes
param_groups.py   parameters in groups of equal rate and decay
lr_schedule.py    the learning rate of each step
adamw_8bit.py     AdamW with moments in 8 bits
neftune.py        noise on embeddings
"""
