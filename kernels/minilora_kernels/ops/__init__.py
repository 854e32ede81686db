"""Fused operations of a model: reference in PyTorch, fast form, and its backward pass.

rms_norm.py        RMSNorm
rope.py            rotary positions
swiglu.py          SwiGLU and GeGLU
residual.py        the residual sum
attention.py       causal attention, grouped heads, documents kept apart
cross_entropy.py   the loss of the output layer, without all logits at once
dispatch.py        the implementation of each operation on a device
mode.py            reference_ops: switch to the reference implementations
recompute.py       tensors that the backward pass computes again
"""
