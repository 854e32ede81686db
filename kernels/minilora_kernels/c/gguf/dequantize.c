/* A matrix of GGUF blocks -> fp32 or bf16 (c/gguf/call.py). */

#include "blocks.h"

#define DEQUANTIZE(number, name, VALUES, BYTES)                              \
  static void rows_##name(const matrix *m, real *out) {                      \
    _Pragma("omp parallel for if (m->rows * m->row_bytes > 1 << 15)")        \
    for (int64_t r = 0; r < m->rows; r++) {                                  \
      const uint8_t *block = stored_row(m, r);                               \
      real *row = out + r * m->inner;                                        \
      for (int64_t i = 0; i < m->inner; i += VALUES, block += BYTES) {       \
        float x[VALUES];                                                     \
        decode_##name(block, x);                                             \
        for (int j = 0; j < VALUES; j++) row[i + j] = store(x[j]);           \
      }                                                                      \
    }                                                                        \
  }
EACH_TYPE(DEQUANTIZE)

/* out (rows, inner) */
void dequantize(const matrix *m, real *out) {
  switch (m->type) {
#define CASE(number, name, VALUES, BYTES) \
  case number:                            \
    rows_##name(m, out);                  \
    return;
    EACH_TYPE(CASE)
  }
}
