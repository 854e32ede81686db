"""The record of a run: its log, its facts, and the code that follows its steps.

metrics_log.py   log.jsonl and the progress bar
trackers.py      TensorBoard, W&B and trackio
callbacks.py     the caller's code after a step, an evaluation and a save
result.py        TrainResult
run_facts.py     run.json: every option, the model, the data, the versions
"""
