"""A GGUF file as a checkpoint: config, tensors and tokenizer fields.

A GGUF file differs from a Hugging Face checkpoint in four ways.

1. The tensors have other names (architectures.py).
2. In llama files the rows of q_proj and k_proj have another order: llama.cpp rotates neighbouring
   channels (2i, 2i+1) where Hugging Face rotates (i, i + d/2). `unpermute` restores the order.
3. Gemma's norms are stored as 1 + w.
4. The values have one of many quantised types. The `gguf` package decodes them, or a matrix keeps
   its bytes as a GGUFWeight.

header.py reads the layout of the file, and config.py its config.
"""

import math
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.common import is_list_of
from minilora.common.extras import require
from minilora.models.gguf.architectures import (
    ROPE_FACTORS,
    hf_name,
    norm_offset,
    permuted_heads,
)
from minilora.models.gguf.config import read_config
from minilora.models.gguf.header import Record, read_header
from minilora_kernels.gguf import FORMATS, GGUFWeight

_LIST_ELEMENTS = {"tokens": str, "token_type": int, "merges": str, "scores": int | float}


@dataclass(frozen=True)
class TokenizerFields:
    """The fields of a GGUF file from which a tokenizer is built.

    Attributes:
        model: "gpt2" for byte-level BPE, "llama" for SentencePiece's BPE.
        pre: Name of the pre-tokenizer, such as "smollm" or "llama-bpe"; None if absent.
        tokens: The tokens in the order of their ids.
        token_types: The type of each token: 1 normal, 2 unknown, 3 control, 4 user defined,
            5 unused, 6 byte.
        merges: "left right" pairs in the order of their rank; empty for "llama".
        scores: A score for each token; the merge with the highest score comes first. Empty for
            "gpt2".
        bos_token_id: Id of the token at the beginning of a text, or None.
        eos_token_id: Id of the token at the end of a text, or None.
        unk_token_id: Id of the token for unknown characters, or None.
        pad_token_id: Id of the padding token, or None.
        add_bos: Put BOS before a text.
        add_eos: Put EOS after a text.
        add_space_prefix: Put a space before a text.
        chat_template: Jinja template of a chat, or None.
    """

    model: str
    pre: str | None
    tokens: list[str]
    token_types: list[int]
    merges: list[str]
    scores: list[float]
    bos_token_id: int | None
    eos_token_id: int | None
    unk_token_id: int | None
    pad_token_id: int | None
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | None


