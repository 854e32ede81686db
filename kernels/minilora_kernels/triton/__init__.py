"""Triton kernels for GPUs, one file an operation.

launch.py           start a kernel; its tile sizes
nf4_dequantize.py   4-bit codes → weight
nf4_quantize.py     weight → 4-bit codes
nf4_gemv.py         one token through a 4-bit layer
nf4_matmul.py       2 to 64 tokens through a 4-bit layer
rms_norm.py         RMSNorm
rope.py             rotary positions
swiglu.py           SwiGLU and GeGLU
cross_entropy.py    loss and gradient of a chunk of logits
adamw_8bit.py       AdamW with moments in 8 bits
"""
