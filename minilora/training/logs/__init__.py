"""The record of a run: its log, its facts, and the code that follows its steps.

metrics_log.py   log.jsonl and the progress bar
trackers.py      TensorBoard, W&B and trackio
"""
