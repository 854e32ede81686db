"""Merging adapters into weights, and arithmetic on adapters."""
