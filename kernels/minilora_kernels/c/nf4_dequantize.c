/* NF4 -> fp32 or bf16 (c/nf4.py).

   A block has one scale and 16 levels: its 16 products are computed once, and the rest is copying
   by code. The first of the two codes of a byte is the high one. */

#include "nf4.h"

#ifdef __AVX512BW__
typedef uint16_t u16x32 __attribute__((vector_size(64), aligned(1), may_alias));
typedef uint8_t u8x32 __attribute__((vector_size(32), aligned(1), may_alias));
#endif

/* out (blocks * half * 2) from packed (blocks * half); half: bytes of a block */
void dequantize_float32(const uint8_t *packed, const scales *s, int64_t blocks, int64_t half,
                        float *out) {
#pragma omp parallel for if (blocks * half > 1 << 15)
  for (int64_t k = 0; k < blocks; k++) {
    float value[16];
    float absmax = scale(s, k);
    for (int c = 0; c < 16; c++) value[c] = s->level[c] * absmax;
    for (int64_t i = k * half; i < (k + 1) * half; i++) {
      out[2 * i] = value[packed[i] >> 4];
      out[2 * i + 1] = value[packed[i] & 15];
    }
  }
}

/* The same for bf16. With AVX-512 the table is in a register, and the codes permute it, 32 at a
   time. */
void dequantize_bfloat16(const uint8_t *packed, const scales *s, int64_t blocks, int64_t half,
                         uint16_t *out) {
#pragma omp parallel for if (blocks * half > 1 << 15)
  for (int64_t k = 0; k < blocks; k++) {
    union {
      uint16_t one[32];
#ifdef __AVX512BW__
      u16x32 all;
#endif
    } value; /* the 16 values, twice */
    float absmax = scale(s, k);
    for (int c = 0; c < 16; c++) value.one[c] = value.one[c + 16] = bf16(s->level[c] * absmax);
    int64_t i = k * half;
#ifdef __AVX512BW__
    for (; i + 32 <= (k + 1) * half; i += 32) {
      u16x32 bytes = __builtin_convertvector(*(const u8x32 *)(packed + i), u16x32);
      union {
        u16x32 pairs;
        u8x32 part[2];
      } code = {bytes >> 4 | (bytes & 15) << 8}; /* high, low, high, low, ... */
      for (int j = 0; j < 2; j++) {
        u16x32 index = __builtin_convertvector(code.part[j], u16x32);
        *(u16x32 *)(out + 2 * i + 32 * j) = __builtin_shuffle(value.all, index);
      }
    }
#endif
    for (; i < (k + 1) * half; i++) {
      out[2 * i] = value.one[packed[i] >> 4];
      out[2 * i + 1] = value.one[packed[i] & 15];
    }
  }
}
