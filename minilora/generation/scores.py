"""Log-probabilities of tokens, and the text and bytes of a single token.

    log p(t) = l_t − log Σ_v exp(l_v)

l are the logits of the model, before temperature and penalties, in fp32.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minilora.models.padded_batch import LOGITS, Context

_BYTE_FALLBACK = re.compile(r"<0x..>", re.DOTALL)
HALF = "\ufffd"  # the decoded form of an incomplete character


class TokenScore(NamedTuple):
    """A token, its log-probability, and those of the likeliest tokens at its place.

    Attributes:
        token: the token.
        log_p: its log-probability; None for the first token of a prompt, which nothing predicts.
        top: likeliest tokens with their log-probabilities, best first.
        is_end: True for a token that ends an answer and does not belong to its text.
        start: number of characters of the answer's text before this token; 0 in a prompt.
    """

    token: int
    log_p: float | None
    top: tuple[tuple[int, float], ...] = ()
    is_end: bool = False
    start: int = 0


def token_scores(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenScore]:
    """Return the scores of tokens.

    Args:
        logits: logits at the place of each token, (T, V).
        tokens: the T tokens.
        top: number of likeliest tokens to list.
    """
    log_p = logits.float().log_softmax(-1)  # (T, V)
    chosen = torch.tensor(tokens, device=log_p.device)[:, None]  # (T, 1)
    values = log_p.gather(-1, chosen).squeeze(-1).tolist()
    listed = min(top, log_p.shape[-1])
    likeliest = log_p.topk(listed, dim=-1)  # (T, top) each
    rows = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    scores = []
    for token, value, (ids, best) in zip(tokens, values, rows, strict=True):
        pairs = tuple(zip(ids, best, strict=True))
        scores.append(TokenScore(token, value, pairs))
    return scores


def prompt_scores(
    context: Context, read: Tensor, tokens: Sequence[int], top: int
) -> list[TokenScore]:
    """Return the scores of the tokens of a prompt.

    The logits of a few tokens at a time are in memory.

    Args:
        context: the context that has read the prompt.
        read: the result of `Context.extend_all` for this row, right-aligned, (T, D).
        tokens: the tokens of the prompt.
        top: number of likeliest tokens to list.
    """
    before = read[len(read) - len(tokens) : -1]  # (T-1, D): predicts every token but the first
    chunk = max(1, LOGITS // context.vocabulary)
    scores = [TokenScore(tokens[0], None)]
    for start in range(0, len(before), chunk):
        part = before[start : start + chunk]  # (t, D)
        logits = context.logits(part[None])[0]  # (t, V)
        following = tokens[start + 1 : start + 1 + len(part)]
        scores += token_scores(logits, following, top)
    return scores


class TokenTexts:
    """The text and the bytes of single tokens.

    Args:
        tokenizer: the tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # A token is decoded after another one: at the beginning of a text, some tokenizers drop the
        # space of a token.
        self.anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self.anchor_text = tokenizer.decode(self.anchor, skip_special_tokens=False)
        self.known: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        """Return the UTF-8 bytes of a token, which may be a part of a character.

        Args:
            token: the token.
        """
        if token not in self.known:
            shown = self.tokenizer.decode([*self.anchor, token], skip_special_tokens=False)
            text = shown.removeprefix(self.anchor_text)
            raw = text.encode()
            if HALF in text:
                entry = self.tokenizer.convert_ids_to_tokens(token)
                raw = _raw_bytes(entry) or raw
            self.known[token] = raw
        return self.known[token]

    def text_of(self, token: int) -> str:
        r"""Return the text of a token, and `bytes:\xf0\x9f` for a part of a character.

        Args:
            token: the token.
        """
        raw = self.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _raw_bytes(entry: str | None) -> bytes:
    """Return the bytes of a vocabulary entry, or no bytes if it has another form.

    The forms are `<0xF0>` (byte fallback) and GPT-2's, where a letter stands for each byte.
    """
    if entry is None:
        return b""
    if _BYTE_FALLBACK.fullmatch(entry):
        return bytes.fromhex(entry[3:5])
    alphabet = byte_letters()
    raw = bytearray()
    for letter in entry:
        if letter not in alphabet:
            return b""
        raw.append(alphabet[letter])
    return bytes(raw)


def byte_letters() -> dict[str, int]:
    """Return GPT-2's letter of each byte: the printable ones of Latin-1, then those from U+0100.

    Source: https://github.com/openai/gpt-2, src/encoder.py, bytes_to_unicode.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters = {}
    number = 0
    for byte in range(256):
        if byte in printable:
            letters[chr(byte)] = byte
        else:
            letters[chr(0x100 + number)] = byte
            number += 1
    return letters
