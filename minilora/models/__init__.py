"""The decoder, and loading and saving of checkpoints.

decoder.py              Llama, Mistral, Qwen, SmolLM3 and Gemma 3 in one file
config.py               the shape of a decoder, from config.json
families.py             Llama, Mistral, Qwen, Gemma: their differences
rope_config.py          rotary positions and their frequencies
masks.py                the attention mask of each kind of layer
kv_cache.py             keys and values of earlier tokens
padded_batch.py         rows of different lengths, read into a cache
loader.py               load_model: tensor by tensor, quantised on the way
checkpoint.py           safetensors files, sharded or not
save.py                 save_model: a folder for transformers, dense or in 4 bits
safetensors_writer.py   the safetensors files, tensor by tensor
resize.py               resize_embeddings: more tokens
parameter_count.py      trainable, total and stored parameters
gguf/                   llama.cpp's file format
"""
