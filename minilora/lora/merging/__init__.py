"""Merging of adapters into weights, and arithmetic on adapters."""
