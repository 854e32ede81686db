/* The blocks of the quantised types of GGUF, decoded in fp32 (minilora_kernels/gguf draws them).

   The order of operations is that of the Python reference, so that the values have the same bits. */

#include <string.h>

#include "../numbers.h"

/* The types: name, values in a block, bytes in a block. The number of a type is its place here. */
#define EACH_TYPE(USE) \
  USE(0, q4_0, 32, 18) \
  USE(1, q4_1, 32, 20) \
  USE(2, q5_0, 32, 22) \
  USE(3, q5_1, 32, 24) \
  USE(4, q8_0, 32, 34) \
  USE(5, q4_k, 256, 144) \
  USE(6, q5_k, 256, 176) \
  USE(7, q6_k, 256, 210)

enum { MOST_VALUES = 256 };

/* A matrix in the bytes of a file. `heads`: heads whose rows llama.cpp permuted, or 0. */
typedef struct {
  const uint8_t *blocks;
  int64_t type;
  int64_t rows;
  int64_t inner;
  int64_t row_bytes;
  int64_t heads;
} matrix;

/* The bytes of row r of the model. Within a head, the file stores row 2i + half where the model has
   row half * d / 2 + i. */
static inline const uint8_t *stored_row(const matrix *m, int64_t r) {
  if (m->heads) {
    int64_t d = m->rows / m->heads;
    int64_t first = r - r % d;
    int64_t half = r % d / (d / 2);
    r = first + 2 * (r % (d / 2)) + half;
  }
  return m->blocks + r * m->row_bytes;
}

/* a finite fp16 number */
static inline float half_float(const uint8_t *bytes) {
  uint16_t h;
  memcpy(&h, bytes, sizeof h);
  uint32_t magnitude = h & 0x7fff;
  word normal = {.bits = (magnitude << 13) + (112u << 23)};
  word w = {magnitude < 0x400 ? (float)magnitude * 0x1p-24f : normal.value};
  w.bits |= (uint32_t)(h & 0x8000) << 16;
  return w.value;
}

static inline void decode_q4_0(const uint8_t *restrict b, float *restrict x) {
  float d = half_float(b);
  for (int j = 0; j < 16; j++) {
    x[j] = d * (float)((b[2 + j] & 15) - 8);
    x[j + 16] = d * (float)((b[2 + j] >> 4) - 8);
  }
}

static inline void decode_q4_1(const uint8_t *restrict b, float *restrict x) {
  float d = half_float(b);
  float m = half_float(b + 2);
  for (int j = 0; j < 16; j++) {
    x[j] = d * (float)(b[4 + j] & 15) + m;
    x[j + 16] = d * (float)(b[4 + j] >> 4) + m;
  }
}

/* the 32 codes of 5 bits from h, 4 bytes, and the packed lower bits, 16 bytes */
static inline void codes_of_5_bits(const uint8_t *restrict b, int32_t *restrict q) {
  uint32_t h;
  memcpy(&h, b, sizeof h);
  for (int j = 0; j < 16; j++) {
    q[j] = b[4 + j] & 15;
    q[j + 16] = b[4 + j] >> 4;
  }
  for (int j = 0; j < 32; j++) q[j] |= (int32_t)(h >> j & 1) << 4;
}

static inline void decode_q5_0(const uint8_t *restrict b, float *restrict x) {
  float d = half_float(b);
  int32_t q[32];
  codes_of_5_bits(b + 2, q);
  for (int j = 0; j < 32; j++) x[j] = d * (float)(q[j] - 16);
}

static inline void decode_q5_1(const uint8_t *restrict b, float *restrict x) {
  float d = half_float(b);
  float m = half_float(b + 2);
  int32_t q[32];
  codes_of_5_bits(b + 4, q);
  for (int j = 0; j < 32; j++) x[j] = d * (float)q[j] + m;
}

static inline void decode_q8_0(const uint8_t *restrict b, float *restrict x) {
  float d = half_float(b);
  for (int j = 0; j < 32; j++) x[j] = (float)(int8_t)b[2 + j] * d;
}

/* The scale and the minimum of group g of Q4_K and Q5_K, 6 bits each, from their 12 bytes. */
static inline void group_scales(const uint8_t *s, int g, float *scale, float *minimum) {
  if (g < 4) {
    *scale = (float)(s[g] & 63);
    *minimum = (float)(s[4 + g] & 63);
  } else {
    *scale = (float)((s[4 + g] & 15) | (s[g - 4] >> 2 & 48));
    *minimum = (float)((s[4 + g] >> 4) | (s[g] >> 2 & 48));
  }
}

static inline void decode_q4_k(const uint8_t *restrict b, float *restrict x) {
  float d = half_float(b);
  float dmin = half_float(b + 2);
  for (int g = 0; g < 8; g++) {
    float scale, minimum;
    group_scales(b + 4, g, &scale, &minimum);
    scale = d * scale;
    minimum = dmin * minimum;
    const uint8_t *q = b + 16 + 32 * (g / 2);
    int shift = 4 * (g % 2);
    for (int j = 0; j < 32; j++) x[32 * g + j] = scale * (float)(q[j] >> shift & 15) - minimum;
  }
}

static inline void decode_q5_k(const uint8_t *restrict b, float *restrict x) {
  float d = half_float(b);
  float dmin = half_float(b + 2);
  const uint8_t *h = b + 16;
  for (int g = 0; g < 8; g++) {
    float scale, minimum;
    group_scales(b + 4, g, &scale, &minimum);
    scale = d * scale;
    minimum = dmin * minimum;
    const uint8_t *q = b + 48 + 32 * (g / 2);
    int shift = 4 * (g % 2);
    for (int j = 0; j < 32; j++) {
      int code = (q[j] >> shift & 15) | (h[j] >> g & 1) << 4;
      x[32 * g + j] = scale * (float)code - minimum;
    }
  }
}

static inline void decode_q6_k(const uint8_t *restrict b, float *restrict x) {
  float d = half_float(b + 208);
  for (int run = 0; run < 8; run++) { /* 32 values, two groups */
    int t = run % 4;
    const uint8_t *low = b + 64 * (run / 4) + 32 * (t % 2);
    const uint8_t *high = b + 128 + 32 * (run / 4);
    int low_shift = 4 * (t / 2);
    int high_shift = 2 * t;
    float first = d * (float)(int8_t)b[192 + 2 * run];
    float second = d * (float)(int8_t)b[193 + 2 * run];
    for (int j = 0; j < 32; j++) {
      int code = (low[j] >> low_shift & 15) | (high[j] >> high_shift & 3) << 4;
      x[32 * run + j] = (j < 16 ? first : second) * (float)(code - 32);
    }
  }
}
