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

/* Rows of a weight lie at least so many bytes apart where they are read side by side. Only then has
 * each a page of its own, and the processor's prefetchers follow them all: 14.3 instead of 9 GB/s
 * for rows of 1.5 KB, of 15 that one core can read. */
constexpr int64_t kApart = 4096, kMostGap = 8;

/* G vectors of columns `gap` apart, and the gap - 1 columns that follow each, kDepth of k at a time,
 * while whole blocks of them are left. Returns the columns done. */
template <int G, class Number>
inline int64_t multiply_narrow(int64_t rows, int64_t K, const float *x, int64_t x_stride,
                               const Number *w, int64_t row, int64_t gap, int64_t columns,
                               float *c, int64_t c_stride) {
  constexpr int64_t kLanes = G * kWidth, kStride = kLanes * kMostGap;
  alignas(64) float sums[kNarrow * kStride];
  int64_t n = 0;
  for (; n + kLanes * gap <= columns; n += kLanes * gap) {
    for (int64_t i = 0; i < gap; i++) {
      const Number *here = w + (n + i) * row;
      const Number *following = i + 1 < gap ? here + row : w + (n + kLanes * gap) * row;
      float *to = gap == 1 ? c + n : sums + i * kLanes;
      const int64_t to_stride = gap == 1 ? c_stride : kStride;
      int64_t k = 0;
      do {
        narrow_rows<G>(rows, min_of(kDepth, K - k), x + k, x_stride, here + k, row * gap, to,
                       to_stride, k > 0, k + kDepth < K ? here + k + kDepth : following);
        k += kDepth;
      } while (k < K);
    }
    for (int64_t r = 0; r < rows && gap > 1; r++)
      for (int64_t i = 0; i < gap; i++)
        for (int64_t l = 0; l < kLanes; l++)
          c[r * c_stride + n + l * gap + i] = sums[r * kStride + i * kLanes + l];
  }
  return n;
}

/* Every column that fills a vector; returns how many. */
template <class Number>
inline int64_t multiply_turned(int64_t rows, int64_t K, const float *x, int64_t x_stride,
                               const Number *w, int64_t row, int64_t columns, float *c,
                               int64_t c_stride) {
  int64_t n = 0, gap = 1;
  while (gap < kMostGap && gap * row * static_cast<int64_t>(sizeof(Number)) < kApart) gap *= 2;
  for (; gap > 0; gap /= 2) {
    const auto columns_by = [&]<int G>() __attribute__((always_inline)) {
      n += multiply_narrow<G>(rows, K, x, x_stride, w + n * row, row, gap, columns - n, c + n,
                              c_stride);
    };
    /* Numbers of 16 bits come too fast for one sum in each element of a vector of 8. */
    if constexpr (sizeof(Number) == 2 && kWidth == 8)
      if (rows == 1) columns_by.template operator()<2>();
    columns_by.template operator()<1>();
  }
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
    Ahead ahead = {reinterpret_cast<const char *>(next), 0, 0, 0, kLineOf<Number>};
    if (along == 1)
      ahead.count = kPanel, ahead.across = row * size, ahead.along = 64;
    else if (row == 1) /* a line or two of each step along k: kLineOf of them at a time */
      ahead.count = kLineOf<Number>, ahead.across = along * size, ahead.along = along * 64;
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
    done = multiply_turned(rows, K, x, x_stride, w, weight.row, columns, c, c_stride);
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
