/* Rows of float32 times a weight as it is stored, whatever its dtype and strides.
 *
 * Few rows of x: memory is the limit, and each number of the weight is used where it is read
 * (narrow and sweep of matrix.h). More rows: a piece of the weight is turned into a panel in L1,
 * and while that is multiplied the next piece is fetched. An element of the product has the same
 * bits either way. Internal linkage, as in vector.h. */
#pragma once

#include "matrix.h"

namespace transom::TRANSOM_LEVEL {
namespace {

/* Rows of x up to which each number of a weight is used where it is read. */
constexpr int64_t kNarrow = 8;
/* Floats between rows of x beyond their length: rows of a power of two would share cache sets. */
constexpr int64_t kPad = 16;

inline int64_t padded(int64_t k) { return up_to(k, kWidth) + kPad; }

/* A matrix w[n][k] of float32, bfloat16 or float16. */
struct Weight {
  int number; /* kind() */
  const char *data;
  int64_t row, along; /* elements between neighbours along n, along k */
};

/* Matrix e of a tensor [E,N,K]. */
inline Weight weight_at(const transom_tensor *w, int64_t e) {
  return {kind(w), static_cast<const char *>(at(w, e * w->strides[0])), w->strides[1],
          w->strides[2]};
}

/* w[n][k] read as [k][n]. */
inline Weight transposed(Weight w) {
  const int64_t row = w.row;
  w.row = w.along, w.along = row;
  return w;
}

template <int G, class Number>
inline void narrow_rows(int64_t rows, int64_t K, const float *a, int64_t a_stride, const Number *w,
                        int64_t row, float *c, int64_t c_stride, bool add, const Number *next) {
  switch (rows) {
#define TRANSOM_NARROW(R) \
  case R: narrow<R, G>(K, a, a_stride, w, row, c, c_stride, add, next); break;
    TRANSOM_NARROW(2) TRANSOM_NARROW(3) TRANSOM_NARROW(4)
    TRANSOM_NARROW(5) TRANSOM_NARROW(6) TRANSOM_NARROW(7) TRANSOM_NARROW(8)
#undef TRANSOM_NARROW
    default: narrow<1, G>(K, a, a_stride, w, row, c, c_stride, add, next);
  }
}

/* kDepth of k at a time for each group of columns; the columns that are left are returned. */
template <class Number>
inline int64_t multiply_narrow(int64_t rows, int64_t K, const float *x, int64_t x_stride,
                               const Number *w, int64_t row, int64_t columns, float *c,
                               int64_t c_stride) {
  /* Numbers of 16 bits come too fast for one sum in each element of a vector of 8. */
  constexpr int kGroups = sizeof(Number) == 2 && kWidth == 8 ? 2 : 1;
  int64_t n = 0;
  const auto group = [&]<int G>(int64_t R) __attribute__((always_inline)) {
    for (; n + G * kWidth <= columns; n += G * kWidth) {
      const Number *here = w + n * row;
      int64_t k = 0;
      do {
        const int64_t piece = min_of(kDepth, K - k);
        const Number *next = k + kDepth < K ? here + k + kDepth : here + G * kWidth * row;
        narrow_rows<G>(R, piece, x + k, x_stride, here + k, row, c + n, c_stride, k > 0, next);
        k += kDepth;
      } while (k < K);
    }
  };
  if (rows == 1 && kGroups > 1) group.template operator()<kGroups>(1);
  group.template operator()<1>(rows);
  return n;
}

template <class Number>
inline int64_t multiply_sweep(int64_t rows, int64_t K, const float *x, int64_t x_stride,
                              const Number *w, int64_t along, int64_t columns, float *c,
                              int64_t c_stride) {
  columns -= columns % kWidth;
  for (int64_t n = 0; n < columns; n += kSweep) {
    const int64_t here = min_of(kSweep, columns - n);
    int64_t k = 0;
    do {
      const int64_t piece = min_of(kDepth, K - k);
      const Number *from = w + k * along + n;
      for (int64_t r = 0; r < rows;) {
        const float *a = x + r * x_stride + k;
        float *to = c + r * c_stride + n;
        const int64_t left = rows - r;
        if (left >= 4)
          sweep<4>(piece, a, x_stride, from, along, here, to, c_stride, k > 0), r += 4;
        else if (left >= 2)
          sweep<2>(piece, a, x_stride, from, along, here, to, c_stride, k > 0), r += 2;
        else
          sweep<1>(piece, a, x_stride, from, along, here, to, c_stride, k > 0), r += 1;
      }
      k += kDepth;
    } while (k < K);
  }
  return columns;
}

template <class Number>
inline void multiply_panels(int64_t rows, int64_t K, const float *x, int64_t x_stride,
                            const Number *w, int64_t row, int64_t along, int64_t columns, float *c,
                            int64_t c_stride, int64_t l2) {
  alignas(64) float panel[kDepth * kPanel];
  const int64_t panels = (columns + kPanel - 1) / kPanel;
  const int64_t pieces = max_of((K + kDepth - 1) / kDepth, 1);
  /* All of k for one panel after the other where x stays in L2 meanwhile; else all panels for a
   * piece of k. */
  const bool k_first = rows * x_stride * 4 <= l2 / 2;
  constexpr int64_t size = sizeof(Number);
  for (int64_t i = 0; i < panels * pieces; i++) {
    const auto start = [&](int64_t at, int64_t *n, int64_t *k) {
      *n = (k_first ? at / pieces : at % panels) * kPanel;
      *k = (k_first ? at % pieces : at / panels) * kDepth;
      return w + *n * row + *k * along;
    };
    int64_t n, k, next_n, next_k;
    const Number *from = start(i, &n, &k);
    const Number *next = start(min_of(i + 1, panels * pieces - 1), &next_n, &next_k);
    const int64_t piece = min_of(kDepth, K - k);
    pack(from, row, along, min_of(kPanel, columns - n), piece, panel);
    Ahead ahead = {reinterpret_cast<const char *>(next), 0, 0, 0, kLine<Number>};
    if (along == 1)
      ahead.count = kPanel, ahead.across = row * size, ahead.along = 64;
    else if (row == 1) /* a line or two of each step along k: kLine of them at a time */
      ahead.count = kLine<Number>, ahead.across = along * size, ahead.along = along * 64;
    multiply_panel(rows, piece, x + k, x_stride, panel, kPanel, c + n, c_stride, k > 0, ahead);
  }
}

template <class Number>
inline void multiply_numbers(int64_t rows, int64_t K, const float *x, int64_t x_stride,
                             const Weight &weight, int64_t first, int64_t columns, float *c,
                             int64_t c_stride, int64_t l2) {
  const Number *w = reinterpret_cast<const Number *>(weight.data) + first * weight.row;
  int64_t done = 0;
  if (rows <= kNarrow && weight.along == 1)
    done = multiply_narrow(rows, K, x, x_stride, w, weight.row, columns, c, c_stride);
  else if (rows <= kNarrow && weight.row == 1)
    done = multiply_sweep(rows, K, x, x_stride, w, weight.along, columns, c, c_stride);
  if (done < columns)
    multiply_panels(rows, K, x, x_stride, w + done * weight.row, weight.row, weight.along,
                    columns - done, c + done, c_stride, l2);
}

/* c[r][i] = sum over k of x[r][k] * w[first + i][k]. Rows of c have room for a multiple of kPanel
 * columns beyond any multiple of kWidth. l2: bytes of the second-level cache. */
inline void multiply(int64_t rows, int64_t K, const float *x, int64_t x_stride,
                     const Weight &weight, int64_t first, int64_t columns, float *c,
                     int64_t c_stride, int64_t l2) {
  if (weight.number == 0)
    multiply_numbers<float>(rows, K, x, x_stride, weight, first, columns, c, c_stride, l2);
  else if (weight.number == 1)
    multiply_numbers<bf16>(rows, K, x, x_stride, weight, first, columns, c, c_stride, l2);
  else
    multiply_numbers<f16>(rows, K, x, x_stride, weight, first, columns, c, c_stride, l2);
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
