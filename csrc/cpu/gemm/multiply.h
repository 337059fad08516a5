/* Products of rows of float32 with a weight, whatever its format and strides: what kernels see of the
 * engine in this folder, whose sources hold it once for all of them. */
#pragma once

#include "../weights/weight.h"
#include "tile.h"

namespace transom::TRANSOM_LEVEL {
namespace {

/* Floats between rows of x beyond their length: rows of a power of two would share cache sets. */
constexpr int64_t kPad = 16;

inline int64_t padded(int64_t k) { return up_to(k, kWidth) + kPad; }

/* Numbers of a block if rows of x with K numbers of `x_kind` are multiplied in integers, else 0.
 * Rows of 16 bits lose less by it than their result's rounding; float32 rows would show it, and
 * sums of few products. */
inline int64_t integer_block([[maybe_unused]] const Weight &w, [[maybe_unused]] int64_t K,
                             [[maybe_unused]] int x_kind) {
#if defined(__AVX2__)
  if (w.kind >= 0 || w.transposed || !kFormats[w.quantized.format].whole_numbers) return 0;
  if (x_kind == 0 || K < 256 || K % 64 != 0) return 0;
  for (int64_t block = 128; block >= 32; block /= 2)
    if (w.quantized.block_columns % block == 0 && K % block == 0) return block;
#endif
  return 0;
}

/* Floats between rows of x that quantize_row() may quantise. */
inline int64_t row_stride(int64_t K, int64_t block) {
  return padded(K) + (block > 0 ? up_to(2 * (K / block) + 1, kWidth) : 0);
}

}  // namespace

/* Matrix e of a call's weight, with its panels if the call brings some. */
Weight weight_at(const transom_call *call, int first, int64_t e);

/* Quantises a row of x in place, as w.integer_block wants it (integers.h); 0 leaves it. */
void quantize_row(const Weight &w, int64_t K, float *x);

/* c[r][i] = sum over k of x[r][k] * w[first + i][k]. Rows of c hold a multiple of kPanel columns
 * beyond any multiple of kWidth. l2: bytes of the second-level cache. */
void multiply(int64_t rows, int64_t K, const float *x, int64_t x_stride, const Weight &w,
              int64_t first, int64_t columns, float *c, int64_t c_stride, int64_t l2);

/* multiply() of rows that quantize_row() has seen. */
void multiply_integers(int64_t rows, int64_t K, const float *x, int64_t x_stride, const Weight &w,
                       int64_t first, int64_t columns, float *c, int64_t c_stride, int64_t l2);

}  // namespace transom::TRANSOM_LEVEL
