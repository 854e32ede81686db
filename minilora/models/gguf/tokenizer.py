"""A tokenizer rebuilt from a .gguf file, which keeps tokens, merges and special ids but no tokenizer.json; and back.

Two kinds, by tokenizer.ggml.model:

    gpt2     byte-level BPE: cuts a text into words, then merges the listed pairs, first pair first
    llama    SentencePiece's BPE (Llama 2, Mistral): spaces become ▁ and the whole text is one word; any two neighbours
             that make a token are merged, best score first; a character that is no token becomes its UTF-8 bytes

How gpt2 cuts words is not in the file, only its name is, and llama lists no pairs. A wrong cut or another order of
merges gives wrong ids without an error, so what is not known to be the same raises, in both directions.
"""

import json
import math
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from minilora.models.gguf.read import TokenizerFields, read_tokenizer_fields

# name: the regex that finds the words, None for GPT-2's own (which `tokenizers` has built in)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = {"gpt-2": None, "smollm": None, "llama-bpe": LLAMA3, "qwen2": LLAMA3.replace("{1,3}", "")}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # token types
WHOLE = (UNKNOWN, CONTROL, USER_DEFINED)  # found in the text as they are, before anything is cut or merged
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]  # the tokens of llama's bytes
_LONGEST = 128  # characters of a token that is merged; SentencePiece makes them of up to 16

Parts = tuple[Any, dict[str, str], str | None]  # what a Tokenizer is made of: backend, special tokens, chat template


def from_gguf(path: Path) -> Parts:
    """The tokenizer of a .gguf file. ValueError: of neither kind, or a pre-tokenizer not known here."""
    return build(read_tokenizer_fields(path), str(path))


def build(fields: TokenizerFields, where: str) -> Parts:
    """A tokenizer from the fields of a GGUF file; `where` names the file in errors."""
    from tokenizers import AddedToken

    makers = {"gpt2": _byte_level, "llama": _sentencepiece}
    if fields.model not in makers:
        raise ValueError(
            f"{where}: expected a byte-level BPE tokenizer ('gpt2' in GGUF's words) or SentencePiece's ('llama'), got "
            f"{fields.model!r}. Load the tokenizer of the original checkpoint instead."
        )
    vocabulary = {token: number for number, token in enumerate(fields.tokens)}
    if len(vocabulary) < len(fields.tokens):
        raise ValueError(f"{where}: its tokenizer is damaged: two of its tokens are the same.")
    backend = makers[fields.model](fields, vocabulary, where)
    for token, kind in zip(fields.tokens, fields.token_types, strict=True):
        if kind in WHOLE:
            backend.add_tokens([AddedToken(token, normalized=False, special=kind != USER_DEFINED)])
    ids = {key: getattr(fields, f"{key}_id") for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    special = {key: fields.tokens[number] for key, number in ids.items() if number is not None}
    _surround(backend, special.get("bos_token") if fields.add_bos else None,
              special.get("eos_token") if fields.add_eos else None)  # fmt: skip
    return backend, special, fields.chat_template


def _byte_level(fields: TokenizerFields, vocabulary: dict[str, int], where: str) -> Any:
    from tokenizers import Tokenizer, decoders, models

    if fields.pre not in WORDS:
        raise ValueError(f"{where}: unknown pre-tokenizer {fields.pre!r}. Expected one of {', '.join(WORDS)}.")
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in fields.merges)]
    if lost := next((pair for pair in merges if not {*pair, "".join(pair)} <= vocabulary.keys()), None):
        raise ValueError(f"{where}: its tokenizer is damaged: the merge {lost} is not of its tokens.")
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=fields.pre == "llama-bpe"))
    _cut_words(backend, fields.pre)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(fields: TokenizerFields, vocabulary: dict[str, int], where: str) -> Any:
    """`tokenizers` wants the pairs listed: each way to cut each token into two, tokens in the order of their score."""
    from tokenizers import Tokenizer, decoders, models

    if not vocabulary.keys() >= set(BYTES):
        raise ValueError(
            f"{where}: SentencePiece without a token for each of the bytes <0x00> to <0xFF>: not supported."
        )
    tokens = zip(fields.tokens, fields.token_types, fields.scores, strict=True)
    pieces = {token: score for token, kind, score in tokens if kind not in WHOLE and len(token) > 1}
    if long := [token for token in pieces if len(token) > _LONGEST]:
        raise ValueError(f"{where}: its tokenizer is damaged: a token of {len(long[0])} characters.")
    ranked = sorted(pieces, key=lambda token: -pieces[token])
    cuts = ((token[:i], token[i:]) for token in ranked for i in range(1, len(token)))
    merges = [cut for cut in cuts if all(part in vocabulary or len(part) == 1 for part in cut)]
    if lost := next(("".join(cut) for cut in merges if not vocabulary.keys() >= set(cut)), None):
        raise ValueError(f"{where}: the token {lost!r} has a character that is no token: not supported.")
    made = list(dict.fromkeys("".join(cut) for cut in merges))
    if tied := next(((a, b) for a, b in pairwise(made) if pieces[a] == pieces[b]), None):
        raise ValueError(f"{where}: the tokens {tied} have one score: which comes first depends on the text.")
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    _escape_spaces(backend, fields.add_space_prefix)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * fields.add_space_prefix)
    return backend