class GGUFCheckpoint:
    """A GGUF file with the names, shapes and row order of a Hugging Face checkpoint.

    Args:
        path: The .gguf file.

    Attributes:
        path: The .gguf file.
        config: The model's config.
        shapes: Shape of each tensor by its Hugging Face name.
        quantized: Type, such as "Q4_K", of each matrix that `read_quantized` returns.
        four_bit: Empty: the quantised tensors are not NF4, and `read` returns them dense.
        skip: Empty, because four_bit is.

    Raises:
        ImportError: If the gguf package is not installed.
        ValueError: If the file is damaged, or its model is not supported.
    """

    four_bit: Set[str] = frozenset()
    skip: list[str] = []

    def __init__(self, path: Path) -> None:
        require(f"{path}: reading a GGUF model", "gguf")
        self.path = path
        fields, self._records = read_header(path)
        self._check_extents()
        rope_record = self._records.pop(ROPE_FACTORS, None)
        try:
            factors = None
            if rope_record is not None:
                factors = self._dense(rope_record)
            self.config = read_config(path, fields, self._records, factors)
        except (TypeError, OverflowError) as error:  # not a number, or an infinite one
            raise ValueError(
                f"{path}: a field of its header is of the wrong kind ({error})."
            ) from error
        self._gguf_names: dict[str, str] = {}  # by Hugging Face name
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.quantized: dict[str, str] = {}
        for gguf_name, record in self._records.items():
            name = hf_name(path, gguf_name, self.config.model_type)
            self._gguf_names[name] = gguf_name
            self.shapes[name] = record.shape
            type_name = _type_name(record)
            if len(record.shape) == 2 and type_name in FORMATS:
                self.quantized[name] = type_name

    def where(self, name: str) -> str:
        """Return the place of a tensor for an error message.

        Args:
            name: Hugging Face name of the tensor.

        Returns:
            The GGUF name and the file; the file alone if it has no such tensor.
        """
        if name in self._gguf_names:
            return f"{self._gguf_names[name]} of {self.path}"
        return str(self.path)

    def read(self, name: str) -> Tensor:
        """Read one tensor.

        Args:
            name: Hugging Face name of the tensor, a key of `shapes`.

        Returns:
            The tensor in fp32 and in Hugging Face's row order.

        Raises:
            ValueError: If the gguf package cannot decode its type.
        """
        tensor = self._dense(self._records[self._gguf_names[name]])
        offset = norm_offset(self.config, name)
        if offset:
            return tensor - offset
        heads = permuted_heads(self.config)
        module = name.split(".")[-2]
        if module in heads:
            return unpermute(tensor, heads[module])
        return tensor

    def read_quantized(self, name: str, dtype: torch.dtype) -> GGUFWeight:
        """Read the bytes of one matrix.

        Args:
            name: Hugging Face name of the tensor, in `quantized`.
            dtype: Dtype of the dense matrix.

        Returns:
            The matrix, in Hugging Face's row order once it is dequantised.

        Raises:
            ValueError: If a scale is NaN or infinite.
        """
        record = self._records[self._gguf_names[name]]
        blocks = torch.from_numpy(self._read_bytes(record))  # (out, bytes of a row)
        heads = permuted_heads(self.config).get(name.split(".")[-2], 0)
        weight = GGUFWeight(blocks, torch.Size(record.shape), dtype, _type_name(record), heads)
        try:
            weight.check_scales()
        except ValueError as error:
            raise ValueError(f"{self.where(name)}: {error}") from error
        return weight

    def _check_extents(self) -> None:
        """Check that the tensors do not overlap and end before the file does."""
        file_size = self.path.stat().st_size
        end = 0
        for name, record in sorted(self._records.items(), key=_offset):
            if record.offset < end:
                raise ValueError(
                    f"{self.path} is damaged: tensor {name} overlaps the one before it. "
                    "Download it again."
                )
            nbytes = math.prod(_byte_shape(record, f"{self.path}: tensor {name}"))
            end = record.offset + nbytes
            if end > file_size:
                raise ValueError(
                    f"{self.path} is cut off: tensor {name} ends after the file does. "
                    "Download it again."
                )

    def _dense(self, record: Record) -> Tensor:
        """Read and dequantise a tensor, in the file's row order."""
        import gguf

        kind = gguf.GGMLQuantizationType(record.kind)
        try:
            dense = gguf.dequantize(self._read_bytes(record), kind)
        except NotImplementedError:
            raise ValueError(
                f"{self.path}: the gguf package cannot dequantise type {kind.name}."
            ) from None
        if not dense.flags.writeable:
            dense = dense.copy()  # torch warns of memory that it cannot write to
        return torch.from_numpy(dense)  # record.shape

    def _read_bytes(self, record: Record) -> Any:
        """Return the stored bytes of a tensor, a numpy array of uint8 (…, bytes of a row)."""
        import numpy as np  # not at the top: `import minilora` must stay light

        byte_shape = _byte_shape(record, str(self.path))
        count = math.prod(byte_shape)
        raw = np.fromfile(self.path, np.uint8, count=count, offset=record.offset)
        return raw.reshape(byte_shape)


def unpermute(rows: Tensor, heads: int) -> Tensor:
    """Restore Hugging Face's order of a head's rows: (h, i, half) becomes (h, half, i).

    Args:
        rows: Weight or bias in llama.cpp's order, shape (heads · d, …).
        heads: Number of heads.

    Returns:
        The same rows in Hugging Face's order, same shape.
    """
    pairs = rows.unflatten(0, (heads, -1, 2))  # (heads, d / 2, 2, …)
    return pairs.transpose(1, 2).reshape(rows.shape)  # (heads · d, …)


