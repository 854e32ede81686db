"""Text ↔ token ids: a checkpoint's tokenizer.json behind transformers' interface.

    tokenizer.json            vocabulary, merges, pre-tokenizer, tokens around a text (BOS): the
                              package `tokenizers` runs it
    tokenizer_config.json     names of BOS, EOS, padding, unknown; added tokens; the chat template
    chat_template.jinja       the chat template as a file; it replaces the one in the config
    special_tokens_map.json   older checkpoints: special tokens that the config does not name

A .gguf file holds the same under other names (models/gguf/tokenizer.py). The rest of minilora calls
only the methods of `AnyTokenizer`, so transformers' tokenizers work as well. As in transformers 5,
truncation and padding in tokenizer.json are switched off, and tokenizer.json decides whether BOS is
added, not `add_bos_token` in tokenizer_config.json.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from minilora.common import read_json, write_text
from minilora.data.chat_template import read_template, render
from minilora.lora.files.source import resolve_base, split_source
from minilora.models.gguf.tokenizer import from_gguf

SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class AnyTokenizer(Protocol):
    """The methods that minilora calls; transformers' tokenizers have them too."""

    @property
    def bos_token_id(self) -> Any:
        """Id of BOS, or None."""

    @property
    def eos_token_id(self) -> Any:
        """Id of EOS, or None."""

    @property
    def pad_token_id(self) -> Any:
        """Id of the padding token, or None."""

    @property
    def chat_template(self) -> Any:
        """Jinja template, {name: template}, or None."""

    @property
    def encode(self) -> Any:
        """Function: text -> token ids."""

    @property
    def decode(self) -> Any:
        """Function: token ids -> text."""

    @property
    def apply_chat_template(self) -> Any:
        """Function: messages -> text or token ids."""

    @property
    def save_pretrained(self) -> Any:
        """Function: write the files of the tokenizer."""

    def __len__(self) -> int: ...


