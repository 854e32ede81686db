/* Loss of a language-model head and its gradient, in place of the logits (ops/cross_entropy.py).

       loss = -log softmax(row)[label]        gradient = softmax(row) - onehot(label) */

#include "numbers.h"

/* loss (N) from logits (N, V) and labels (N); with_gradient: the logits are overwritten by it */
void cross_entropy(real *logits, const int64_t *labels, float *loss, int64_t N, int64_t V,
                   int64_t with_gradient) {
#pragma omp parallel for if (N * V > 1 << 15)
  for (int64_t n = 0; n < N; n++) {
    real *row = logits + n * V;
    float row_max = -INFINITY;
    float sum = 0;
#pragma omp simd reduction(max : row_max)
    for (int64_t i = 0; i < V; i++) row_max = load(row[i]) > row_max ? load(row[i]) : row_max;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < V; i++) sum += exponential(load(row[i]) - row_max);
    float log_p = load(row[labels[n]]) - row_max - logf(sum);
    float scale = 1 / sum;
    loss[n] = -log_p;
    if (!with_gradient) continue;
    for (int64_t i = 0; i < V; i++) row[i] = store(exponential(load(row[i]) - row_max) * scale);
    row[labels[n]] = store(expm1f(log_p)); /* p - 1 without cancellation */
  }
}