def _cut_words(backend: Any, pre: str) -> None:
    """Let the backend cut a text into words as the pre-tokenizer of this name does."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    words = WORDS[pre]
    steps = [pre_tokenizers.Split(Regex(words), "isolated")] if words else []
    if pre == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True)]  # every digit a word
    steps += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()


def _escape_spaces(backend: Any, prefix: bool) -> None:
    """Let the backend write spaces as ▁, and one more before a text, as llama.cpp does."""
    from tokenizers import normalizers

    steps = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])


def to_fields(tokenizer: Any, size: int) -> TokenizerFields:
    """What a GGUF file of `size` embeddings keeps of a BPE tokenizer, byte-level or SentencePiece's, ours or
    transformers'.

    ValueError for another kind, words cut in a way that has no name here, more around a text than BOS and EOS, and
    merges or added tokens that llama.cpp would treat otherwise. One difference is only warned of: llama.cpp puts ▁
    before every text and behind every special token, a Metaspace not where a space is already ("always"), or only at
    the beginning ("first"); transformers' own Llama tokenizers are of this kind.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None) or getattr(tokenizer, "backend", None)
    state: Any = json.loads(backend.to_str()) if backend else {"model": {"type": type(tokenizer).__name__}}
    model, pre, prefix = next((way for way, manner in _ways() if manner == _manner(state)), (None, None, False))
    if model is None or pre is None:
        cut, change = (json.dumps(state.get(key))[:200] for key in ("pre_tokenizer", "normalizer"))
        raise ValueError(
            f"GGUF: expected byte-level BPE that cuts words as one of {', '.join(WORDS)}, or BPE with byte_fallback "
            f"that writes spaces as ▁, got {state['model']['type']} cut by {cut} after {change}. Save as safetensors "
            "and let llama.cpp's converter write the file, or leave the tokenizer out."
        )
    if prefix and not state["normalizer"]:
        scheme = state["pre_tokenizer"]["prepend_scheme"]
        warnings.warn(
            f"GGUF: llama.cpp puts ▁ before every text and behind every special token; this tokenizer ({scheme}) only "
            f"where no space is{' and a text begins' if scheme == 'first' else ''}. Their ids differ there.",
            stacklevel=5,  # the caller of save_model
        )
    vocabulary = {number: token for token, number in backend.get_vocab(with_added_tokens=True).items()}
    if max(vocabulary) >= size:
        raise ValueError(f"GGUF: the tokenizer has ids up to {max(vocabulary)}, the model {size} embeddings.")
    _check_added(backend, state["added_tokens"])
    ids = {f"{key}_token_id": getattr(tokenizer, f"{key}_token_id", None) for key in ("bos", "eos", "unk", "pad")}
    kinds = dict.fromkeys(vocabulary, NORMAL)
    kinds |= {token["id"]: CONTROL if token["special"] else USER_DEFINED for token in state["added_tokens"]}
    if model == "llama":
        kinds |= {backend.token_to_id(byte): BYTE for byte in BYTES} | {ids["unk_token_id"]: UNKNOWN}
    add_bos, add_eos = _around(backend, ids["bos_token_id"], ids["eos_token_id"])
    template = tokenizer.chat_template
    tokens = [vocabulary.get(i, f"[PAD{i}]") for i in range(size)]
    types = [kinds.get(i, UNUSED) for i in range(size)]
    merges = [tuple(merge) for merge in state["model"]["merges"]]
    return TokenizerFields(
        model=model,
        pre=pre,
        tokens=tokens,
        token_types=types,
        merges=[" ".join(merge) for merge in merges] if model == "gpt2" else [],
        scores=_scores(tokens, types, merges) if model == "llama" else [],
        **ids,
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=prefix,
        chat_template=template.get("default") if isinstance(template, dict) else template,
    )


