"""A tokenizer from a .gguf file, which stores tokens, merges and special ids but no tokenizer.json.

There are two kinds, which tokenizer.ggml.model names:

    gpt2     byte-level BPE: cuts a text into words, then merges the listed pairs by their rank
    llama    SentencePiece's BPE (Llama 2, Mistral): spaces become ▁, and the text is one word; any
             two neighbours that make a token are merged, the best score first; a character that is
             not a token becomes its UTF-8 bytes

A gpt2 file stores only the name of its rule for words, and a llama file lists no pairs. A wrong
rule or another order of merges gives wrong ids without an error, so this module raises an error for
everything that it cannot reproduce. tokenizer_export.py is the other direction.
"""

from pathlib import Path
from typing import Any

from minilora.models.gguf.read import TokenizerFields, read_tokenizer_fields
from minilora.models.gguf.score_merges import merges_by_score

# The regular expression that finds the words of Llama 3
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The words of gpt-oss: as Llama 3's, but a word also ends before a capital letter
_GPT4O_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_GPT4O_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT4O_START = r"[^\r\n\p{L}\p{N}]?"
_GPT4O_END = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O = (
    f"{_GPT4O_START}{_GPT4O_UPPER}*{_GPT4O_LOWER}+{_GPT4O_END}"
    f"|{_GPT4O_START}{_GPT4O_UPPER}+{_GPT4O_LOWER}*{_GPT4O_END}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The words of DeepSeek V3, after its earlier cuts
DEEPSEEK_V3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Name of a pre-tokenizer -> its regular expression; None for GPT-2's, which `tokenizers` has
WORDS = {
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": LLAMA3,
    "qwen2": LLAMA3.replace("{1,3}", ""),
    "gpt-4o": GPT4O,
    "deepseek-v3": DEEPSEEK_V3,
}
# Expressions whose matches are cut out before the words: DeepSeek's digits, and Chinese and kana
EARLIER_CUTS = {"deepseek-v3": (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+")}
# Token types
NORMAL = 1
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5
BYTE = 6
WHOLE = (UNKNOWN, CONTROL, USER_DEFINED)  # found in the text before it is cut or merged
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]  # llama's tokens for the bytes

Parts = tuple[Any, dict[str, str], str | None]  # backend, special tokens, chat template


def from_gguf(path: Path) -> Parts:
    """Build the tokenizer of a .gguf file.

    Args:
        path: The .gguf file.

    Returns:
        The `tokenizers` backend, the special tokens by name, and the chat template or None.

    Raises:
        ValueError: If the tokenizer is absent, damaged, of neither kind, or has an unknown
            pre-tokenizer.
    """
    return build(read_tokenizer_fields(path), str(path))


def build(fields: TokenizerFields, where: str) -> Parts:
    """Build a tokenizer from the fields of a GGUF file.

    Args:
        fields: The fields of the tokenizer.
        where: Name of the file in error messages.

    Returns:
        The `tokenizers` backend, the special tokens by name, and the chat template or None.

    Raises:
        ValueError: If the tokenizer is damaged, of neither kind, or has an unknown pre-tokenizer.
    """
    from tokenizers import AddedToken

    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if fields.model not in builders:
        raise ValueError(
            f"{where}: expected a byte-level BPE tokenizer ('gpt2' in GGUF's words) or "
            f"SentencePiece's ('llama'), got {fields.model!r}. Load the tokenizer of the original "
            "checkpoint instead."
        )
    vocabulary = {token: number for number, token in enumerate(fields.tokens)}
    if len(vocabulary) < len(fields.tokens):
        raise ValueError(f"{where}: its tokenizer is damaged: two of its tokens are the same.")
    backend = builders[fields.model](fields, vocabulary, where)
    added = []
    for token, kind in zip(fields.tokens, fields.token_types, strict=True):
        if kind in WHOLE:
            special = kind != USER_DEFINED
            added.append(AddedToken(token, normalized=False, special=special))
    backend.add_tokens(added)  # one call: each one builds the index of all added tokens again

    special_tokens = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        number = getattr(fields, f"{name}_id")
        if number is not None:
            special_tokens[name] = fields.tokens[number]
    bos = special_tokens.get("bos_token") if fields.add_bos else None
    eos = special_tokens.get("eos_token") if fields.add_eos else None
    _add_bos_and_eos(backend, bos, eos)
    return backend, special_tokens, fields.chat_template


def cut_words(backend: Any, pre: str) -> None:
    """Let the backend cut a text into words as a named pre-tokenizer does.

    Args:
        backend: A `tokenizers.Tokenizer`, changed in place.
        pre: Name of the pre-tokenizer, a key of WORDS.
    """
    from tokenizers import Regex, normalizers, pre_tokenizers

    words = WORDS[pre]
    steps = []
    for expression in EARLIER_CUTS.get(pre, ()):
        steps.append(pre_tokenizers.Split(Regex(expression), "isolated"))
    if words is not None:
        steps.append(pre_tokenizers.Split(Regex(words), "isolated"))
    if pre == "smollm":
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()


def escape_spaces(backend: Any, prefix: bool) -> None:
    """Let the backend write spaces as ▁, as llama.cpp does.

    Args:
        backend: A `tokenizers.Tokenizer`, changed in place.
        prefix: Put one more ▁ before a text.
    """
    from tokenizers import normalizers

    steps = []
    if prefix:
        steps.append(normalizers.Prepend("▁"))
    steps.append(normalizers.Replace(" ", "▁"))
    backend.normalizer = normalizers.Sequence(steps)


def _byte_level(fields: TokenizerFields, vocabulary: dict[str, int], where: str) -> Any:
    """Build a byte-level BPE backend from the listed merges."""
    from tokenizers import Tokenizer, decoders, models

    if fields.pre not in WORDS:
        known = ", ".join(WORDS)
        raise ValueError(f"{where}: unknown pre-tokenizer {fields.pre!r}. Expected one of {known}.")
    merges = []
    for merge in fields.merges:
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocabulary.keys():
            raise ValueError(
                f"{where}: its tokenizer is damaged: the merge {(left, right)} does not join two "
                "of its tokens to a third."
            )
        merges.append((left, right))
    ignore_merges = fields.pre == "llama-bpe"
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges)
    backend = Tokenizer(model)
    cut_words(backend, fields.pre)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(fields: TokenizerFields, vocabulary: dict[str, int], where: str) -> Any:
    """Build a SentencePiece BPE backend, whose merges follow from the tokens and their scores."""
    from tokenizers import Tokenizer, decoders, models

    if not vocabulary.keys() >= set(BYTES):
        raise ValueError(
            f"{where}: SentencePiece without a token for each of the bytes <0x00> to <0xFF>: "
            "not supported."
        )
    scores = {}
    for token, kind, score in zip(fields.tokens, fields.token_types, fields.scores, strict=True):
        if kind not in WHOLE and len(token) > 1:
            scores[token] = score
    merges = merges_by_score(scores, vocabulary, where)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    escape_spaces(backend, fields.add_space_prefix)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.add_space_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    return backend


def _add_bos_and_eos(backend: Any, bos: str | None, eos: str | None) -> None:
    """Let encode(text) put BOS before the text and EOS after it; None leaves it out."""
    from tokenizers.processors import TemplateProcessing

    special_tokens = []
    for token in (bos, eos):
        if token:
            special_tokens.append((token, backend.token_to_id(token)))
    if special_tokens:
        parts = [part for part in (bos, "$A", eos) if part]
        backend.post_processor = TemplateProcessing(single=parts, special_tokens=special_tokens)
