/* Backward pass of causal attention in fp32, head by head in the cache (ops/attention.py).

       S = s Q K^T        P = softmax(S)        dP = dY V^T        dS = P (dP - sum(P dP))
       dQ = s dS K        dK = s dS^T Q         dV = P^T dY

   ROWS queries at a time; their S and dP exist for the keys that they see. A tile of queries leaves
   out the keys that none of them sees. The queries of a key head are added in their order, so that
   results do not depend on the number of threads. */

#include <string.h>

#include "numbers.h"
#include "tile.h"

#ifdef _OPENMP
#include <omp.h>
static int64_t thread_number(void) { return omp_get_thread_num(); }
#else
static int64_t thread_number(void) { return 0; }
#endif

enum { ROWS = 48 };

/* values from one row b, head h and position t of a tensor to the next; channels are contiguous */
typedef struct {
  int64_t b, h, t;
} steps;

/* pointers to one head, and the memory of one thread */
typedef struct {
  const float *q, *k, *v, *dy;
  float *dq, *dk, *dv;             /* dk and dv (T, d) */
  int64_t q_t, k_t, v_t, dy_t, dq_t; /* values from one position to the next */
  float *keys, *values;            /* K and V as panels */
  float *Q, *S, *dP;               /* of a block: s Q (ROWS, d), S and dP (ROWS, width) */
} head;

/* columns, rounded up to whole tiles */
static int64_t padded(int64_t columns) { return (columns + COLUMNS - 1) / COLUMNS * COLUMNS; }

/* panels (T / COLUMNS, d, COLUMNS) from x (T, d): the transpose, in groups of COLUMNS positions */
static void transpose(const float *x, int64_t x_t, int64_t T, int64_t d, float *panels) {
  for (int64_t t = 0; t < padded(T); t++) {
    float *column = panels + t / COLUMNS * COLUMNS * d + t % COLUMNS;
    for (int64_t c = 0; c < d; c++) column[c * COLUMNS] = t < T ? x[t * x_t + c] : 0;
  }
}

/* S and dP (width) of a query that sees `visible` keys become P and dS */
static void weights(float *S, float *dP, int64_t visible, int64_t width) {
  float row_max = -INFINITY;
  float sum = 0;
  float delta = 0; /* sum(P dP) */
#pragma omp simd reduction(max : row_max)
  for (int64_t i = 0; i < visible; i++) row_max = S[i] > row_max ? S[i] : row_max;
#pragma omp simd reduction(+ : sum, delta)
  for (int64_t i = 0; i < visible; i++) {
    S[i] = exponential(S[i] - row_max);
    sum += S[i];
    delta += S[i] * dP[i];
  }
  float scale = 1 / sum;
  delta *= scale;
#pragma omp simd
  for (int64_t i = 0; i < visible; i++) {
    S[i] *= scale;
    dP[i] = S[i] * (dP[i] - delta);
  }
  memset(S + visible, 0, (width - visible) * sizeof(float));
  memset(dP + visible, 0, (width - visible) * sizeof(float));
}

/* P, dS and dq of the queries from `start` on */
static void queries(const head *x, int64_t start, int64_t rows, int64_t d, float s) {
  int64_t width = padded(start + rows);
  for (int64_t n = 0; n < rows; n++)
    for (int64_t c = 0; c < d; c++) x->Q[n * d + c] = s * x->q[(start + n) * x->q_t + c];
  for (int64_t n = 0; n < rows; n += TILE) {
    int64_t tall = least(TILE, rows - n);
    int64_t seen = start + n + tall; /* keys that the last of these queries sees */
    const float *dy = x->dy + (start + n) * x->dy_t;
    float *S = x->S + n * width;
    float *dP = x->dP + n * width;
    for (int64_t p = 0; p < seen; p += COLUMNS) {
      tile(tall, x->Q + n * d, d, 1, x->keys + p * d, COLUMNS, d, S + p, width, 0);
      tile(tall, dy, x->dy_t, 1, x->values + p * d, COLUMNS, d, dP + p, width, 0);
    }
    for (int64_t i = 0; i < tall; i++)
      weights(S + i * width, dP + i * width, start + n + i + 1, width);
    float *dq = x->dq + (start + n) * x->dq_t;
    for (int64_t c = 0; c < d; c += COLUMNS)
      tile(tall, dP, width, 1, x->k + c, x->k_t, seen, dq + c, x->dq_t, 0);
    for (int64_t i = 0; i < tall; i++)
      for (int64_t c = 0; c < d; c++) dq[i * x->dq_t + c] *= s;
  }
}

