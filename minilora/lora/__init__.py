"""LoRA, the method: the layer, its configuration, injection into models, and adapters.

layer.py             LoRALayer: h = W x + s · B A x. Read this file first.
config.py            LoRAConfig: the layers to adapt, and how
targets.py           find the layers that a config names
inject.py            replace these layers, freeze the rest, undo it
registry.py          the configs and layers of a model's adapters
modules_to_save.py   modules and biases that train together with an adapter
trained_tokens.py    rows of single tokens that train
vocabulary.py        the embedding and output layer, and a resize of them
trained_state.py     their names in state dicts
embedding_conv.py    adapters of embeddings and convolutions
fused_linear.py      W x + s · B A x as one step, with its backward pass
active.py            choose the active adapters
batched.py           a batch whose rows have different adapters
low_rank.py          decompositions of low-rank products
base_layers/         the frozen layers: their dense weight, and which layers can have an adapter
merging/             merge adapters into weights; arithmetic on adapters
files/               adapter files in PEFT's format; the base that they belong to
variants/            DoRA, PiSSA, LoftQ
"""
