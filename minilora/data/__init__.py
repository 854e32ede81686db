"""Data: from rows to batches.

read_rows.py        datasets and files → rows
sources/            columns of other names, conversations of two columns, data sets of the Hub
formats.py          rows of any known shape → conversations or plain text
chat/               messages in one form; the text of a conversation, and the parts that it lacks
chat_template.py    conversation → text
tokenizer.py        text ↔ token ids
loss_mask.py        conversation → token ids and labels
prompt.py           prompt → token ids
dataset.py          a whole dataset, with a report (report.py)
dataset_cache.py    the same in files, for datasets of any size
packing.py          many short examples in one row
collate.py          examples → one padded batch
mixture.py          several datasets by weight; a split into train and test
preview.py          rows token by token, with facts about the dataset (dataset_facts.py)
"""

from minilora.data.chat_template import ALPACA_TEMPLATE
from minilora.data.collate import collate
from minilora.data.dataset import EncodedDataset, encode_dataset
from minilora.data.formats import SHAPES, Chat, RawText, Text, as_messages
from minilora.data.loss_mask import IGNORE, Example, encode_row
from minilora.data.packing import PackedDataset, pack
from minilora.data.prompt import encode_prompt, end_of_turn, split_prompt
from minilora.data.read_rows import read_dataset
from minilora.data.report import DataReport
from minilora.data.sources.load_dataset import load_dataset
from minilora.data.tokenizer import AnyTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "ALPACA_TEMPLATE",
    "IGNORE",
    "SHAPES",
    "AnyTokenizer",
    "Chat",
    "DataReport",
    "EncodedDataset",
    "Example",
    "PackedDataset",
    "RawText",
    "Text",
    "Tokenizer",
    "as_messages",
    "collate",
    "encode_dataset",
    "encode_prompt",
    "encode_row",
    "end_of_turn",
    "load_dataset",
    "load_tokenizer",
    "pack",
    "read_dataset",
    "split_prompt",
]
