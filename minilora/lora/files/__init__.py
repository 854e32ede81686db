"""Adapter files in PEFT's format, and the check of the base that they belong to.

find.py                the folder of an adapter, downloaded if necessary
source.py              the base and the adapter that a run folder stands for
save_load.py           save_adapter, load_adapter
adapter_tensors.py     the tensors of a file, and their names
file_config.py         the config of a file, without entries that match nothing
key_names.py           names of tensors in the files of wrapped models
vocabulary_tensors.py  the embedding and output layer of a grown vocabulary
base_check.py          fingerprints of the base and the tokenizer
label_names.py         label names of a classifier
"""