def read_tokenizer_fields(path: Path | str) -> TokenizerFields:
    """Read the tokenizer's fields from a GGUF file; no extra package is needed.

    Args:
        path: The .gguf file.

    Returns:
        The fields, with llama.cpp's defaults for absent ones.

    Raises:
        ValueError: If the file has no tokenizer, or its tokenizer is damaged.
    """
    path = Path(path)
    fields, _ = read_header(path)
    _check_tokenizer(path, fields)

    def get(name: str, default: Any = None) -> Any:
        return fields.get(f"tokenizer.ggml.{name}", default)

    tokens = get("tokens")
    model = get("model", "")
    is_llama = get("model") == "llama"
    return TokenizerFields(
        model=model,
        pre=get("pre"),
        tokens=tokens,
        token_types=get("token_type", [1] * len(tokens)),
        merges=get("merges", []),
        scores=get("scores", []),
        bos_token_id=get("bos_token_id"),
        eos_token_id=get("eos_token_id"),
        unk_token_id=get("unknown_token_id"),
        pad_token_id=get("padding_token_id"),
        add_bos=get("add_bos_token", is_llama or get("pre") == "llama-bpe"),
        add_eos=get("add_eos_token", False),
        add_space_prefix=get("add_space_prefix", is_llama),
        chat_template=fields.get("tokenizer.chat_template"),
    )


def _check_tokenizer(path: Path, fields: dict[str, Any]) -> None:
    """Check the kinds and lengths of the tokenizer's lists, and the ranges of its ids."""
    values = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
    if not values.get("tokens"):
        raise ValueError(f"{path} holds no tokenizer (tokenizer.ggml.tokens is missing).")
    damaged = _damaged_lists(values)
    count = 0
    if not damaged:
        count = len(values["tokens"])
        damaged = _lists_of_wrong_length(values)
    for key in ("bos", "eos", "unknown", "padding"):
        number = values.get(f"{key}_token_id")
        if number is not None and (type(number) is not int or not 0 <= number < count):
            damaged.append(key)
    for key in ("model", "pre", "tokenizer.chat_template"):
        if not isinstance(values.get(key, ""), str):
            damaged.append(key)
    if damaged:
        raise ValueError(
            f"{path}: its tokenizer is damaged: {', '.join(damaged)} of the wrong kind, "
            "length or range."
        )


def _damaged_lists(values: dict[str, Any]) -> list[str]:
    """Return the keys whose value is not a list of the elements that belong there."""
    damaged = []
    for key, element in _LIST_ELEMENTS.items():
        if not is_list_of(values.get(key, []), element):
            damaged.append(key)
    return damaged


def _lists_of_wrong_length(values: dict[str, Any]) -> list[str]:
    """Return the first list that does not have one finite number for each token."""
    keys = []
    if "token_type" in values:
        keys.append("token_type")
    if values.get("model") == "llama":
        keys.append("scores")
    for key in keys:
        numbers = values.get(key, [])
        if len(numbers) != len(values["tokens"]) or not all(map(math.isfinite, numbers)):
            return [key]
    return []


def _type_name(record: Record) -> str:
    """Return the name of the type of a tensor, such as "Q4_K"."""
    import gguf

    return gguf.GGMLQuantizationType(record.kind).name


def _offset(item: tuple[str, Record]) -> int:
    """Return the offset of a named record."""
    return item[1].offset


def _byte_shape(record: Record, where: str) -> tuple[int, ...]:
    """Return the shape of the stored tensor as rows of bytes."""
    import gguf

    try:
        kind = gguf.GGMLQuantizationType(record.kind)
        return gguf.quant_shape_to_byte_shape(record.shape, kind)
    except ValueError as error:  # an unknown type, or a row that its blocks do not divide
        raise ValueError(
            f"{where} has shape {record.shape} and type {record.kind}: {error}."
        ) from error
