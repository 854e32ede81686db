/* y = W x + bias for a few rows of x, from the codes of W, without a dense W (c/nf4.py).

   The codes of W are read word by word: 32 bits are 8 weights, which share a scale. With AVX-512 a
   register holds 16 words (16 *lanes*), and its 8 *parts* are the first codes of all lanes, the
   second codes, and so on. x is copied to that order once, so that part p of the weights meets part
   p of x. */

#include <stdlib.h>
#ifdef __AVX512BW__
#include <immintrin.h>
#endif

#include "nf4.h"

enum {
  LANES = 16,   /* words of a step */
  PARTS = 8,    /* codes of a word */
  STEP = 128,   /* weights of a step: 64 bytes of codes */
  TOGETHER = 4, /* rows of x that are multiplied at the same time */
  AHEAD = 4096, /* bytes to prefetch: the processor's own prefetch stops at the end of a page */
};

typedef struct {
  const uint8_t *packed; /* W (rows, in); a row consists of full blocks */
  scales s;
  int64_t rows;
  int64_t in;
  int64_t shift; /* a block has 2^shift weights */
} matrix;

/* sum[m] = (the row of W whose codes are `packed`) times x[m], m < count. A lane of `total` adds
   the products of a word's 8 weights; their scale is applied once a step. x has the order of
   `reorder`. Always inlined: with a constant `count` the sums stay in registers. */
static inline __attribute__((always_inline)) void multiply_row(const matrix *w,
                                                               const uint8_t *packed,
                                                               const float *absmax, const float *x,
                                                               int count, float *sum) {
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
    /* past the end of the row all is zero: codes, x and absmax */
    int64_t bytes_left = w->in / 2 - t * 64;
    __mmask64 mask = bytes_left < 64 ? (1ull << bytes_left) - 1 : -1ull;
    __m512i words = _mm512_maskz_loadu_epi8(mask, packed + t * 64);
    __m512 scale = _mm512_loadu_ps(absmax + (t * STEP >> w->shift));
    scale = _mm512_permutexvar_ps(spread, scale);
    __m512 value[PARTS];
    for (int p = 0; p < PARTS; p++) /* the look-up uses the lowest four bits of an index */
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
    float scale = absmax[k >> w->shift];
    float value[PARTS];
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

/* x[i] as fp32, of an array in bf16 if `is_bf16`, else in fp32 */
static inline float at(const void *x, int64_t i, int is_bf16) {
  union {
    uint32_t bits;
    float value;
  } v = {is_bf16 ? (uint32_t)((const uint16_t *)x)[i] << 16 : 0};
  return is_bf16 ? v.value : ((const float *)x)[i];
}

/* Copy the row of x that begins at `first` to the order of the codes: lane l of part p is weight
   8 l + (p ^ 1) of a step, because the first code of a byte is the high one. */
static void reorder(const void *x, int64_t first, int64_t in, int is_bf16, float *ordered) {
  for (int64_t k = 0; k < in; k++) {
    int64_t step = k / STEP;
    int64_t part = (k ^ 1) & 7;
    int64_t lane = k % STEP / 8;
    ordered[step * STEP + part * LANES + lane] = at(x, first + k, is_bf16);
  }
}

/* y (count, rows) from x (count, in) and bias (rows) or NULL; all in bf16 if `is_bf16`, else in
   fp32. Returns 0 if there is no memory. */
int multiply(const matrix *w, const void *x, int64_t count, const void *bias, void *y,
             int is_bf16) {
  const int64_t steps = (w->in + STEP - 1) / STEP;
  const int64_t blocks = w->in >> w->shift; /* of a row */
  const size_t size = sizeof(float) * TOGETHER * steps * STEP;
  float *ordered = aligned_alloc(64, size);
  if (!ordered) return 0;
  for (int64_t first = 0; first < count; first += TOGETHER) {
    const int n = count - first < TOGETHER ? count - first : TOGETHER;
    memset(ordered, 0, size);
    for (int m = 0; m < n; m++)
      reorder(x, (first + m) * w->in, w->in, is_bf16, ordered + m * steps * STEP);
#pragma omp parallel for if (w->rows * w->in > 1 << 16)
    for (int64_t o = 0; o < w->rows; o++) {
      const uint8_t *packed = w->packed + o * w->in / 2;
      float absmax[blocks + LANES];
      float sum[TOGETHER];
      for (int64_t k = 0; k < blocks; k++) absmax[k] = scale(&w->s, o * blocks + k);
      memset(absmax + blocks, 0, sizeof(float) * LANES); /* a step may read past the last block */
      if (n == 1)
        multiply_row(w, packed, absmax, ordered, 1, sum);
      else if (n == 2)
        multiply_row(w, packed, absmax, ordered, 2, sum);
      else
        multiply_row(w, packed, absmax, ordered, TOGETHER, sum);
      for (int m = 0; m < n; m++) {
        int64_t i = (first + m) * w->rows + o;
        float value = sum[m] + (bias ? at(bias, o, is_bf16) : 0);
        if (is_bf16)
          ((uint16_t *)y)[i] = bf16(value);
        else
          ((float *)y)[i] = value;
      }
    }
  }
  free(ordered);
  return 1;
}
