/* The weights of one block of causal attention, and the gradient of its scores, for the backward
   pass (ops/attention.py).

       P = softmax(scores)        dS = P (dP - sum(P dP)) */

#include <stdlib.h>

#include "numbers.h"

/* scores and dP (N, rows, keys) become P and dS, in place. A row belongs to the query
   `start + row / G`, which sees the keys up to itself. */
void attention_weights(real *scores, real *dP, int64_t N, int64_t rows, int64_t keys, int64_t start,
                       int64_t G) {
#pragma omp parallel if (N * rows * keys > 1 << 15)
  {
    float *p = malloc(keys * sizeof(float));
#pragma omp for
    for (int64_t n = 0; n < N * rows; n++) {
      real *s_row = scores + n * keys;
      real *d_row = dP + n * keys;
      int64_t visible = start + n % rows / G + 1; /* keys that the query sees */
      float row_max = -INFINITY;
      float sum = 0;
      float delta = 0; /* sum(P dP) */
#pragma omp simd reduction(max : row_max)
      for (int64_t i = 0; i < keys; i++) {
        p[i] = i < visible ? load(s_row[i]) : -INFINITY; /* all keys, so that loops are regular */
        row_max = p[i] > row_max ? p[i] : row_max;
      }
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < keys; i++) {
        p[i] = exponential(p[i] - row_max);
        sum += p[i];
      }
      float scale = 1 / sum;
#pragma omp simd reduction(+ : delta)
      for (int64_t i = 0; i < keys; i++) {
        s_row[i] = store(p[i] * scale);
        p[i] = load(s_row[i]);
        delta += p[i] * load(d_row[i]);
      }
#pragma omp simd
      for (int64_t i = 0; i < keys; i++) d_row[i] = store(p[i] * (load(d_row[i]) - delta));
    }
    free(p);
  }
}
