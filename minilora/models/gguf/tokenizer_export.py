"""The fields that a GGUF file stores for a tokenizer: the reverse of tokenizer.py.

llama.cpp has one rule for words for each name of a pre-tokenizer, and it merges any pair
that makes a token. A tokenizer whose ids llama.cpp would not reproduce is an error, with two
exceptions that are only warnings: the place of ▁ in front of a text (see `to_fields`), and added
tokens that the model has no embedding for.
"""

import json
import math
import warnings
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from minilora.models.gguf.read import TokenizerFields
from minilora.models.gguf.tokenizer import (
    BYTE,
    BYTES,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WHOLE,
    WORDS,
    cut_words,
    escape_spaces,
)

_MODEL_FLAGS = (
    "byte_fallback",
    "ignore_merges",
    "dropout",
    "continuing_subword_prefix",
    "end_of_word_suffix",
)
_SPACE_FLAGS = ("lstrip", "rstrip", "single_word")  # an added token that depends on its neighbours
_WHOLE_WORDS = "llama-bpe"  # the pre-tokenizer with which llama.cpp keeps a word that is a token
_Layout = tuple[str, str, bool]  # model, pre, add_space_prefix of TokenizerFields


def to_fields(tokenizer: Any, size: int) -> TokenizerFields:
    """Return the fields with which llama.cpp encodes as a BPE tokenizer does.

    One difference is only a warning: llama.cpp puts ▁ before every text and after every special
    token, but a Metaspace with prepend_scheme "always" not where a space is already, and one with
    "first" only at the beginning of a text. The Llama tokenizers of transformers are of this kind.

    Args:
        tokenizer: Byte-level or SentencePiece BPE, a Tokenizer of minilora or of transformers.
        size: Number of the model's embeddings; ids without a token become unused tokens.

    Returns:
        The fields that `build` and llama.cpp read.

    Raises:
        ValueError: If the tokenizer is of another kind, cuts words by a rule that GGUF has no name
            for, adds more to a text than BOS and EOS, or has merges or added tokens that llama.cpp
            treats differently.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not backend:
        backend = getattr(tokenizer, "backend", None)
    state: Any = {"model": {"type": type(tokenizer).__name__}}
    if backend:
        state = json.loads(backend.to_str())
    model, pre, prefix = _layout(state)
    if prefix and not state["normalizer"]:
        _warn_of_prefix(state["pre_tokenizer"]["prepend_scheme"])
    if model == "gpt2":
        _check_whole_words(backend, state, pre)
    vocabulary = {i: token for token, i in backend.get_vocab(with_added_tokens=True).items()}
    _drop_tokens_without_embedding(vocabulary, state, size)
    _check_added_tokens(backend, state["added_tokens"])
    ids = {}
    for name in ("bos", "eos", "unk", "pad"):
        ids[f"{name}_token_id"] = getattr(tokenizer, f"{name}_token_id", None)
    types_by_id = _token_types(vocabulary, state["added_tokens"])
    if model == "llama":
        types_by_id |= {backend.token_to_id(byte): BYTE for byte in BYTES}
        types_by_id[ids["unk_token_id"]] = UNKNOWN
        vocabulary |= _tokens_of_spaces(backend, state["added_tokens"])
    add_bos, add_eos = _added_around(backend, ids["bos_token_id"], ids["eos_token_id"])

    tokens = [vocabulary.get(i, f"[PAD{i}]") for i in range(size)]
    token_types = [types_by_id.get(i, UNUSED) for i in range(size)]
    pairs = [tuple(merge) for merge in state["model"]["merges"]]
    merges: list[str] = []
    scores: list[float] = []
    if model == "gpt2":
        merges = [" ".join(pair) for pair in pairs]
    else:
        scores = _scores(tokens, token_types, pairs)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return TokenizerFields(
        model=model,
        pre=pre,
        tokens=tokens,
        token_types=token_types,
        merges=merges,
        scores=scores,
        **ids,
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=prefix,
        chat_template=template,
    )


def _check_whole_words(backend: Any, state: dict[str, Any], pre: str) -> None:
    """Check that ignore_merges, if llama.cpp has another value of it, changes no word.

    With ignore_merges a word that is a token is kept without merging. It changes nothing if the
    merges make each token from its characters.
    """
    from tokenizers import Tokenizer

    ignore_merges = bool(state["model"].get("ignore_merges"))
    if ignore_merges == (pre == _WHOLE_WORDS):
        return
    plain = {**state, "added_tokens": [], "model": {**state["model"], "ignore_merges": False}}
    merged = Tokenizer.from_str(json.dumps(plain)).model
    added = {token["content"] for token in state["added_tokens"]}
    for token in backend.get_vocab(with_added_tokens=False):
        if token not in added and len(merged.tokenize(token)) > 1:
            raise ValueError(
                f"GGUF: this tokenizer has ignore_merges={ignore_merges}, and llama.cpp the "
                f"opposite for pre-tokenizer {pre!r}, which gives other ids for {token!r}. Save as "
                "safetensors and let llama.cpp's converter write the file."
            )


def _drop_tokens_without_embedding(
    vocabulary: dict[int, str], state: dict[str, Any], size: int
) -> None:
    """Remove added tokens whose ids the model has no embedding for, with a warning.

    Gemma 3's tokenizer has a token for images that the text model has not.
    """
    beyond = {number: token for number, token in vocabulary.items() if number >= size}
    added_ids = {token["id"] for token in state["added_tokens"]}
    if not beyond:
        return
    if beyond.keys() - added_ids:
        raise ValueError(
            f"GGUF: the tokenizer has ids up to {max(beyond)}, the model {size} embeddings: they "
            "do not belong together. Load the tokenizer of this model's checkpoint."
        )
    warnings.warn(
        f"GGUF: the model has {size} embeddings, and the tokenizer's added tokens {beyond} have "
        "none. The file is written without them.",
        stacklevel=6,  # the caller of save_model
    )
    for number in beyond:
        del vocabulary[number]
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < size]


def _tokens_of_spaces(backend: Any, added_tokens: list[dict[str, Any]]) -> dict[int, str]:
    """Return the added tokens with ▁ that spaces in a text give, with spaces.

    llama.cpp looks for added tokens in a text before it writes spaces as ▁. Gemma's runs of spaces
    are such tokens.
    """
    tokens = {}
    for token in added_tokens:
        text = token["content"].replace("▁", " ")
        if token["special"] or text == token["content"]:
            continue
        if backend.encode(text, add_special_tokens=False).ids == [token["id"]]:
            tokens[token["id"]] = text
    return tokens


def _layout(state: dict[str, Any]) -> _Layout:
    """Return GGUF's names for the way a tokenizer.json works."""
    signature = _signature(state)
    for layout, known_signature in _known_layouts():
        if known_signature == signature:
            return layout
    cut = json.dumps(state.get("pre_tokenizer"))[:200]
    change = json.dumps(state.get("normalizer"))[:200]
    raise ValueError(
        f"GGUF: expected byte-level BPE that cuts words as one of {', '.join(WORDS)}, or BPE with "
        f"byte_fallback that writes spaces as ▁, got {state['model']['type']} cut by {cut} after "
        f"{change}. Save as safetensors and let llama.cpp's converter write the file, or leave the "
        "tokenizer out: the file then takes ids but not text."
    )


