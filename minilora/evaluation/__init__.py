"""Evaluation: losses, answers and their metrics, and the sample model and tasks.

evaluate.py          evaluate: loss, perplexity, greedy answers
metrics.py           exact match, token F1, JSON, and the names of metrics
scores.py            Scores, the result: figures, rows, comparison with other scores
read_once.py         rows that are read once, for the loss, the likeliest label and the answer
likeliest_label.py   the likeliest of a closed set of answers
code_execution.py    pass_at_1: run generated code with its tests
samples/             ml.samples: a real model, real tasks, baselines without a model
"""
