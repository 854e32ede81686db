"""Fused operations of a model: reference in PyTorch, fast form, and its backward pass."""
