/* A few tokens through a matrix of GGUF blocks, y = W x + bias, without a dense W.

   A block is decoded into memory that stays in the first cache, and multiplied by each token. Sums
   are in fp32: a row has 16 partial sums for each token, which fill a wide register. */

#include "blocks.h"

enum { MOST_TOKENS = 8, WIDE = 16 };

/* sum[j] += a[i] b[i] for all i < n that leave the remainder j; inlined, so that n is a constant */
static inline __attribute__((always_inline)) void add_products(const float *restrict a,
                                                               const float *restrict b, int n,
                                                               float *restrict sum) {
  float s[WIDE];
  for (int j = 0; j < WIDE; j++) s[j] = sum[j];
  for (int i = 0; i < n; i += WIDE)
    for (int j = 0; j < WIDE; j++) s[j] = fma1(a[i + j], b[i + j], s[j]);
  for (int j = 0; j < WIDE; j++) sum[j] = s[j];
}

static inline float total(const float *sum) {
  float result = 0;
  for (int j = 0; j < WIDE; j++) result += sum[j];
  return result;
}

#define MULTIPLY(number, name, VALUES, BYTES)                                     \
  static void multiply_##name(const matrix *m, const float *x, int64_t tokens,    \
                              const real *bias, real *y) {                        \
    _Pragma("omp parallel for if (m->rows * m->row_bytes > 1 << 15)")             \
    for (int64_t r = 0; r < m->rows; r++) {                                       \
      const uint8_t *block = stored_row(m, r);                                    \
      float sum[MOST_TOKENS][WIDE] = {{0}};                                       \
      for (int64_t i = 0; i < m->inner; i += VALUES, block += BYTES) {            \
        float w[VALUES];                                                          \
        decode_##name(block, w);                                                  \
        for (int64_t t = 0; t < tokens; t++)                                      \
          add_products(w, x + t * m->inner + i, VALUES, sum[t]);                  \
      }                                                                           \
      for (int64_t t = 0; t < tokens; t++)                                        \
        y[t * m->rows + r] = store(total(sum[t]) + (bias ? load(bias[r]) : 0));   \
    }                                                                             \
  }
EACH_TYPE(MULTIPLY)

/* y (tokens, rows) from x (tokens, inner) in fp32, and bias (rows) or NULL; tokens <= 8 */
void multiply(const matrix *m, const float *x, int64_t tokens, const real *bias, real *y) {
  switch (m->type) {
#define CASE(number, name, VALUES, BYTES)   \
  case number:                              \
    multiply_##name(m, x, tokens, bias, y); \
    return;
    EACH_TYPE(CASE)
  }
}
