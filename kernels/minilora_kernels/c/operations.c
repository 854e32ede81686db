/* The steps of a transformer that are nothing but memory traffic, each in one pass where PyTorch takes several.

   One source for two types: values are fp32, or with -DBF16 bf16, always computed in fp32. A value is rounded where
   the plain form (minilora_kernels/ops) stores a tensor. Rows are shared among threads, and a row is summed by one thread, so
   results do not depend on their number. Matrices are contiguous; N rows of D values. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

typedef union { float value; uint32_t bits; int32_t whole; } word;

#ifdef BF16
typedef uint16_t real;
typedef float sum_of_squares;
static inline float load(real x) { word w = {.bits = (uint32_t)x << 16}; return w.value; }
static inline real store(float x) { /* to the nearest, ties to even */
  word w = {x};
  return x != x ? 0x7fc0 : (w.bits + 0x7fff + (w.bits >> 16 & 1)) >> 16;
}
#else
typedef float real;
typedef double sum_of_squares; /* a row's error in r is that of all its values */
static inline float load(real x) { return x; }
static inline real store(float x) { return x; }
#endif

static inline float rounded(float x) { return load(store(x)); }

/* a b + c, rounded once where that is as fast; elsewhere the compiler is told not to (-ffp-contract=off) */
static inline float fma1(float a, float b, float c) {
#ifdef FP_FAST_FMAF
  return fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

/* e^x = 2^n e^r with n = round(x / ln 2), |r| <= ln 2 / 2: within 2 units in the last place (Cephes' polynomial) */
static inline float exponential(float x) {
  const float integers = 12582912.0f; /* 1.5 * 2^23: floats beside it are whole, and its last bits are n */
  float c = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  word n = {fma1(c, 1.44269504f, integers)};
  float whole = n.value - integers;
  float r = fma1(whole, 2.12194440e-4f, fma1(whole, -0.693359375f, c)); /* ln 2 in two pieces */
  float p = 1.9875691500e-4f;
  p = fma1(p, r, 1.3981999507e-3f);
  p = fma1(p, r, 8.3334519073e-3f);
  p = fma1(p, r, 4.1665795894e-2f);
  p = fma1(p, r, 1.6666665459e-1f);
  p = fma1(p, r, 5.0000001201e-1f);
  word two_n = {.bits = (n.bits << 23) + 0x3f800000u};
  float y = (fma1(p, r * r, r) + 1.0f) * two_n.value;
  return x < -87.0f ? 0.0f : x > 88.0f ? INFINITY : y;
}

/* RMSNorm: y = w h, h = r x, r = 1 / sqrt(mean(x^2) + eps). `gemma` stores w - 1 and rounds once. */
void rms_norm(const real *x, const real *w, real *y, float *r, int64_t N, int64_t D, float eps, int64_t gemma) {
#pragma omp parallel for if (N * D > 1 << 15)
  for (int64_t n = 0; n < N; n++) {
    const real *x_D = x + n * D;
    real *y_D = y + n * D;
    sum_of_squares squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < D; i++) squares += (sum_of_squares)load(x_D[i]) * load(x_D[i]);
    float r_n = r[n] = 1 / sqrt(squares / D + eps);
    if (gemma)
      for (int64_t i = 0; i < D; i++) y_D[i] = store((1 + load(w[i])) * (load(x_D[i]) * r_n));
    else
      for (int64_t i = 0; i < D; i++) y_D[i] = store(load(w[i]) * rounded(load(x_D[i]) * r_n));
  }
}

/* dx = r (dh - h mean(dh h)), dh = w dy */
void rms_norm_backward(
    const real *x, const real *w, const float *r, const real *dy, real *dx, int64_t N, int64_t D, int64_t gemma) {
#pragma omp parallel for if (N * D > 1 << 15)
  for (int64_t n = 0; n < N; n++) {
    const real *x_D = x + n * D, *dy_D = dy + n * D;
    float r_n = r[n], products = 0;
#pragma omp simd reduction(+ : products)
    for (int64_t i = 0; i < D; i++) products += load(dy_D[i]) * (load(w[i]) + gemma) * load(x_D[i]);
    float mean = products * r_n / D;
    for (int64_t i = 0; i < D; i++)
      dx[n * D + i] = store(r_n * (load(dy_D[i]) * (load(w[i]) + gemma) - load(x_D[i]) * r_n * mean));
  }
}

/* dw = sum over rows of dy h */
void rms_norm_weight(const real *x, const float *r, const real *dy, float *dw, int64_t N, int64_t D) {
#pragma omp parallel for if (N * D > 1 << 15)
  for (int64_t start = 0; start < D; start += 64) {
    int64_t stop = start + 64 < D ? start + 64 : D;
    for (int64_t i = start; i < stop; i++) dw[i] = 0;
    for (int64_t n = 0; n < N; n++)
      for (int64_t i = start; i < stop; i++) dw[i] += load(dy[n * D + i]) * (load(x[n * D + i]) * r[n]);
  }
}

