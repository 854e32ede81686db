"""A tokenizer rebuilt from a .gguf file, which keeps tokens, merges and special ids but no tokenizer.json.

Byte-level BPE cuts a text into words before it merges, and how it cuts is not in the file, only its name is. A wrong
cut gives wrong ids without an error, so a name that is not listed here raises.
"""

from pathlib import Path
from typing import Any

from minilora.models.gguf import TokenizerFields, read_tokenizer_fields

# name: the regex that finds the words, None for GPT-2's own (which `tokenizers` has built in)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = {"gpt-2": None, "smollm": None, "llama-bpe": LLAMA3, "qwen2": LLAMA3.replace("{1,3}", "")}
CONTROL, USER_DEFINED = 3, 4  # token types that are matched whole in the text


Parts = tuple[Any, dict[str, str], str | None]  # what a Tokenizer is made of: backend, special tokens, chat template


def from_gguf(path: Path) -> Parts:
    """The tokenizer of a .gguf file. ValueError: not a byte-level BPE, or a pre-tokenizer not known here."""
    return build(read_tokenizer_fields(path), str(path))


def build(fields: TokenizerFields, where: str) -> Parts:
    """A tokenizer from the fields of a GGUF file; `where` names the file in errors."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    if fields.model != "gpt2":
        raise ValueError(
            f"{where}: expected a byte-level BPE tokenizer ('gpt2' in GGUF's words), got {fields.model!r}. "
            "Load the tokenizer of the original checkpoint instead."
        )
    if fields.pre not in WORDS:
        raise ValueError(f"{where}: unknown pre-tokenizer {fields.pre!r}. Expected one of {', '.join(WORDS)}.")
    vocabulary = {token: number for number, token in enumerate(fields.tokens)}
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in fields.merges)]
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=fields.pre == "llama-bpe"))
    words = WORDS[fields.pre]
    steps = [pre_tokenizers.Split(Regex(words), "isolated")] if words else []
    if fields.pre == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True)]  # every digit a word
    steps += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    if fields.pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    for token, kind in zip(fields.tokens, fields.token_types, strict=True):
        if kind in (CONTROL, USER_DEFINED):
            backend.add_tokens([AddedToken(token, normalized=False, special=kind == CONTROL)])
    ids = {key: getattr(fields, f"{key}_id") for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    special = {key: fields.tokens[number] for key, number in ids.items() if number is not None}
    _surround(backend, special.get("bos_token") if fields.add_bos else None,
              special.get("eos_token") if fields.add_eos else None)  # fmt: skip
    return backend, special, fields.chat_template


def _surround(backend, bos: str | None, eos: str | None) -> None:
    """Let encode(text) put BOS in front and EOS behind, where the file says so."""
    from tokenizers.processors import TemplateProcessing

    parts = [*filter(None, [bos, "$A", eos])]
    if len(parts) > 1:
        special = [(token, backend.token_to_id(token)) for token in parts if token != "$A"]
        backend.post_processor = TemplateProcessing(single=parts, special_tokens=special)
