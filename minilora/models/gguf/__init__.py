"""GGUF, the file format of llama.cpp: reading and writing.

These modules are imported only for a .gguf file, except adapter.py.

adapter.py           an adapter as one file, without its base
architectures.py     names, row order and norms of each architecture
config.py            the decoder config of a file
header.py            the pairs and records before a file's data
keep.py              the layers of a model in the bytes of a file
read.py              a file as a checkpoint
score_merges.py      the order of SentencePiece's merges
tokenizer.py         the tokenizer of a file
tokenizer_export.py  the fields that a file stores for a tokenizer
write.py             a model and its tokenizer as one file
"""
