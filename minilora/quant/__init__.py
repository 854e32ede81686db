"""The frozen base in few bits.

quantized_linear.py the protocol of quantised layers; their backward pass dequantises again
nf4_linear.py       NF4Linear: the 4-bit layer of QLoRA
gguf_linear.py      GGUFLinear: a layer in the bytes of a GGUF file
gguf_embedding.py   GGUFEmbedding: an embedding in the bytes of a GGUF file
quantize_model.py   quantize_model: replace the linear layers of a model
storage.py          the storage of a base: dense, or the kind of its bits
fingerprint.py      hashes that identify a weight
"""
