"""LoRA, the method: the layer, its configuration, injection into models, and adapters.

layer.py             LoRALayer: h = W x + s · B A x. Read this file first.
config.py            LoRAConfig: the layers to adapt, and how
targets.py           find the layers that a config names
inject.py            replace these layers, freeze the rest, undo it
registry.py          the configs and layers of a model's adapters
embedding_conv.py    adapters of embeddings and convolutions
fused_linear.py      W x + s · B A x as one step, with its backward pass
active.py            choose the active adapters
batched.py           a batch whose rows have different adapters
low_rank.py          decompositions of low-rank products
base_layers/         the frozen layers: their dense weight, and which layers can have an adapter
merging/             merge adapters into weights; arithmetic on adapters
trained_parts/       modules, biases and tokens that train together with an adapter
files/               adapter files in PEFT's format; the base that they belong to
variants/            DoRA, PiSSA, LoftQ
"""
