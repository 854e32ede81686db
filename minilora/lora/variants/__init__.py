"""Variants of LoRA.

base.py                  the parts that variants share
choose.py                the variant that a config names
dora.py                  DoRA: trainable lengths of the rows of W
dora_embedding_conv.py   DoRA for embeddings and convolutions
pissa.py                 PiSSA: the adapter starts as the principal part of W
loftq.py                 LoftQ: the adapter starts as the rounding error of W in 4 bits
"""
