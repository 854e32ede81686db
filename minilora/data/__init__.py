"""From a dataset to batches: formats → messages → template → tokens and labels → padded batch."""

from minilora.data.chat_template import ALPACA_TEMPLATE
from minilora.data.collate import collate
from minilora.data.dataset import EncodedDataset, encode_dataset
from minilora.data.formats import SHAPES, Chat, RawText, Text, as_messages, read_dataset
from minilora.data.loss_mask import IGNORE, Example, encode_row
from minilora.data.prompt import encode_prompt, end_of_turn, split_prompt
from minilora.data.report import DataReport
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
    "RawText",
    "Text",
    "Tokenizer",
    "as_messages",
    "collate",
    "encode_dataset",
    "encode_prompt",
    "encode_row",
    "end_of_turn",
    "load_tokenizer",
    "read_dataset",
    "split_prompt",
]