def _known_layouts() -> Iterator[tuple[_Layout, Any]]:
    """Yield each layout of GGUF with the signature of a tokenizer that works so."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    for pre in WORDS:
        backend = Tokenizer(models.BPE())
        cut_words(backend, pre)
        yield ("gpt2", pre, False), _signature(json.loads(backend.to_str()))
    for prefix in (False, True):
        backend = Tokenizer(models.BPE(byte_fallback=True))
        escape_spaces(backend, prefix)
        yield ("llama", "default", prefix), _signature(json.loads(backend.to_str()))
    backend = Tokenizer(models.BPE(byte_fallback=True))  # Gemma: no space is left to cut at
    escape_spaces(backend, False)
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    yield ("llama", "default", False), _signature(json.loads(backend.to_str()))
    for scheme in ("never", "first", "always"):
        backend = Tokenizer(models.BPE(byte_fallback=True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        prefix = scheme != "never"
        yield ("llama", "default", prefix), _signature(json.loads(backend.to_str()))


def _signature(state: dict[str, Any]) -> Any:
    """Return the parts of a tokenizer.json that decide how a text is cut; offsets do not."""
    model = state["model"]
    flags = {flag: bool(model.get(flag)) for flag in _MODEL_FLAGS}
    if not flags["byte_fallback"]:
        flags["ignore_merges"] = False  # _check_whole_words checks it
    steps = []
    for step in _steps(state.get("pre_tokenizer"), "pretokenizers"):
        steps.append({**step, "trim_offsets": None, "pattern": _escaped(step.get("pattern"))})
    return model["type"], flags, steps, _steps(state.get("normalizer"), "normalizers")


def _steps(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """Return the steps of a part of tokenizer.json: of a Sequence, of one step or of none."""
    if part is None:
        return []
    return part.get(name, [part])


def _escaped(pattern: dict[str, str] | None) -> dict[str, str] | None:
    """Return a pattern with line ends as escapes, which match the same characters."""
    if pattern is None or "Regex" not in pattern:
        return pattern
    return {"Regex": pattern["Regex"].replace("\r", r"\r").replace("\n", r"\n")}


def _warn_of_prefix(scheme: str) -> None:
    """Warn that a Metaspace puts ▁ at fewer places than llama.cpp does."""
    text = "a text" if scheme == "first" else "a text and after a special token"
    warnings.warn(
        "GGUF: llama.cpp puts ▁ before every text and after every special token. This tokenizer "
        f"({scheme}) puts it only before {text}, and only where no space follows. The ids differ "
        "at the other places.",
        stacklevel=6,  # the caller of save_model
    )


def _check_added_tokens(backend: Any, added_tokens: list[dict[str, Any]]) -> None:
    """Check that each added token is found as it is, independent of the spaces around it."""
    for token in added_tokens:
        text = token["content"]
        reasons = [flag for flag in _SPACE_FLAGS if token[flag]]
        if not reasons and token["normalized"] and backend.normalizer:
            if backend.normalizer.normalize_str(text) != text:
                reasons.append("normalized")
        if reasons:
            raise ValueError(
                f"GGUF: llama.cpp finds the added token {text!r} everywhere in a text, but this "
                f"tokenizer does not ({', '.join(reasons)}). Add it again as "
                f"AddedToken({text!r}, normalized=False)."
            )


def _token_types(
    vocabulary: dict[int, str], added_tokens: list[dict[str, Any]]
) -> dict[int | None, int]:
    """Return the type of each token by its id: normal, control or user defined."""
    types: dict[int | None, int] = dict.fromkeys(vocabulary, NORMAL)
    for token in added_tokens:
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    return types


def _added_around(backend: Any, bos: int | None, eos: int | None) -> tuple[bool, bool]:
    """Find out if the tokenizer puts BOS before a text, and EOS after it."""
    plain = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    if full == plain:
        return False, False
    if full == [bos, *plain]:
        return True, False
    if full == [*plain, eos]:
        return False, True
    if full == [bos, *plain, eos]:
        return True, True
    raise ValueError(
        f"GGUF: the tokenizer turns the ids {plain} into {full}, but llama.cpp can only put "
        f"{[bos]} before and {[eos]} after them."
    )


def _scores(tokens: list[str], token_types: list[int], pairs: list[tuple[str, ...]]) -> list[float]:
    """Return for each token -rank of the merge that makes it from its characters.

    A token that no merge makes has a score below all of them. llama.cpp merges any pair that makes
    a token, `tokenizers` only the listed ones. On any text both agree if they agree within each
    token: both make it, or both stop before. Where merging leaves a token in two parts, llama.cpp
    would still join them, which raises a ValueError.
    """
    merged_parts = {part for pair in pairs for part in pair}
    if not set(tokens) >= set(BYTES) or merged_parts & set(BYTES):
        raise ValueError(
            "GGUF: expected a token for each of the bytes <0x00> to <0xFF>, and no merges of them."
        )
    ranks = {pair: rank for rank, pair in enumerate(pairs)}
    scores = [0.0] * len(tokens)
    for number, token in enumerate(tokens):
        if token_types[number] in WHOLE:
            continue
        parts, rank = _merge(token, ranks)
        if len(parts) == 2:
            raise ValueError(
                f"GGUF: llama.cpp would merge {parts} to the token {token!r}, but the tokenizer's "
                "merges do not."
            )
        if len(parts) > 1 or rank is None:
            rank = len(pairs) + number
        scores[number] = -float(rank)
    return scores


def _merge(token: str, ranks: dict[tuple[str, ...], int]) -> tuple[list[str], int | None]:
    """Merge a token's characters, lowest rank first; return the parts and the last rank."""
    parts = list(token)
    last_rank = None
    while len(parts) > 1:
        candidates = []
        for i, pair in enumerate(pairwise(parts)):
            candidates.append((ranks.get(pair, math.inf), i))
        rank, i = min(candidates)
        if rank == math.inf:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        last_rank = int(rank)
    return parts, last_rank
