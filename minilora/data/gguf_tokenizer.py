"""A tokenizer rebuilt from a .gguf file, which keeps tokens, merges and special ids but no tokenizer.json; and back.

Byte-level BPE cuts a text into words before it merges, and how it cuts is not in the file, only its name is. A wrong
cut gives wrong ids without an error, so a name that is not listed here raises.
"""

import json
from pathlib import Path
from typing import Any

from minilora.models.gguf import TokenizerFields, read_tokenizer_fields

# name: the regex that finds the words, None for GPT-2's own (which `tokenizers` has built in)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = {"gpt-2": None, "smollm": None, "llama-bpe": LLAMA3, "qwen2": LLAMA3.replace("{1,3}", "")}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # token types; 3 and 4 are matched whole in the text


Parts = tuple[Any, dict[str, str], str | None]  # what a Tokenizer is made of: backend, special tokens, chat template


def from_gguf(path: Path) -> Parts:
    """The tokenizer of a .gguf file. ValueError: not a byte-level BPE, or a pre-tokenizer not known here."""
    return build(read_tokenizer_fields(path), str(path))


def build(fields: TokenizerFields, where: str) -> Parts:
    """A tokenizer from the fields of a GGUF file; `where` names the file in errors."""
    from tokenizers import AddedToken, decoders, models
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
    if lost := next((pair for pair in merges if not {*pair, "".join(pair)} <= vocabulary.keys()), None):
        raise ValueError(f"{where}: its tokenizer is damaged: the merge {lost} is not of its tokens.")
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=fields.pre == "llama-bpe"))
    _cut_words(backend, fields.pre)
    backend.decoder = decoders.ByteLevel()
    for token, kind in zip(fields.tokens, fields.token_types, strict=True):
        if kind in (CONTROL, USER_DEFINED):
            backend.add_tokens([AddedToken(token, normalized=False, special=kind == CONTROL)])
    ids = {key: getattr(fields, f"{key}_id") for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    special = {key: fields.tokens[number] for key, number in ids.items() if number is not None}
    _surround(backend, special.get("bos_token") if fields.add_bos else None,
              special.get("eos_token") if fields.add_eos else None)  # fmt: skip
    return backend, special, fields.chat_template


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


def to_fields(tokenizer: Any, size: int) -> TokenizerFields:
    """What a GGUF file of `size` embeddings keeps of a byte-level BPE tokenizer, ours or transformers'.

    ValueError for another kind, words cut in a way that has no name here, or more around a text than BOS and EOS:
    llama.cpp would encode otherwise without a word.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None) or getattr(tokenizer, "backend", None)
    state: Any = json.loads(backend.to_str()) if backend else {"model": {"type": type(tokenizer).__name__}}
    pre = next((pre for pre in WORDS if _manner(state) == _manner_of(pre)), None)
    if pre is None:
        raise ValueError(
            f"GGUF: expected byte-level BPE that cuts words as one of {', '.join(WORDS)}, got {state['model']['type']} "
            f"cut by {json.dumps(state.get('pre_tokenizer'))[:200]}. Save as safetensors and let llama.cpp's converter "
            "write the file, or leave the tokenizer out."
        )
    vocabulary = {number: token for token, number in backend.get_vocab(with_added_tokens=True).items()}
    if max(vocabulary) >= size:
        raise ValueError(f"GGUF: the tokenizer has ids up to {max(vocabulary)}, the model {size} embeddings.")
    kinds = dict.fromkeys(vocabulary, NORMAL)
    kinds |= {token["id"]: CONTROL if token["special"] else USER_DEFINED for token in state["added_tokens"]}
    ids = {f"{key}_token_id": getattr(tokenizer, f"{key}_token_id", None) for key in ("bos", "eos", "unk", "pad")}
    bos, eos = [ids["bos_token_id"]], [ids["eos_token_id"]]
    plain, full = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    around = [(b, e) for b in (False, True) for e in (False, True) if full == b * bos + plain + e * eos]
    if not around:
        raise ValueError(f"GGUF: the tokenizer makes {full} of {plain}: it can only put {bos} before and {eos} behind.")
    template = tokenizer.chat_template
    return TokenizerFields(
        model="gpt2",
        pre=pre,
        tokens=[vocabulary.get(i, f"[PAD{i}]") for i in range(size)],
        token_types=[kinds.get(i, UNUSED) for i in range(size)],
        merges=[" ".join(merge) for merge in state["model"]["merges"]],
        scores=[],
        **ids,
        add_bos=around[0][0],
        add_eos=around[0][1],
        add_space_prefix=False,
        chat_template=template.get("default") if isinstance(template, dict) else template,
    )


def _manner(state: dict[str, Any]) -> Any:
    """What of a tokenizer.json decides how a text is cut into words; offsets do not."""
    cut, model = state.get("pre_tokenizer") or {}, state["model"]
    steps = [step | {"trim_offsets": None} for step in cut.get("pretokenizers", [cut])]
    flags = [bool(model.get(flag)) for flag in ("byte_fallback", "ignore_merges", "dropout", "end_of_word_suffix")]
    return model["type"], flags, steps, state.get("normalizer")


def _manner_of(pre: str) -> Any:
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    _cut_words(backend, pre)
    return _manner(json.loads(backend.to_str()))


def _surround(backend, bos: str | None, eos: str | None) -> None:
    """Let encode(text) put BOS in front and EOS behind, where the file says so."""
    from tokenizers.processors import TemplateProcessing

    parts = [*filter(None, [bos, "$A", eos])]
    if len(parts) > 1:
        special = [(token, backend.token_to_id(token)) for token in parts if token != "$A"]
        backend.post_processor = TemplateProcessing(single=parts, special_tokens=special)
