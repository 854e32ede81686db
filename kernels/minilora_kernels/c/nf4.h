/* Types and functions that the NF4 sources share. */

#include <stdint.h>
#include <string.h>

/* The scales of the blocks: fp32 absmax; or, with double quantisation, 8-bit codes into `map`,
   where 256 blocks share a scale `nested`, and all blocks an offset. `level` has the 16 levels of
   NF4. */
typedef struct {
  const float *absmax;
  const float *map;
  const float *nested;
  const float *offset;
  const float *level;
  const uint8_t *codes; /* NULL without double quantisation */
} scales;

/* absmax of block k */
static inline float scale(const scales *s, int64_t k) {
  return s->codes ? s->map[s->codes[k]] * s->nested[k / 256] + *s->offset : s->absmax[k];
}

/* fp32 to bf16, rounded to nearest, ties to even */
static inline uint16_t bf16(float x) {
  union {
    float value;
    uint32_t bits;
  } v = {x};
  return (v.bits + 0x7fff + (v.bits >> 16 & 1)) >> 16;
}
