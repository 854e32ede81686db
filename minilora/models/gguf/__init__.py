"""llama.cpp's file format, in both directions. These modules are imported only for a .gguf file.

header.py      the records before a file's data
read.py        a file as a checkpoint
tokenizer.py   its tokenizer
write.py       a model and its tokenizer as one file
"""
