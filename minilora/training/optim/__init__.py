"""Optimisation: parameter groups, the learning rate of each step, 8-bit AdamW and NEFTune noise."""
