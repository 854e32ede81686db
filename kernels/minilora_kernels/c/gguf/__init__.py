"""CPU kernels for the quantised types of GGUF.

blocks.h      the blocks of each type, decoded in fp32
dequantize.c  a matrix -> fp32 or bf16
multiply.c    a few tokens through a matrix, without a dense W
call.py       calls of the compiled code
"""
