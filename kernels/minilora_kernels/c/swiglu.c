/* Gate of an MLP (SwiGLU, GeGLU), forward and backward, in one pass over memory each
   (ops/swiglu.py).

       y = f(gate) up
       dup = dy f(gate),  dgate = dy up f'(gate) */

#include "numbers.h"

/* f(x) = x s(z) and its slope, with s(z) = 1 / (1 + e^-z). SiLU: z = x. GELU in its tanh form:
   z = sqrt(8 / pi) (x + a x^3). */
static inline float activation(float x, int64_t gelu, float *slope) {
  const float k = 1.5957691216f; /* sqrt(8 / pi) */
  const float a = 0.044715f;
  float z = gelu ? k * (x + a * x * x * x) : x;
  float dz = gelu ? k * (1 + 3 * a * x * x) : 1;
  float s = 1 / (1 + exponential(-z));
  *slope = s + x * s * (1 - s) * dz;
  return x * s;
}

/* y (N) from gate (N) and up (N) */
void gated(const real *gate, const real *up, real *y, int64_t N, int64_t gelu) {
#pragma omp parallel for simd if (N > 1 << 14)
  for (int64_t i = 0; i < N; i++) {
    float slope;
    y[i] = store(rounded(activation(load(gate[i]), gelu, &slope)) * load(up[i]));
  }
}

/* dgate (N) and dup (N) from gate (N), up (N) and dy (N) */
void gated_backward(const real *gate, const real *up, const real *dy, real *dgate, real *dup,
                    int64_t N, int64_t gelu) {
#pragma omp parallel for simd if (N > 1 << 14)
  for (int64_t i = 0; i < N; i++) {
    float slope;
    float active = activation(load(gate[i]), gelu, &slope);
    dup[i] = store(load(dy[i]) * rounded(active));
    dgate[i] = store(rounded(load(dy[i]) * load(up[i])) * slope);
  }
}
