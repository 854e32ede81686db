"""The memory of a run, computed from config.json alone, and the run that fits a card.

plan.py       plan_memory: bytes by part
base.py       the config of the base and the storage of its layers
parts.py      names of the parts
step.py       one training step, layer by layer
meter.py      bytes of tensors while code runs without data
fit.py        the largest run that fits, and the smallest change that makes one fit
shortage.py   the note on an out-of-memory error
"""
