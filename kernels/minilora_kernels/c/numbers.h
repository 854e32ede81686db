/* Number types and functions that the operations share.

   Each source is compiled twice: values are fp32, or bf16 with -DBF16. All arithmetic is in fp32. A
   value is rounded where the reference implementation (minilora_kernels/ops) stores a tensor. */

#include <math.h>
#include <stdint.h>

/* a float and its bits */
typedef union {
  float value;
  uint32_t bits;
} word;

#ifdef BF16

typedef uint16_t real;
typedef float sum_of_squares;

static inline float load(real x) {
  word w = {.bits = (uint32_t)x << 16};
  return w.value;
}

/* fp32 to bf16, rounded to nearest, ties to even; NaN stays NaN */
static inline real store(float x) {
  word w = {x};
  return x != x ? 0x7fc0 : (w.bits + 0x7fff + (w.bits >> 16 & 1)) >> 16;
}

#else

typedef float real;
typedef double sum_of_squares; /* an error in the r of a row is an error in all its values */

static inline float load(real x) { return x; }
static inline real store(float x) { return x; }

#endif

/* x rounded to the type of the values */
static inline float rounded(float x) { return load(store(x)); }

/* a b + c, rounded once where the processor does this as fast as a product. The compiler must not
   fuse a product and a sum anywhere else (-ffp-contract=off). */
static inline float fma1(float a, float b, float c) {
#ifdef FP_FAST_FMAF
  return fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

/* e^x = 2^n e^r with n = round(x / ln 2) and |r| <= ln 2 / 2. The error is at most 2 units in the
   last place (polynomial of the Cephes library). */
static inline float exponential(float x) {
  /* 1.5 * 2^23: near it, floats are integers, and their last bits are n */
  const float integers = 12582912.0f;
  float c = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  word n = {fma1(c, 1.44269504f, integers)};
  float n_value = n.value - integers;
  float r = fma1(n_value, 2.12194440e-4f, fma1(n_value, -0.693359375f, c)); /* ln 2 in two parts */
  float p = 1.9875691500e-4f;
  p = fma1(p, r, 1.3981999507e-3f);
  p = fma1(p, r, 8.3334519073e-3f);
  p = fma1(p, r, 4.1665795894e-2f);
  p = fma1(p, r, 1.6666665459e-1f);
  p = fma1(p, r, 5.0000001201e-1f);
  word two_to_n = {.bits = (n.bits << 23) + 0x3f800000u};
  float y = (fma1(p, r * r, r) + 1.0f) * two_to_n.value;
  return x < -87.0f ? 0.0f : x > 88.0f ? INFINITY : y;
}
