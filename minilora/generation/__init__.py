"""Text generation: sampling, batches, continuous batching, CUDA graphs.

generate.py         generate: prompts → texts, in batches
stream.py           stream_generate: one prompt → the pieces of its answer
config.py           GenerationConfig: the options of generate
sampling.py         the choice of the next token
penalties.py        rules that change the logits before
scores.py           log-probabilities of tokens
single_token.py     faster products with one token on a CPU
engine.py           continuous batching: requests join and leave a running batch
sequence.py         one request and its answer as it grows
decoding_batch.py   the caches of several requests as one
structured.py       answers that follow a JSON schema
json_schema.py      the forms of a schema
rollouts.py         groups of sampled answers to each prompt, with log p
cuda_graph.py       a token's step as one CUDA graph
"""
