#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512BW__
#include <immintrin.h>
#endif
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

/* ---- y = W x + bias for a few rows of x, without a dense W */

enum { STEP = 128, LANES = 16, PARTS = 8, TOGETHER = 4 }; /* a step's 64 bytes of codes are 16 words of 8 */
enum { AHEAD = 4096 }; /* bytes to fetch ahead: the processor itself stops at the end of a page */

typedef struct { /* W (rows, in); a row is whole blocks */
  const uint8_t *packed;
  scales s;
  int64_t rows, in, shift; /* a block is 2^shift weights */
} matrix;

/* sum[m] = the row that begins at `packed` times x[m]; a lane of `total` gathers the products of a word's 8 weights,
   which share a scale: it is applied once a step. Always inlined: with a known `count` the sums stay in registers. */
static inline __attribute__((always_inline)) void times(const matrix *w, const uint8_t *packed, const float *absmax,
                                                        const float *x, int count, float *sum) {
  const int64_t steps = (w->in + STEP - 1) / STEP;
#ifdef __AVX512BW__
  int32_t block_of[LANES];
  for (int l = 0; l < LANES; l++) block_of[l] = 8 * l >> w->shift;
  const __m512i spread = _mm512_loadu_si512(block_of);
  const __m512 level = _mm512_loadu_ps(w->s.level);
  __m512 total[TOGETHER];
  for (int m = 0; m < count; m++) total[m] = _mm512_setzero_ps();
  for (int64_t t = 0; t < steps; t++) {
    __builtin_prefetch(packed + t * 64 + AHEAD);
    int64_t left = w->in / 2 - t * 64; /* bytes; past the row all is zero: codes, x, absmax */
    __m512i words = _mm512_maskz_loadu_epi8(left < 64 ? (1ull << left) - 1 : -1ull, packed + t * 64);
    __m512 scale = _mm512_permutexvar_ps(spread, _mm512_loadu_ps(absmax + (t * STEP >> w->shift))), value[PARTS];
    for (int p = 0; p < PARTS; p++) /* of an index the lowest four bits count */
      value[p] = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * p), level);
    for (int m = 0; m < count; m++) {
      const float *part = x + (m * steps + t) * STEP;
      __m512 products = _mm512_mul_ps(value[0], _mm512_load_ps(part));
      for (int p = 1; p < PARTS; p++)
        products = _mm512_fmadd_ps(value[p], _mm512_load_ps(part + p * LANES), products);
      total[m] = _mm512_fmadd_ps(products, scale, total[m]);
    }
  }
  for (int m = 0; m < count; m++) sum[m] = _mm512_reduce_add_ps(total[m]);
#else
  float total[TOGETHER][LANES] = {0};
  for (int64_t k = 0; k < w->in; k += 8) {
    const uint8_t *word = packed + k / 2;
    float value[PARTS], scale = absmax[k >> w->shift];
    for (int p = 0; p < PARTS; p++) value[p] = w->s.level[word[p / 2] >> 4 * (p & 1) & 15];
    for (int m = 0; m < count; m++) {
      const float *part = x + (m * steps + k / STEP) * STEP + k % STEP / 8;
      float products = 0;
      for (int p = 0; p < PARTS; p++) products += value[p] * part[p * LANES];
      total[m][k / 8 % LANES] += products * scale;
    }
  }
  for (int m = 0; m < count; m++) {
    sum[m] = 0;
    for (int l = 0; l < LANES; l++) sum[m] += total[m][l];
  }
#endif
}

static inline float at(const void *x, int64_t i, int narrow) {
  union { uint32_t bits; float value; } v = {narrow ? (uint32_t)((const uint16_t *)x)[i] << 16 : 0};
  return narrow ? v.value : ((const float *)x)[i];
}

/* x (count, in), bias (rows) or NULL -> y (count, rows): bf16 if `narrow`, else fp32. Returns 0 without memory. */
int multiply(const matrix *w, const void *x, int64_t count, const void *bias, void *y, int narrow) {
  const int64_t steps = (w->in + STEP - 1) / STEP, blocks = w->in >> w->shift;
  float *laid = aligned_alloc(64, sizeof(float) * TOGETHER * steps * STEP);
  if (!laid) return 0;
  for (int64_t first = 0; first < count; first += TOGETHER) {
    const int n = count - first < TOGETHER ? count - first : TOGETHER;
    memset(laid, 0, sizeof(float) * TOGETHER * steps * STEP);
    for (int m = 0; m < n; m++) /* lane l of part p meets weight 8 l + (p ^ 1): the first code is the high one */
      for (int64_t k = 0; k < w->in; k++)
        laid[m * steps * STEP + k / STEP * STEP + ((k ^ 1) & 7) * LANES + k % STEP / 8] = at(x, (first + m) * w->in + k, narrow);
#pragma omp parallel for if (w->rows * w->in > 1 << 16)
    for (int64_t o = 0; o < w->rows; o++) {
      const uint8_t *packed = w->packed + o * w->in / 2;
      float absmax[blocks + LANES], sum[TOGETHER];
      for (int64_t k = 0; k < blocks; k++) absmax[k] = scale(&w->s, o * blocks + k);
      memset(absmax + blocks, 0, sizeof(float) * LANES); /* a step may look past the last one */
      if (n == 1) times(w, packed, absmax, laid, 1, sum);
      else if (n == 2) times(w, packed, absmax, laid, 2, sum);
      else times(w, packed, absmax, laid, TOGETHER, sum);
      for (int m = 0; m < n; m++) {
        float value = sum[m] + (bias ? at(bias, o, narrow) : 0);
        if (narrow) ((uint16_t *)y)[(first + m) * w->rows + o] = bf16(value);
        else ((float *)y)[(first + m) * w->rows + o] = value;
      }
    }
  }
  free(laid);
  return 1;
}
