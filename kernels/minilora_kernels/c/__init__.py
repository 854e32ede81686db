"""C kernels for CPUs, one source an operation, compiled as libraries at first use.

compiler.py   compile, cache and load
bindings.py   rms_norm, rope, swiglu, attention and cross_entropy
nf4.py        nf4_dequantize and nf4_gemv
gguf/         the types of GGUF files
"""
