"""Runs GGUF files in llama.cpp: token ids, logits, greedy text.

The package xllamacpp contains llama.cpp as one library and exports its C functions. ctypes calls
them here, because the package's own Python functions return no logits.

The structures of parameters below are the beginning of those in llama.h, up to the last field that
is set here; `reserve` is more than the rest. Another build of llama.cpp may have other fields:
`_check` compares the defaults that the library writes with the documented ones, so that a shift of
the fields is an error.
"""

import ctypes
from collections.abc import Callable
from ctypes import (
    POINTER,
    Structure,
    c_bool,
    c_char_p,
    c_float,
    c_int8,
    c_int32,
    c_uint32,
    c_void_p,
)
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

F32 = 0  # ggml_type
F16 = 1
FLASH_OFF = 0  # llama_flash_attn_type
CONTEXT = 512  # tokens that a context can hold


class ModelParams(Structure):
    """The beginning of llama_model_params."""

    _fields_ = [
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("reserve", ctypes.c_byte * 256),
    ]


class ContextParams(Structure):
    """The beginning of llama_context_params."""

    _fields_ = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int32),
        ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32),
        ("attention_type", c_int32),
        ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("reserve", ctypes.c_byte * 256),
    ]


class Batch(Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


LOG = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)


@LOG
def _silent(level, text, data) -> None:
    """Print nothing: llama.cpp logs hundreds of lines for each file."""


