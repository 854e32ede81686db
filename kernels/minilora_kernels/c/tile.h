/* One tile of a product of fp32 matrices, whose sums stay in registers.

   A tile has at most 6 rows and two vectors of columns: with AVX2 its 12 sums, two vectors of B and
   one value of A fill 15 of the 16 registers. Sources with tiles are compiled with
   -ffp-contract=fast, so that a product and a sum are one instruction. */

#include <stdint.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

enum { TILE = 6, COLUMNS = 2 * LANES };

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* `tile` with a number of rows that the compiler knows */
static inline __attribute__((always_inline)) void fixed_tile(
    const int rows, const float *A, int64_t a_row, int64_t a_step, const float *B, int64_t b_row,
    int64_t depth, float *C, int64_t c_row, int add) {
  vector sum[TILE][2];
#pragma GCC unroll 6
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++)
      sum[i][j] = add ? *(const vector *)(C + i * c_row + j * LANES) : (vector){0};
  for (int64_t k = 0; k < depth; k++, A += a_step, B += b_row) {
    vector left = *(const vector *)B;
    vector right = *(const vector *)(B + LANES);
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++) {
      sum[i][0] += A[i * a_row] * left;
      sum[i][1] += A[i * a_row] * right;
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) *(vector *)(C + i * c_row + j * LANES) = sum[i][j];
}

/* C = A B, or C += A B with `add`: A (rows, depth), B (depth, COLUMNS), rows <= TILE. The value of A
   at (i, k) is A[i * a_row + k * a_step]; a row of B and of C is contiguous. */
static __attribute__((noinline)) void tile(int64_t rows, const float *A, int64_t a_row,
                                           int64_t a_step, const float *B, int64_t b_row,
                                           int64_t depth, float *C, int64_t c_row, int add) {
#define WITH(n)                                                          \
  case n:                                                                \
    fixed_tile(n, A, a_row, a_step, B, b_row, depth, C, c_row, add);     \
    break;
  switch (rows) { WITH(1) WITH(2) WITH(3) WITH(4) WITH(5) WITH(6) }
#undef WITH
}