/* add to dk and dv what the queries from `start` on give */
static void keys(const head *x, int64_t start, int64_t rows, int64_t d) {
  int64_t width = padded(start + rows);
  for (int64_t m = 0; m < start + rows; m += TILE) {
    int64_t tall = least(TILE, start + rows - m);
    int64_t first = m > start ? m - start : 0; /* the first query that sees one of these keys */
    int64_t at = first * width + m;
    const float *dy = x->dy + (start + first) * x->dy_t;
    for (int64_t c = 0; c < d; c += COLUMNS) {
      tile(tall, x->S + at, 1, width, dy + c, x->dy_t, rows - first, x->dv + m * d + c, d, 1);
      tile(tall, x->dP + at, 1, width, x->Q + first * d + c, d, rows - first, x->dk + m * d + c, d,
           1);
    }
  }
}

/* dq (B, heads, T, d), dk and dv (B, heads / G, T, d) from q, dy, k and v, which have their shapes.
   dk and dv are contiguous. One thread computes all G query heads of a key head and adds them up. d is
   a multiple of COLUMNS. size: B, heads, T, d. memory: `threads` parts of `part` values, at least
   2 padded(T) d + 2 ROWS padded(T) + ROWS d each. */
void attention_backward(const float *q, const float *k, const float *v, const float *dy, float *dq,
                        float *dk, float *dv, float *memory, const int64_t *size, int64_t G,
                        const steps *q_steps, const steps *k_steps, const steps *v_steps,
                        const steps *dy_steps, const steps *dq_steps, float s, int64_t threads,
                        int64_t part) {
  int64_t kv_heads = size[1] / G;
  int64_t T = size[2];
  int64_t d = size[3];
  int64_t panels = padded(T) * d;
  int64_t block = ROWS * padded(T);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < size[0] * kv_heads; n++) {
    int64_t b = n / kv_heads;
    int64_t kv = n % kv_heads;
    float *own = memory + thread_number() * part;
    head x = {.k = k + b * k_steps->b + kv * k_steps->h,
              .v = v + b * v_steps->b + kv * v_steps->h,
              .dk = dk + n * T * d,
              .dv = dv + n * T * d,
              .q_t = q_steps->t,
              .k_t = k_steps->t,
              .v_t = v_steps->t,
              .dy_t = dy_steps->t,
              .dq_t = dq_steps->t,
              .keys = own,
              .values = own + panels,
              .S = own + 2 * panels,
              .dP = own + 2 * panels + block,
              .Q = own + 2 * panels + 2 * block};
    transpose(x.k, x.k_t, T, d, x.keys);
    transpose(x.v, x.v_t, T, d, x.values);
    memset(x.dk, 0, T * d * sizeof(float));
    memset(x.dv, 0, T * d * sizeof(float));
    for (int64_t h = kv * G; h < (kv + 1) * G; h++) {
      x.q = q + b * q_steps->b + h * q_steps->h;
      x.dy = dy + b * dy_steps->b + h * dy_steps->h;
      x.dq = dq + b * dq_steps->b + h * dq_steps->h;
      for (int64_t start = 0; start < T; start += ROWS) {
        int64_t rows = least(ROWS, T - start);
        queries(&x, start, rows, d, s);
        keys(&x, start, rows, d);
      }
    }
  }
}
