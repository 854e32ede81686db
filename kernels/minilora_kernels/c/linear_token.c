/* One token through a dense layer, y = W x + bias (generation/single_token.py).

   Each weight is read once, so that the memory decides the time. Four rows of W at a time give the
   processor four sums that do not wait for each other. */

#include "numbers.h"

enum { TOGETHER = 4 };

/* sum[r] = row r of W times x, r < count. Always inlined: with a constant `count` the sums stay in
   registers. */
static inline __attribute__((always_inline)) void multiply_rows(const real *W, const float *x,
                                                                int64_t in, int count, float *sum) {
  float s0 = 0;
  float s1 = 0;
  float s2 = 0;
  float s3 = 0;
  const real *row1 = W + (count > 1 ? in : 0);
  const real *row2 = W + (count > 2 ? 2 * in : 0);
  const real *row3 = W + (count > 3 ? 3 * in : 0);
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t i = 0; i < in; i++) {
    s0 = fma1(load(W[i]), x[i], s0);
    s1 = fma1(load(row1[i]), x[i], s1);
    s2 = fma1(load(row2[i]), x[i], s2);
    s3 = fma1(load(row3[i]), x[i], s3);
  }
  sum[0] = s0;
  sum[1] = s1;
  sum[2] = s2;
  sum[3] = s3;
}

/* y (rows) from W (rows, in), x (in) in fp32, and bias (rows) or NULL */
void linear_token(const real *W, const float *x, const real *bias, real *y, int64_t rows,
                  int64_t in) {
#pragma omp parallel for if (rows * in > 1 << 15)
  for (int64_t first = 0; first < rows; first += TOGETHER) {
    const int count = rows - first < TOGETHER ? rows - first : TOGETHER;
    float sum[TOGETHER];
    if (count == TOGETHER)
      multiply_rows(W + first * in, x, in, TOGETHER, sum);
    else
      multiply_rows(W + first * in, x, in, count, sum);
    for (int r = 0; r < count; r++) y[first + r] = store(sum[r] + (bias ? load(bias[first + r]) : 0));
  }
}
