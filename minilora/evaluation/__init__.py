"""Evaluation: losses, answers and their metrics, and the sample model and tasks."""
