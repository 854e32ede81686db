"""Text ↔ token ids: a checkpoint's tokenizer.json behind the part of transformers' interface that minilora uses.

    tokenizer.json            vocabulary, merges, pre-tokenizer, what is put around a text (BOS): `tokenizers` runs it
    tokenizer_config.json     which tokens are BOS, EOS, padding, unknown; added tokens; the chat template
    chat_template.jinja       the chat template, where it is a file of its own (it then wins)
    special_tokens_map.json   older checkpoints: the special tokens, where tokenizer_config.json does not name them

A .gguf file holds all of this under other names (gguf_tokenizer.py). Everything else in minilora calls only what
`AnyTokenizer` lists, so transformers' tokenizers are as welcome as this one. As transformers 5 does, truncation and
padding set in tokenizer.json are switched off, and whether BOS is added is tokenizer.json's word, not
`add_bos_token`'s in tokenizer_config.json.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from minilora.common import write_text
from minilora.data.chat_template import render
from minilora.models.gguf.tokenizer import from_gguf

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class AnyTokenizer(Protocol):
    """All that minilora asks of a tokenizer: `Tokenizer` below has it, and so has every tokenizer of transformers."""

    @property
    def bos_token_id(self) -> Any: ...
    @property
    def eos_token_id(self) -> Any: ...
    @property
    def pad_token_id(self) -> Any: ...
    @property
    def chat_template(self) -> Any: ...
    @property
    def encode(self) -> Any: ...
    @property
    def decode(self) -> Any: ...
    @property
    def apply_chat_template(self) -> Any: ...
    @property
    def save_pretrained(self) -> Any: ...
    def __len__(self) -> int: ...


class Tokenizer:
    """A `tokenizers.Tokenizer` with its special tokens and chat template.

    Args:
        backend: the `tokenizers.Tokenizer`.
        special_tokens: {"eos_token": "<|im_end|>", …}, keys from SPECIAL_TOKENS; each must be in the vocabulary.
        chat_template: a Jinja template, {name: template}, or None. May be set later: `tokenizer.chat_template = …`.
        config: tokenizer_config.json, kept for `save_pretrained`.
    """

    def __init__(self, backend: Any, special_tokens: Mapping[str, str | None] | None = None,
                 chat_template: str | dict[str, str] | None = None, config: dict[str, Any] | None = None):  # fmt: skip
        self.backend = backend
        backend.no_truncation()
        backend.no_padding()
        self.special_tokens = {key: token for key, token in (special_tokens or {}).items() if token is not None}
        if unknown := sorted(set(self.special_tokens) - set(SPECIAL_TOKENS)):
            raise ValueError(f"special tokens: unknown {unknown}. Expected keys among {', '.join(SPECIAL_TOKENS)}.")
        if lost := {k: t for k, t in self.special_tokens.items() if backend.token_to_id(t) is None}:
            raise ValueError(f"special tokens {lost} are not in the vocabulary of {len(self)} tokens.")
        known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        backend.add_special_tokens([t for t in dict.fromkeys(self.special_tokens.values()) if t not in known])
        self.chat_template = chat_template
        self.config = dict(config or {})

    def _id(self, key: str) -> int | None:
        token = self.special_tokens.get(key)
        return None if token is None else self.backend.token_to_id(token)

    @property
    def bos_token(self) -> str | None:
        """The token a text begins with, if there is one."""
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """The token that ends a text or turn."""
        return self.special_tokens.get("eos_token")

    @property
    def pad_token(self) -> str | None:
        """The token that fills batches up."""
        return self.special_tokens.get("pad_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._id("pad_token")

    @property
    def unk_token_id(self) -> int | None:
        return self._id("unk_token")

    def __len__(self) -> int:
        """Size of the vocabulary, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary without added tokens."""
        return self.backend.get_vocab_size(with_added_tokens=False)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; `add_special_tokens` puts around it what tokenizer.json prescribes, often a BOS."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: int | Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of token ids; accepts tensors too."""
        return self.backend.decode(_as_list(ids), skip_special_tokens=skip_special_tokens)

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        """Vocabulary entries of ids (one id: one entry); None for an id outside the vocabulary."""
        return self.backend.id_to_token(ids) if isinstance(ids, int) else [self.backend.id_to_token(i) for i in ids]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Ids of vocabulary entries (one entry: one id); None for an entry that does not exist."""
        if isinstance(tokens, str):
            return self.backend.token_to_id(tokens)
        return [self.backend.token_to_id(token) for token in tokens]

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], tokenize: bool = True,
                            add_generation_prompt: bool = False, *, chat_template: str | None = None,
                            tools: list[Any] | None = None, **variables: Any) -> Any:  # fmt: skip
        """A conversation as token ids, or as text with `tokenize=False`. The template writes BOS itself, if any.

        `chat_template` is another template, or the name of one; other keywords are variables of the template.
        """
        template = self._template(chat_template, tools)
        variables = self.special_tokens | {"tools": tools, "documents": None} | variables
        text = render(template, messages, add_generation_prompt=add_generation_prompt, **variables)
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def _template(self, template: str | None, tools: list[Any] | None) -> str:
        named = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        if template is not None:
            return named.get(template) or template
        found = (named.get("tool_use") if tools is not None else None) or named.get("default")
        if found is None and self.chat_template:
            raise ValueError(f"no default among the chat templates {sorted(named)}: pass chat_template=<name>.")
        if found is None:
            raise ValueError(
                "this tokenizer has no chat template, as is usual for base models. Set one: "
                "`tokenizer.chat_template = <Jinja text>`, for example minilora.data.ALPACA_TEMPLATE, or use the "
                "template of the instruct model; or train on plain texts (`prompt`/`completion` or `text` rows)."
            )
        return found

    def save_pretrained(self, folder: str | Path) -> list[Path]:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, which transformers loads as well."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | self.config
        config = {k: v for k, v in config.items() if k not in SPECIAL_TOKENS and k != "chat_template"}
        config |= self.special_tokens
        files = {"tokenizer.json": self.backend.to_str(pretty=True)}
        if isinstance(self.chat_template, dict):
            config["chat_template"] = [{"name": k, "template": v} for k, v in self.chat_template.items()]
        elif self.chat_template:
            files["chat_template.jinja"] = self.chat_template
        files["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        for name, text in files.items():
            write_text(folder / name, text)
        return [folder / name for name in files]

    def __repr__(self) -> str:
        template = "with" if self.chat_template else "without"
        return f"Tokenizer({len(self)} tokens, {self.special_tokens}, {template} chat template)"


def load_tokenizer(source: str | Path, *, revision: str | None = None, token: str | None = None,
                   local_files_only: bool | None = None) -> Tokenizer:  # fmt: skip
    """The tokenizer of a Hub id, a checkpoint folder or a .gguf file."""
    from minilora.hub import resolve

    path = resolve(source, revision=revision, token=token, local_files_only=local_files_only, weights=False)
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
    except Exception as error:  # the package raises no class of its own, for a broken file as for a newer format
        error.add_note(f"{file} is not a tokenizer that the installed `tokenizers` package can read.")
        raise
    config = _read_json(folder / "tokenizer_config.json")
    _add_tokens(backend, config.get("added_tokens_decoder") or {}, file)
    older = _read_json(folder / "special_tokens_map.json")
    named = {key: config.get(key, older.get(key)) for key in SPECIAL_TOKENS}
    special = {key: _content(value) for key, value in named.items()}
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []  # transformers 5, 4
    more = [_content(value) for value in (more.values() if isinstance(more, dict) else more)]
    if lost := [token for token in more if backend.token_to_id(token) is None]:
        raise ValueError(f"{folder / 'tokenizer_config.json'}: special tokens {lost} are not in the vocabulary.")
    backend.add_special_tokens(more)
    return Tokenizer(backend, special, _chat_template(folder, config), config)


def _content(token: Any) -> Any:
    return token["content"] if isinstance(token, dict) else token


def _add_tokens(backend: Any, tokens: dict[str, dict[str, Any]], file: Path) -> None:
    """Add what tokenizer_config.json's added_tokens_decoder {id: token} has and tokenizer.json lacks."""
    from tokenizers import AddedToken

    present = backend.get_added_tokens_decoder()
    for number, fields in sorted(tokens.items(), key=lambda item: int(item[0])):
        if int(number) in present and present[int(number)].content == fields["content"]:
            continue
        backend.add_tokens([AddedToken(**{k: v for k, v in fields.items() if k != "__type"})])
        if (got := backend.token_to_id(fields["content"])) != int(number):
            raise ValueError(
                f"{file}: tokenizer_config.json gives the added token {fields['content']!r} the id {number}, "
                f"the vocabulary {got}. The two files belong to different checkpoints."
            )


def _chat_template(folder: Path, config: dict[str, Any]) -> str | dict[str, str] | None:
    template = config.get("chat_template")
    named = {entry["name"]: entry["template"] for entry in template} if isinstance(template, list) else {}
    if isinstance(template, str):
        named["default"] = template
    if (file := folder / "chat_template.jinja").is_file():
        named = {"default": file.read_text(encoding="utf-8")}
    named |= {f.stem: f.read_text(encoding="utf-8") for f in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    return named.get("default") if set(named) <= {"default"} else named


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error


def _as_list(ids: Any) -> list[int]:
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    return [ids] if isinstance(ids, int) else list(ids)