class Tokenizer:
    """A `tokenizers.Tokenizer` with its special tokens and chat template.

    Args:
        backend: the `tokenizers.Tokenizer`.
        special_tokens: {"eos_token": "<|im_end|>", …}: keys from SPECIAL_TOKENS, tokens of the
            vocabulary.
        chat_template: a Jinja template, {name: template}, or None. It can be set later:
            `tokenizer.chat_template = …`.
        config: tokenizer_config.json, kept for `save_pretrained`.

    Raises:
        ValueError: a key is unknown, or a token is not in the vocabulary.
    """

    def __init__(
        self,
        backend: Any,
        special_tokens: Mapping[str, str | None] | None = None,
        chat_template: str | dict[str, str] | None = None,
        config: dict[str, Any] | None = None,
    ):
        self.backend = backend
        backend.no_truncation()
        backend.no_padding()
        given = special_tokens or {}
        self.special_tokens = {key: token for key, token in given.items() if token is not None}
        unknown = sorted(set(self.special_tokens) - set(SPECIAL_TOKENS))
        if unknown:
            raise ValueError(
                f"special tokens: unknown {unknown}, expected among {', '.join(SPECIAL_TOKENS)}."
            )
        missing = {}
        for key, token in self.special_tokens.items():
            if backend.token_to_id(token) is None:
                missing[key] = token
        if missing:
            raise ValueError(
                f"special tokens {missing} are not in the vocabulary of {len(self)} tokens."
            )
        added = backend.get_added_tokens_decoder().values()
        known = {token.content for token in added if token.special}
        distinct = dict.fromkeys(self.special_tokens.values())
        backend.add_special_tokens([token for token in distinct if token not in known])
        self.chat_template = chat_template
        self.config = dict(config or {})

    def _id(self, key: str) -> int | None:
        token = self.special_tokens.get(key)
        return None if token is None else self.backend.token_to_id(token)

    @property
    def bos_token(self) -> str | None:
        """Token with which a text begins, or None."""
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """Token that ends a text or turn, or None."""
        return self.special_tokens.get("eos_token")

    @property
    def pad_token(self) -> str | None:
        """Token that pads batches, or None."""
        return self.special_tokens.get("pad_token")

    @property
    def bos_token_id(self) -> int | None:
        """Id of the BOS token, or None."""
        return self._id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Id of the EOS token, or None."""
        return self._id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """Id of the PAD token, or None."""
        return self._id("pad_token")

    @property
    def unk_token_id(self) -> int | None:
        """Id of the UNK token, or None."""
        return self._id("unk_token")

    def __len__(self) -> int:
        """Size of the vocabulary, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary without added tokens."""
        return self.backend.get_vocab_size(with_added_tokens=False)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: the text.
            add_special_tokens: add the tokens that tokenizer.json prescribes, often a BOS.
        """
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: int | Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of token ids.

        Args:
            ids: one id, a list or a tensor.
            skip_special_tokens: leave special tokens out.
        """
        return self.backend.decode(_as_list(ids), skip_special_tokens=skip_special_tokens)

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        """Return the vocabulary entries of ids, or None for an id outside the vocabulary.

        Args:
            ids: one id gives one entry, a list gives a list.
        """
        if isinstance(ids, int):
            return self.backend.id_to_token(ids)
        return [self.backend.id_to_token(i) for i in ids]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Return the ids of vocabulary entries, or None for an entry that does not exist.

        Args:
            tokens: one entry gives one id, a list gives a list.
        """
        if isinstance(tokens, str):
            return self.backend.token_to_id(tokens)
        return [self.backend.token_to_id(token) for token in tokens]

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        *,
        chat_template: str | None = None,
        tools: list[Any] | None = None,
        **variables: Any,
    ) -> Any:
        """Return a conversation as token ids or text; the template writes BOS.

        Args:
            messages: the conversation.
            tokenize: False returns the text.
            add_generation_prompt: end with the header of an answer.
            chat_template: another template, or the name of one.
            tools: JSON schemas of tools.
            variables: further variables of the template.
        """
        template = self._template(chat_template, tools)
        variables = self.special_tokens | {"tools": tools, "documents": None} | variables
        text = render(template, messages, add_generation_prompt=add_generation_prompt, **variables)
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def _template(self, template: str | None, tools: list[Any] | None) -> str:
        named: dict[str, Any] = {"default": self.chat_template}
        if isinstance(self.chat_template, dict):
            named = self.chat_template
        if template is not None:
            return named.get(template) or template
        chosen = named.get("tool_use") if tools is not None else None
        chosen = chosen or named.get("default")
        if chosen is not None:
            return chosen
        if self.chat_template:
            raise ValueError(
                f"no default among the chat templates {sorted(named)}: pass chat_template=<name>."
            )
        raise ValueError(
            "this tokenizer has no chat template, as is usual for base models. Set one: "
            "`tokenizer.chat_template = <Jinja text>`, for example minilora.data.ALPACA_TEMPLATE, "
            "or use the template of the instruct model; or train on plain texts "
            "(`prompt`/`completion` or `text` rows)."
        )

    def save_pretrained(self, folder: str | Path) -> list[Path]:
        """Write the files that transformers loads.

        These are tokenizer.json, tokenizer_config.json and chat_template.jinja.

        Args:
            folder: the folder; created if missing.

        Returns:
            The paths of the files.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        config |= self.config
        for name in (*SPECIAL_TOKENS, "chat_template"):
            config.pop(name, None)
        config |= self.special_tokens
        files = {"tokenizer.json": self.backend.to_str(pretty=True)}
        if isinstance(self.chat_template, dict):
            config["chat_template"] = [
                {"name": name, "template": template}
                for name, template in self.chat_template.items()
            ]
        elif self.chat_template:
            files["chat_template.jinja"] = self.chat_template
        files["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        for name, text in files.items():
            write_text(folder / name, text)
        return [folder / name for name in files]

    def __repr__(self) -> str:
        template = "with" if self.chat_template else "without"
        return f"Tokenizer({len(self)} tokens, {self.special_tokens}, {template} chat template)"


def load_tokenizer(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool | None = None,
) -> Tokenizer:
    """Load the tokenizer of a checkpoint.

    Args:
        source: Hub id, checkpoint folder or .gguf file. The folder of an adapter or of a run gives
            the tokenizer of its base.
        revision: branch, tag or commit on the Hub; None is its default branch.
        token: access token of the Hub; None uses the stored one.
        local_files_only: True asks no network; None follows HF_HUB_OFFLINE.

    Raises:
        ValueError: the folder has no tokenizer.json, or its files contradict each other.
    """
    base, adapter = split_source(source)
    path = resolve_base(
        base,
        adapter,
        source,
        revision=revision,
        token=token,
        local_files_only=local_files_only,
        weights=False,
    )
    if path.suffix == ".gguf":
        return Tokenizer(*from_gguf(path))
    return _from_folder(path)


def _from_folder(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    file = folder / "tokenizer.json"
    if not file.is_file():
        hint = "Expected a checkpoint folder as transformers saves it."
        if (folder / "tokenizer.model").is_file():
            hint = (
                "It has a sentencepiece tokenizer.model: convert it once with transformers, "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
            )
        raise ValueError(f"{folder} has no tokenizer.json. {hint}")
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # `tokenizers` raises Exception itself for every kind of error
        error.add_note(
            f"{file} is not a tokenizer that the installed `tokenizers` package can read."
        )
        raise
    config = _read_if_present(folder / "tokenizer_config.json")
    _add_tokens(backend, config.get("added_tokens_decoder") or {}, file)
    older = _read_if_present(folder / "special_tokens_map.json")
    special = {key: _content(config.get(key, older.get(key))) for key in SPECIAL_TOKENS}
    further = _further_special_tokens(config)
    missing = [token for token in further if backend.token_to_id(token) is None]
    if missing:
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: special tokens {missing} are not in the "
            "vocabulary."
        )
    backend.add_special_tokens(further)
    return Tokenizer(backend, special, read_template(folder, config), config)


def _read_if_present(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _further_special_tokens(config: dict[str, Any]) -> list[str]:
    """Return the special tokens without a role: extra_ in transformers 5, additional_ in 4."""
    tokens = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(tokens, dict):
        tokens = tokens.values()
    return [_content(token) for token in tokens]


def _content(token: Any) -> Any:
    return token["content"] if isinstance(token, dict) else token


def _add_tokens(backend: Any, tokens: dict[str, dict[str, Any]], file: Path) -> None:
    """Add the tokens {id: token} of tokenizer_config.json that tokenizer.json lacks."""
    from tokenizers import AddedToken

    present = {n: token.content for n, token in backend.get_added_tokens_decoder().items()}
    added = []
    for number in sorted(tokens, key=int):
        if present.get(int(number)) != tokens[number]["content"]:
            options = {name: value for name, value in tokens[number].items() if name != "__type"}
            added.append(AddedToken(**options))
    backend.add_tokens(added)  # one call: each one builds the index of all added tokens again
    for number, fields in tokens.items():
        got = backend.token_to_id(fields["content"])
        if got != int(number):
            raise ValueError(
                f"{file}: tokenizer_config.json gives the added token {fields['content']!r} the id "
                f"{number}, the vocabulary {got}. The two files belong to different checkpoints."
            )


def _as_list(ids: Any) -> list[int]:
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    return [ids] if isinstance(ids, int) else list(ids)