def _scores(tokens: list[str], types: list[int], merges: list[Any]) -> list[float]:
    """-rank of the merge that makes each token from its own characters; below all of them where none does.

    llama.cpp merges any pair that makes a token, `tokenizers` the listed ones. On their way through any text both stay
    together as long as they do within each token: both make it, or both stop before. A token that merging leaves in
    two parts llama.cpp would make all the same: ValueError.
    """
    ranks, scores = {pair: rank for rank, pair in enumerate(merges)}, [0.0] * len(tokens)
    if not set(tokens) >= set(BYTES) or {part for pair in merges for part in pair} & set(BYTES):
        raise ValueError("GGUF: expected a token for each of the bytes <0x00> to <0xFF>, and no merges of them.")
    for number, token in enumerate(tokens):
        if types[number] in WHOLE:
            continue
        parts, last = list(token), len(merges) + number
        while len(parts) > 1:
            rank, i = min((ranks.get(pair, math.inf), i) for i, pair in enumerate(pairwise(parts)))
            if rank == math.inf:
                break
            parts[i : i + 2], last = [parts[i] + parts[i + 1]], rank
        if len(parts) == 2:
            raise ValueError(f"GGUF: llama.cpp would merge {parts} to the token {token!r}, which the merges do not do.")
        scores[number] = -float(last if len(parts) == 1 else len(merges) + number)
    return scores


def _check_added(backend: Any, added: list[dict[str, Any]]) -> None:
    """ValueError for an added token that takes spaces with it, or is not looked for in the text as it is."""
    change = backend.normalizer.normalize_str if backend.normalizer else str
    for token in added:
        text, flags = token["content"], [key for key in ("lstrip", "rstrip", "single_word") if token[key]]
        if flags or token["normalized"] and change(text) != text:
            raise ValueError(
                f"GGUF: llama.cpp finds the added token {text!r} wherever it stands, this tokenizer not "
                f"({', '.join(flags) or 'normalized'}). Add it again as AddedToken({text!r}, normalized=False)."
            )


def _around(backend: Any, bos: int | None, eos: int | None) -> tuple[bool, bool]:
    """Whether the tokenizer puts BOS before a text, and EOS behind."""
    plain, full = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    for around in ((False, False), (True, False), (False, True), (True, True)):
        if full == around[0] * [bos] + plain + around[1] * [eos]:
            return around
    raise ValueError(f"GGUF: the tokenizer makes {full} of {plain}: it can only put {[bos]} before and {[eos]} behind.")


def _manner(state: dict[str, Any]) -> Any:
    """What of a tokenizer.json decides how a text is cut into words; offsets do not."""
    cut, normal, model = state.get("pre_tokenizer") or {}, state.get("normalizer") or {}, state["model"]
    steps = [step | {"trim_offsets": None} for step in cut.get("pretokenizers", [cut])]
    flags = "byte_fallback ignore_merges dropout continuing_subword_prefix end_of_word_suffix".split()
    return model["type"], [bool(model.get(flag)) for flag in flags], steps, normal.get("normalizers", [normal])


def _ways() -> Iterator[tuple[tuple[str, str, bool], Any]]:
    """(model, pre, add_space_prefix) in GGUF's words, and the manner of a tokenizer that works so."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    for pre in WORDS:
        backend = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
        _cut_words(backend, pre)
        yield ("gpt2", pre, False), _manner(json.loads(backend.to_str()))
    for prefix in (False, True):
        backend = Tokenizer(models.BPE(byte_fallback=True))
        _escape_spaces(backend, prefix)
        yield ("llama", "default", prefix), _manner(json.loads(backend.to_str()))
    for scheme in ("never", "first", "always"):
        backend = Tokenizer(models.BPE(byte_fallback=True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        yield ("llama", "default", scheme != "never"), _manner(json.loads(backend.to_str()))


def _surround(backend, bos: str | None, eos: str | None) -> None:
    """Let encode(text) put BOS in front and EOS behind, where the file says so."""
    from tokenizers.processors import TemplateProcessing

    parts = [*filter(None, [bos, "$A", eos])]
    if len(parts) > 1:
        special = [(token, backend.token_to_id(token)) for token in parts if token != "$A"]
        backend.post_processor = TemplateProcessing(single=parts, special_tokens=special)
