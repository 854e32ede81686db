"""The NF4 format: codebook, reference, weight, and the custom ops."""