/* f(x) = x s(z) and its slope, s(z) = 1 / (1 + e^-z); SiLU: z = x; GELU's tanh form: z = sqrt(8 / pi) (x + a x^3) */
static inline float activation(float x, int64_t gelu, float *slope) {
  const float k = 1.5957691216f, a = 0.044715f;
  float z = gelu ? k * (x + a * x * x * x) : x, dz = gelu ? k * (1 + 3 * a * x * x) : 1;
  float s = 1 / (1 + exponential(-z));
  *slope = s + x * s * (1 - s) * dz;
  return x * s;
}

/* y = f(gate) up */
void gated(const real *gate, const real *up, real *y, int64_t N, int64_t gelu) {
#pragma omp parallel for simd if (N > 1 << 14)
  for (int64_t i = 0; i < N; i++) {
    float slope;
    y[i] = store(rounded(activation(load(gate[i]), gelu, &slope)) * load(up[i]));
  }
}

/* dup = dy f(gate), dgate = dy up f'(gate) */
void gated_backward(
    const real *gate, const real *up, const real *dy, real *dgate, real *dup, int64_t N, int64_t gelu) {
#pragma omp parallel for simd if (N > 1 << 14)
  for (int64_t i = 0; i < N; i++) {
    float slope, active = activation(load(gate[i]), gelu, &slope);
    dup[i] = store(load(dy[i]) * rounded(active));
    dgate[i] = store(rounded(load(dy[i]) * load(up[i])) * slope);
  }
}

/* Each row of logits (N, V): loss = -log softmax(row)[label]; if `wanted` the row becomes softmax(row) - onehot. */
void cross_entropy(real *logits, const int64_t *labels, float *loss, int64_t N, int64_t V, int64_t wanted) {
#pragma omp parallel for if (N * V > 1 << 15)
  for (int64_t n = 0; n < N; n++) {
    real *row = logits + n * V;
    float top = -INFINITY, sum = 0;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < V; i++) top = load(row[i]) > top ? load(row[i]) : top;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < V; i++) sum += exponential(load(row[i]) - top);
    float log_p = load(row[labels[n]]) - top - logf(sum), scale = 1 / sum;
    loss[n] = -log_p;
    if (!wanted) continue;
    for (int64_t i = 0; i < V; i++) row[i] = store(exponential(load(row[i]) - top) * scale);
    row[labels[n]] = store(expm1f(log_p)); /* p - 1 without cancellation */
  }
}

/* The causal block of attention's backward: rows are query `start + row / G`, which sees the keys up to itself.
   scores -> P = softmax(scores),  dP -> dS = P (dP - sum(P dP)),  both (N, rows, keys) in place. */
void attention_weights(real *scores, real *dP, int64_t N, int64_t rows, int64_t keys, int64_t start, int64_t G) {
#pragma omp parallel if (N * rows * keys > 1 << 15)
  {
    float *p = malloc(keys * sizeof(float));
#pragma omp for
    for (int64_t n = 0; n < N * rows; n++) {
      real *s = scores + n * keys, *d = dP + n * keys;
      int64_t seen = start + n % rows / G + 1;
      float top = -INFINITY, sum = 0, delta = 0;
#pragma omp simd reduction(max : top)
      for (int64_t i = 0; i < keys; i++) {
        p[i] = i < seen ? load(s[i]) : -INFINITY; /* to the end, so that rows are whole vectors */
        top = p[i] > top ? p[i] : top;
      }
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < keys; i++) {
        p[i] = exponential(p[i] - top);
        sum += p[i];
      }
      float scale = 1 / sum;
#pragma omp simd reduction(+ : delta)
      for (int64_t i = 0; i < keys; i++) {
        s[i] = store(p[i] * scale);
        p[i] = load(s[i]);
        delta += p[i] * load(d[i]);
      }
#pragma omp simd
      for (int64_t i = 0; i < keys; i++) d[i] = store(p[i] * (load(d[i]) - delta));
    }
    free(p);
  }
}

/* (y1, y2) = (x1 cos - x2 sin, x2 cos + x1 sin), sin times `sign`. x and y (B, heads, T, 2 half) by their strides,
   cos and sin (T, 2 half), `per_row` values further for each b */
void rotate(const real *x, const real *cos, const real *sin, real *y, const int64_t *size, const int64_t *stride_x,
            const int64_t *stride_y, int64_t half, int64_t per_row, float sign) {
#pragma omp parallel for collapse(2) if (size[0] * size[1] * size[2] * half > 1 << 14)
  for (int64_t b = 0; b < size[0]; b++)
    for (int64_t t = 0; t < size[2]; t++)
      for (int64_t h = 0; h < size[1]; h++) {
        const real *x1 = x + b * stride_x[0] + h * stride_x[1] + t * stride_x[2], *x2 = x1 + half;
        real *y1 = y + b * stride_y[0] + h * stride_y[1] + t * stride_y[2], *y2 = y1 + half;
        const real *c = cos + b * per_row + t * 2 * half, *s = sin + b * per_row + t * 2 * half;
        for (int64_t i = 0; i < half; i++) {
          float turn = sign * load(s[i]), a = load(x1[i]), e = load(x2[i]);
          y1[i] = store(rounded(a * load(c[i])) - rounded(e * turn));
          y2[i] = store(rounded(e * load(c[i])) + rounded(a * turn));
        }
      }
}