# function -> its result and its arguments
FUNCTIONS = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [LOG, c_void_p]),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
    "llama_model_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_model_chat_template": (c_char_p, [c_void_p, c_char_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_bos": (c_int32, [c_void_p]),
    "llama_vocab_eos": (c_int32, [c_void_p]),
    "llama_tokenize": (
        c_int32,
        [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool],
    ),
    "llama_init_from_model": (c_void_p, [c_void_p, ContextParams]),
    "llama_free": (None, [c_void_p]),
    "llama_batch_init": (Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_adapter_lora_init": (c_void_p, [c_void_p, c_char_p]),
    "llama_set_adapters_lora": (
        c_int32,
        [c_void_p, POINTER(c_void_p), ctypes.c_size_t, POINTER(c_float)],
    ),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_model_size": (ctypes.c_uint64, [c_void_p]),
    "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
}


@cache
def library() -> ctypes.CDLL:
    """Return llama.cpp, with the types of the functions that are used here."""
    found = find_spec("xllamacpp")
    assert found is not None and found.origin, "pip install -c constraints.txt -e '.[test]'"
    (path,) = Path(found.origin).parent.glob("xllamacpp*.so")
    lib = ctypes.CDLL(str(path))
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(lib, name)
        function.restype = result
        function.argtypes = arguments
    lib.llama_backend_init()
    lib.llama_log_set(_silent, None)
    _check(lib)
    return lib


def _check(lib: ctypes.CDLL) -> None:
    """Compare defaults with those of llama.h; another layout would show other values."""
    model = lib.llama_model_default_params()
    flags = (model.vocab_only, model.check_tensors, model.use_extra_bufts)
    assert flags == (False, False, True), flags
    context = lib.llama_context_default_params()
    sizes = (context.n_ctx, context.n_batch, context.n_ubatch, context.n_seq_max)
    assert sizes == (512, 2048, 512, 1), sizes
    types = (context.flash_attn_type, context.type_k, context.type_v)
    assert types == (-1, F16, F16), types
    assert (context.yarn_beta_fast, context.yarn_beta_slow) == (-1.0, -1.0)


class Llama:
    """A GGUF file opened by llama.cpp, on one thread.

    Args:
        path: the file.
        vocab_only: read the tokenizer and no weights.
    """

    def __init__(self, path: Path, vocab_only: bool = False) -> None:
        self.lib = library()
        params = self.lib.llama_model_default_params()
        params.vocab_only = vocab_only
        # Keep the file's weight layout: kernels that change it (AMX) stop on some virtual machines.
        params.use_extra_bufts = False
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), params)
        assert self.model, f"llama.cpp does not load {path}"
        self.vocab = self.lib.llama_model_get_vocab(self.model)
        self.size = self.lib.llama_vocab_n_tokens(self.vocab)

    def __enter__(self) -> "Llama":
        return self

    def __exit__(self, *error: object) -> None:
        self.lib.llama_model_free(self.model)

    @property
    def ends(self) -> tuple[int, int]:
        """The ids of the tokens that begin and end a text."""
        return self.lib.llama_vocab_bos(self.vocab), self.lib.llama_vocab_eos(self.vocab)

    @property
    def chat_template(self) -> str | None:
        """The chat template of the file."""
        text = self.lib.llama_model_chat_template(self.model, None)
        return None if text is None else text.decode()

    def tokenize(self, text: str, add_special: bool) -> list[int]:
        """Return the token ids of a text; special tokens in the text are read as such.

        Args:
            text: the text.
            add_special: add the tokens that begin and end a text, as the file says.
        """
        data = text.encode()
        room = len(data) + 8
        ids = (c_int32 * room)()
        count = self.lib.llama_tokenize(self.vocab, data, len(data), ids, room, add_special, True)
        assert count >= 0, count
        return list(ids[:count])

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, as stored."""
        return self.lib.llama_model_size(self.model)

    def logits(self, ids: list[int], adapter: Path | None = None) -> Tensor:
        """Return the logits after every token, (T, V), with keys and values stored in fp32.

        Args:
            ids: the token ids, at most CONTEXT.
            adapter: a GGUF file of an adapter; None uses the base alone.
        """
        context = self._context(threads=1, exact=True)
        if adapter is not None:
            loaded = self.lib.llama_adapter_lora_init(self.model, str(adapter).encode())
            assert loaded, f"llama.cpp does not load {adapter}"
            scale = (c_float * 1)(1.0)
            self.lib.llama_set_adapters_lora(context, (c_void_p * 1)(loaded), 1, scale)
        self._read(context, ids, 0, every=True)
        rows = [self._logits_at(context, place).copy() for place in range(len(ids))]
        self.lib.llama_free(context)
        return torch.from_numpy(np.stack(rows))

    def greedy(self, threads: int) -> Callable[[list[int], int], list[int]]:
        """Return a function that generates tokens with the library's defaults for attention.

        Args:
            threads: threads of the library.

        Returns:
            A function of the prompt and the number of new tokens. It ends at no token.
        """
        context = self._context(threads, exact=False)

        def generate(prompt: list[int], new: int) -> list[int]:
            self.lib.llama_memory_clear(self.lib.llama_get_memory(context), True)
            answer: list[int] = []
            unread = prompt
            place = 0
            while len(answer) < new:
                self._read(context, unread, place, every=False)
                place += len(unread)
                last = self._logits_at(context, len(unread) - 1)
                unread = [int(last.argmax())]
                answer += unread
            return answer

        return generate

    def _context(self, threads: int, exact: bool) -> int:
        """Return a context; `exact` keeps keys and values in fp32 and uses plain attention."""
        params = self.lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = CONTEXT
        params.n_threads = params.n_threads_batch = threads
        if exact:
            params.type_k = params.type_v = F32
            params.flash_attn_type = FLASH_OFF
        context = self.lib.llama_init_from_model(self.model, params)
        assert context, "llama.cpp makes no context"
        return context

    def _read(self, context: int, ids: list[int], start: int, every: bool) -> None:
        """Read tokens from position `start`; keep the logits of every one, or of the last."""
        batch = self.lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place] = token
            batch.pos[place] = start + place
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = 0
            batch.logits[place] = every or place == len(ids) - 1
        status = self.lib.llama_decode(context, batch)
        assert status == 0, status
        self.lib.llama_batch_free(batch)

    def _logits_at(self, context: int, place: int) -> np.ndarray:
        """Return the logits of a token of the last batch, (V,), in the library's memory."""
        row = self.lib.llama_get_logits_ith(context, place)
        return np.ctypeslib.as_array(row, shape=(self.size,))
