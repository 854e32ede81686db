/* RMSNorm, forward and backward, in one pass over memory each (ops/rms_norm.py).

       h = r x,  r = 1 / sqrt(mean(x^2) + eps)        y = w h
       dx = r (dh - h mean(dh h)),  dh = w dy         dw = sum over rows of dy h

   Matrices are contiguous: N rows of D values. `gemma` means that the weight is stored as w - 1,
   and that y is rounded once. One thread sums a row, so that results do not depend on the number
   of threads. */

#include "numbers.h"

/* y (N, D) and r (N) from x (N, D) and w (D) */
void rms_norm(const real *x, const real *w, real *y, float *r, int64_t N, int64_t D, float eps,
              int64_t gemma) {
#pragma omp parallel for if (N * D > 1 << 15)
  for (int64_t n = 0; n < N; n++) {
    const real *x_row = x + n * D;
    real *y_row = y + n * D;
    sum_of_squares squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < D; i++) squares += (sum_of_squares)load(x_row[i]) * load(x_row[i]);
    float r_n = r[n] = 1 / sqrt(squares / D + eps);
    if (gemma)
      for (int64_t i = 0; i < D; i++) y_row[i] = store((1 + load(w[i])) * (load(x_row[i]) * r_n));
    else
      for (int64_t i = 0; i < D; i++) y_row[i] = store(load(w[i]) * rounded(load(x_row[i]) * r_n));
  }
}

/* dx (N, D) from x (N, D), w (D), r (N) and dy (N, D) */
void rms_norm_backward(const real *x, const real *w, const float *r, const real *dy, real *dx,
                       int64_t N, int64_t D, int64_t gemma) {
#pragma omp parallel for if (N * D > 1 << 15)
  for (int64_t n = 0; n < N; n++) {
    const real *x_row = x + n * D;
    const real *dy_row = dy + n * D;
    float r_n = r[n];
    float products = 0;
#pragma omp simd reduction(+ : products)
    for (int64_t i = 0; i < D; i++)
      products += load(dy_row[i]) * (load(w[i]) + gemma) * load(x_row[i]);
    float mean = products * r_n / D; /* mean(dh h) */
    for (int64_t i = 0; i < D; i++)
      dx[n * D + i] = store(
          r_n * (load(dy_row[i]) * (load(w[i]) + gemma) - load(x_row[i]) * r_n * mean));
  }
}

/* dw (D) from x (N, D), r (N) and dy (N, D); a thread has 64 columns */
void rms_norm_weight(const real *x, const float *r, const real *dy, float *dw, int64_t N,
                     int64_t D) {
#pragma omp parallel for if (N * D > 1 << 15)
  for (int64_t start = 0; start < D; start += 64) {
    int64_t stop = start + 64 < D ? start + 64 : D;
    for (int64_t i = start; i < stop; i++) dw[i] = 0;
    for (int64_t n = 0; n < N; n++)
      for (int64_t i = start; i < stop; i++)
        dw[i] += load(dy[n * D + i]) * (load(x[n * D + i]) * r[n]);
  }
}
