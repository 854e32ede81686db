"""What moves a run that asks for more: moments in 8 bits, several processes, a token's step as one CUDA graph.

Opened by the options that name them.
"""
