"""Training on answers that the model samples itself: GRPO, on-policy distillation.

rollouts.py   one step's answers: sample, judge, read log p again
report.py     the report of a step: figures, and a table of answers

The losses are in minilora/losses; the sampling is in generation/rollouts.py.
"""
