r"""Log-probabilities in the form of OpenAI's two endpoints.

chat        {"content": [{"token": " a", "logprob": -0.1, "bytes": [32, 97], "top_logprobs": […]}]}
completion  {"tokens": [" a"], "token_logprobs": [-0.1], "top_logprobs": [{" a": -0.1}],
             "text_offset": [5]}

They are those of the model before temperature and penalties, as in vLLM. A token that is a part of
a character has the text `bytes:\xf0\x9f`. In a completion, the token that ends the answer is the
last one, as in vLLM and as lm-eval expects, although the text does not show it.

Source: https://platform.openai.com/docs/api-reference/chat/object and /completions/object
"""

from collections.abc import Sequence
from typing import Any

from minilora.generation.scores import TokenScore, TokenTexts


def chat_logprobs(scores: Sequence[TokenScore], texts: TokenTexts) -> dict[str, Any]:
    """Return the field `logprobs` of a chat.

    Args:
        scores: the scores of the tokens.
        texts: the texts of single tokens.
    """
    content = []
    for score in scores:
        entry = _chat_token(score.token, score.log_p, texts)
        entry["top_logprobs"] = [_chat_token(token, log_p, texts) for token, log_p in score.top]
        content.append(entry)
    return {"content": content, "refusal": None}


def _chat_token(token: int, log_p: float | None, texts: TokenTexts) -> dict[str, Any]:
    """Return the fields of one token."""
    return {
        "token": texts.text_of(token),
        "logprob": log_p,
        "bytes": [*texts.bytes_of(token)],
    }


class CompletionLogprobs:
    """The field `logprobs` of a completion.

    Args:
        texts: the texts of single tokens.

    Attributes:
        fields: the field so far.
    """

    def __init__(self, texts: TokenTexts) -> None:
        self.texts = texts
        self.fields: dict[str, Any] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }

    def add_prompt(self, scores: Sequence[TokenScore], hidden: int) -> None:
        """Append the tokens of a prompt, which begins the text.

        Args:
            scores: their scores.
            hidden: number of tokens at the beginning that the text does not show, such as BOS.
        """
        offset = 0
        for number, score in enumerate(scores):
            raw = self.texts.bytes_of(score.token)
            continues = bool(raw) and _is_continuation(raw[0])
            self._append(score, offset - 1 if continues else offset)
            if number >= hidden:
                offset += sum(not _is_continuation(byte) for byte in raw)

    def add_answer(self, scores: Sequence[TokenScore], start: int) -> None:
        """Append the tokens of an answer.

        Args:
            scores: their scores.
            start: the character of the text at which the answer begins.
        """
        for score in scores:
            self._append(score, start + score.start)

    def _append(self, score: TokenScore, offset: int) -> None:
        """Append one token."""
        self.fields["tokens"].append(self.texts.text_of(score.token))
        self.fields["token_logprobs"].append(score.log_p)
        self.fields["top_logprobs"].append(self._top(score))
        self.fields["text_offset"].append(offset)

    def _top(self, score: TokenScore) -> dict[str, float] | None:
        """Return text -> log-probability of the likeliest tokens and of the token itself."""
        if score.log_p is None:
            return None
        top: dict[str, float] = {}
        for token, log_p in (*score.top, (score.token, score.log_p)):
            text = self.texts.text_of(token)
            top[text] = max(log_p, top.get(text, log_p))  # two tokens may have the same text
        return top


def _is_continuation(byte: int) -> bool:
    """Return True for a byte of UTF-8 that does not begin a character."""
    return byte & 0xC0 == 0x80
