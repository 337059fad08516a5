/* Rows of float32 times a weight as it is stored, whatever its format and strides.
 *
 * Few rows of x: memory is the limit, and each number of the weight is used where it is read. More
 * rows: a piece of the weight is turned into a panel in L1, and while that is multiplied the next
 * piece is fetched. An element of the product has the same bits either way. Internal linkage, as
 * in vector.h. */
#pragma once

#include "stored.h"

namespace transom::TRANSOM_LEVEL {
namespace {

/* Floats between rows of x beyond their length: rows of a power of two would share cache sets. */
constexpr int64_t kPad = 16;

inline int64_t padded(int64_t k) { return up_to(k, kWidth) + kPad; }

/* A matrix w[n][k] of any format, its k running or, `turned`, its n. */
struct Weight {
  int number; /* kind() of a plain weight, else -1 */
  Plain plain;
  Stored stored;
  bool turned;
};

/* Matrix e of a plain tensor [E,N,K]. */
inline Weight plain_weight(const transom_tensor *w, int64_t e) {
  Weight weight = {};
  weight.number = kind(w);
  weight.plain = {static_cast<const char *>(at(w, e * w->strides[0])), w->strides[1],
                  w->strides[2]};
  return weight;
}

/* Matrix e of a weight, which stands in four arguments: one plain tensor and three times nothing,
 * or values, scales, zero points and format. */
inline Weight weight_at(const transom_call *call, int first, int64_t e) {
  if (call->args[first + 3].tag != TRANSOM_VALUE_STRING)
    return plain_weight(tensor(call, first), e);
  Weight weight = {};
  weight.number = -1;
  weight.stored = stored_at(call, first, e);
  return weight;
}

/* w[n][k] read as [k][n]. */
inline Weight transposed(Weight w) {
  const int64_t row = w.plain.row;
  w.plain.row = w.plain.along, w.plain.along = row;
  w.turned = !w.turned;
  return w;
}

/* Rows of a weight lie at least so many bytes apart where they are read side by side. Only then has
 * each a page of its own, and the processor's prefetchers follow them all: 14.3 instead of 9 GB/s
 * for rows of 1.5 KB, of 15 that one core can read. */
constexpr int64_t kApart = 4096, kMostGap = 8;

/* G vectors of columns `gap` apart, and the gap - 1 columns that follow each, kDepth of k at a
 * time, while whole blocks of them are left. Returns the columns done. */
template <int G, class Source>
inline int64_t multiply_narrow(const Source &w, int64_t rows, int64_t K, const float *x,
                               int64_t x_stride, int64_t first, int64_t gap, int64_t columns,
                               float *c, int64_t c_stride) {
  constexpr int64_t kLanes = G * kWidth, kStride = kLanes * kMostGap;
  alignas(64) float sums[Source::kNarrow * kStride];
  int64_t n = 0;
  for (; n + kLanes * gap <= columns; n += kLanes * gap) {
    for (int64_t i = 0; i < gap; i++) {
      const int64_t here = first + n + i;
      const int64_t following = i + 1 < gap ? here + 1 : first + n + kLanes * gap;
      float *to = gap == 1 ? c + n : sums + i * kLanes;
      const int64_t to_stride = gap == 1 ? c_stride : kStride;
      int64_t k = 0;
      do {
        w.template narrow<G>(rows, here, gap, following, k, min_of(kDepth, K - k), K, x + k,
                             x_stride, to, to_stride, k > 0);
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
template <class Source>
inline int64_t multiply_turned(const Source &w, int64_t rows, int64_t K, const float *x,
                               int64_t x_stride, int64_t first, int64_t columns, float *c,
                               int64_t c_stride) {
  int64_t n = 0, gap = 1;
  while (gap < kMostGap && gap * w.row_bytes() < kApart) gap *= 2;
  for (; gap > 0; gap /= 2) {
    /* One row of narrow numbers comes too fast for one sum in each element of a vector. */
    const auto columns_by = [&]<int G>() __attribute__((always_inline)) {
      if constexpr (G <= Source::kGroups)
        n += multiply_narrow<G>(w, rows, K, x, x_stride, first + n, gap, columns - n, c + n,
                                c_stride);
    };
    if (rows == 1) columns_by.template operator()<4>(), columns_by.template operator()<2>();
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

/* By panels; `more`: the products are added to what c holds. */
template <class Source>
inline void multiply_panels(const Source &w, int64_t rows, int64_t K, const float *x,
                            int64_t x_stride, int64_t first, int64_t columns, float *c,
                            int64_t c_stride, int64_t l2, bool more = false) {
  alignas(64) float panel[kDepth * kPanel];
  const int64_t panels = (columns + kPanel - 1) / kPanel;
  const int64_t pieces = max_of((K + kDepth - 1) / kDepth, 1);
  /* All of k for one panel after the other where x stays in L2 meanwhile; else all panels for a
   * piece of k. */
  const bool k_first = rows * x_stride * 4 <= l2 / 2;
  for (int64_t i = 0; i < panels * pieces; i++) {
    const auto n_of = [&](int64_t at) { return (k_first ? at / pieces : at % panels) * kPanel; };
    const auto k_of = [&](int64_t at) { return (k_first ? at % pieces : at / panels) * kDepth; };
    const int64_t n = n_of(i), k = k_of(i), next = min_of(i + 1, panels * pieces - 1);
    const int64_t piece = min_of(kDepth, K - k);
    w.pack(first + n, min_of(kPanel, columns - n), k, piece, panel);
    multiply_panel(rows, piece, x + k, x_stride, panel, kPanel, c + n, c_stride, more || k > 0,
                   w.ahead(first + n_of(next), k_of(next)));
  }
}

template <class Number>
inline void multiply_plain(const Plain &plain, int64_t rows, int64_t K, const float *x,
                           int64_t x_stride, int64_t first, int64_t columns, float *c,
                           int64_t c_stride, int64_t l2) {
  const Numbers<Number> w = {reinterpret_cast<const Number *>(plain.data), plain.row, plain.along};
  int64_t done = 0;
  if (rows <= w.kNarrow && w.along == 1)
    done = multiply_turned(w, rows, K, x, x_stride, first, columns, c, c_stride);
  else if (rows <= w.kNarrow && w.row == 1)
    done = multiply_sweep(rows, K, x, x_stride, w.data + first, w.along, columns, c, c_stride);
  if (done < columns)
    multiply_panels(w, rows, K, x, x_stride, first + done, columns - done, c + done, c_stride, l2);
}

template <class Format>
inline void multiply_stored(const Weight &weight, int64_t rows, int64_t K, const float *x,
                            int64_t x_stride, int64_t first, int64_t columns, float *c,
                            int64_t c_stride, int64_t l2) {
  if (weight.turned) {
    multiply_panels(Turned<Format>{weight.stored}, rows, K, x, x_stride, first, columns, c,
                    c_stride, l2);
    return;
  }
  const Blocks<Format> w = {weight.stored};
  int64_t done = 0;
  if (rows <= w.kNarrow)
    done = multiply_turned(w, rows, K, x, x_stride, first, columns, c, c_stride);
  if (done < columns)
    multiply_panels(w, rows, K, x, x_stride, first + done, columns - done, c + done, c_stride, l2);
}

/* c[r][i] = sum over k of x[r][k] * w[first + i][k]. Rows of c have room for a multiple of kPanel
 * columns beyond any multiple of kWidth. l2: bytes of the second-level cache. */
inline void multiply(int64_t rows, int64_t K, const float *x, int64_t x_stride, const Weight &w,
                     int64_t first, int64_t columns, float *c, int64_t c_stride, int64_t l2) {
#define TRANSOM_MULTIPLY(how, w) how(w, rows, K, x, x_stride, first, columns, c, c_stride, l2)
  switch (w.number) {
    case 0: return TRANSOM_MULTIPLY(multiply_plain<float>, w.plain);
    case 1: return TRANSOM_MULTIPLY(multiply_plain<bf16>, w.plain);
    case 2: return TRANSOM_MULTIPLY(multiply_plain<f16>, w.plain);
    default: break;
  }
  switch (w.stored.format) {
    case kInt8: return TRANSOM_MULTIPLY(multiply_stored<Int8>, w);
    case kInt4: return TRANSOM_MULTIPLY(multiply_stored<Int4>, w);
    case kFp8: return TRANSOM_MULTIPLY(multiply_stored<Fp8>, w);
    default: return TRANSOM_MULTIPLY(multiply_stored<Mxfp4>, w);
  }
#undef TRANSOM_MULTIPLY
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
