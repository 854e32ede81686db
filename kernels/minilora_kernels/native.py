r"""cpu.py's dequantisation once more, in C: the same bits from one pass over memory, where a C compiler is.

A block has one scale and 16 levels, so 16 products are all it takes; the rest is copying by code:

    value[c] = round(level[c] * absmax)      c = 0 … 15, once a block
    out[i]   = value[code[i]]                with AVX-512 32 at a time: the table is a register, the codes permute it

The compiler runs beside Python from the first weight on (a quarter of a second); until it is done, and without one,
the torch path goes on. Nothing is kept on disk: the library is loaded and its folder removed. Its threads are torch's:
an OpenMP runtime that is loaded already is not loaded again.
"""

import atexit
import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .codebook import dynamic_map, nf4_codebook

SOURCE = r"""
#include <stdint.h>
typedef uint16_t u16x32 __attribute__((vector_size(64), aligned(1), may_alias));
typedef uint8_t u8x32 __attribute__((vector_size(32), aligned(1), may_alias));

typedef struct { /* of a block: fp32, or 8-bit codes into `map` that share a scale by 256 and an offset */
  const float *absmax, *map, *nested, *offset, *level;
  const uint8_t *codes;
} scales;

static inline float scale(const scales *s, int64_t k) {
  return s->codes ? s->map[s->codes[k]] * s->nested[k / 256] + *s->offset : s->absmax[k];
}

/* fp32 to bf16, to the nearest, ties to even */
static inline uint16_t bf16(float x) {
  union { float value; uint32_t bits; } v = {x};
  return (v.bits + 0x7fff + (v.bits >> 16 & 1)) >> 16;
}

/* packed (blocks * half) -> out (blocks * half * 2); the first of a byte's two codes is the high one */
void dequantize_float32(const uint8_t *packed, const scales *s, int64_t blocks, int64_t half, float *out) {
#pragma omp parallel for if (blocks * half > 1 << 15)
  for (int64_t k = 0; k < blocks; k++) {
    float value[16], absmax = scale(s, k);
    for (int c = 0; c < 16; c++) value[c] = s->level[c] * absmax;
    for (int64_t i = k * half; i < (k + 1) * half; i++) {
      out[2 * i] = value[packed[i] >> 4];
      out[2 * i + 1] = value[packed[i] & 15];
    }
  }
}

void dequantize_bfloat16(const uint8_t *packed, const scales *s, int64_t blocks, int64_t half, uint16_t *out) {
#pragma omp parallel for if (blocks * half > 1 << 15)
  for (int64_t k = 0; k < blocks; k++) {
    union { uint16_t one[32]; u16x32 all; } value;
    float absmax = scale(s, k);
    for (int c = 0; c < 16; c++) value.one[c] = value.one[c + 16] = bf16(s->level[c] * absmax);
    int64_t i = k * half;
#ifdef __AVX512BW__
    for (; i + 32 <= (k + 1) * half; i += 32) {
      u16x32 bytes = __builtin_convertvector(*(const u8x32 *)(packed + i), u16x32);
      union { u16x32 pairs; u8x32 part[2]; } code = {bytes >> 4 | (bytes & 15) << 8}; /* high, low, high, low, ... */
      for (int j = 0; j < 2; j++)
        *(u16x32 *)(out + 2 * i + 32 * j) =
            __builtin_shuffle(value.all, __builtin_convertvector(code.part[j], u16x32));
    }
#endif
    for (; i < (k + 1) * half; i++) {
      out[2 * i] = value.one[packed[i] >> 4];
      out[2 * i + 1] = value.one[packed[i] & 15];
    }
  }
}
"""
_NAMES = {torch.float32: "dequantize_float32", torch.bfloat16: "dequantize_bfloat16"}


class _Scales(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("absmax", "map", "nested", "offset", "level", "codes")]


def ready() -> bool:
    """Whether there is compiled code, once the compiler has done its work."""
    return _Library.loaded(wait=True) is not None


def dequantize(
    packed: Tensor, scales: Tensor, nested: Tensor | None, offset: Tensor | None, blocksize: int, out: Tensor
) -> bool:
    """The parts of a weight, contiguous, written to `out`, contiguous too. False, with nothing done, where there is no
    compiled code (yet), for another dtype than fp32 and bf16, and if the last block is not whole."""
    library = _Library.loaded()
    if library is None or out.dtype not in _NAMES or out.numel() % blocksize:
        return False
    call(library, packed, scales, nested, offset, blocksize, out)
    return True


def call(
    library: ctypes.CDLL, packed: Tensor, scales: Tensor, nested: Tensor | None, offset: Tensor | None, blocksize: int,
    out: Tensor,
) -> None:  # fmt: skip
    """Run `library`, which SOURCE was compiled to."""
    absmax, codes = (scales, None) if nested is None else (None, scales)
    map, level = _tables()
    tensors = absmax, map, nested, offset, level, codes
    pointers = _Scales(*(None if tensor is None else tensor.data_ptr() for tensor in tensors))
    sizes = ctypes.c_int64(out.numel() // blocksize), ctypes.c_int64(blocksize // 2)
    function = getattr(library, _NAMES[out.dtype])
    function(ctypes.c_void_p(packed.data_ptr()), ctypes.byref(pointers), *sizes, ctypes.c_void_p(out.data_ptr()))


@cache
def _tables() -> tuple[Tensor, Tensor]:
    return dynamic_map(), nf4_codebook()


class _Library:
    """The compiled code: None until the compiler, which `loaded` starts, is done; for good if there is none."""

    found: ctypes.CDLL | None = None
    started = False
    process: subprocess.Popen | None = None
    folder = ""

    @classmethod
    def loaded(cls, wait: bool = False) -> ctypes.CDLL | None:
        if not cls.started:
            cls.started = True
            cls._compile()
        if cls.process is not None and (wait or cls.process.poll() is not None):
            if cls.process.wait() == 0:
                cls.found = ctypes.CDLL(str(Path(cls.folder, "nf4.so")))
            cls._clean()
        return cls.found

    @classmethod
    def _compile(cls) -> None:
        compiler = shutil.which(os.environ.get("CC", "cc"))
        if compiler is None or os.name != "posix":
            return
        cls.folder = tempfile.mkdtemp(prefix="minilora-")
        atexit.register(cls._clean)
        Path(cls.folder, "nf4.c").write_text(SOURCE)
        machine = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
        compile = f"'{compiler}' -O3 -ffp-contract=off {machine} -shared -fPIC -o nf4.so nf4.c"
        command = ["sh", "-c", f"{compile} -fopenmp || {compile}"]  # some compilers come without OpenMP
        cls.process = subprocess.Popen(command, cwd=cls.folder, stderr=subprocess.DEVNULL)

    @classmethod
    def _clean(cls) -> None:
        if cls.process is not None:
            cls.process.kill()
            cls.process.wait()
            cls.process = None
            shutil.rmtree(cls.folder, ignore_errors=True)
