/* Rotary position embeddings (ops/rope.py).

       (y1, y2) = (x1 cos - x2 sin, x2 cos + x1 sin),  sin times `sign` */

#include "numbers.h"

/* x and y: (B, heads, T, 2 half) = (size[0], size[1], size[2], 2 half), with strides in values and
   a last stride of 1. cos and sin: (T, 2 half), `batch_stride` values further for each entry of B.
*/
void rotate(const real *x, const real *cos, const real *sin, real *y, const int64_t *size,
            const int64_t *x_stride, const int64_t *y_stride, int64_t half, int64_t batch_stride,
            float sign) {
#pragma omp parallel for collapse(2) if (size[0] * size[1] * size[2] * half > 1 << 14)
  for (int64_t b = 0; b < size[0]; b++)
    for (int64_t t = 0; t < size[2]; t++)
      for (int64_t h = 0; h < size[1]; h++) {
        const real *x1 = x + b * x_stride[0] + h * x_stride[1] + t * x_stride[2];
        const real *x2 = x1 + half;
        real *y1 = y + b * y_stride[0] + h * y_stride[1] + t * y_stride[2];
        real *y2 = y1 + half;
        const real *cos_t = cos + b * batch_stride + t * 2 * half;
        const real *sin_t = sin + b * batch_stride + t * 2 * half;
        for (int64_t i = 0; i < half; i++) {
          float c = load(cos_t[i]);
          float s = sign * load(sin_t[i]);
          float v1 = load(x1[i]);
          float v2 = load(x2[i]);
          y1[i] = store(rounded(v1 * c) - rounded(v2 * s));
          y2[i] = store(rounded(v2 * c) + rounded(v1 * s));
        }
      }
}
