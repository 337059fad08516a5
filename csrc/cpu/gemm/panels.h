/* The matrices that products are taken with, as sources of panels: chunks of a source are written as
 * panels into L1, one after the other, or few rows of x meet it where it is stored. */
#pragma once

#include "../weights/decode.h"
#include "few_rows_e4m3.h"
#include "tile.h"

namespace transom::TRANSOM_LEVEL {
namespace {

/* A plain matrix of one type of number. */
template <class Number>
struct Numbers {
  /* Rows of x up to which each number is used where it is read; vectors of sums for them. */
  static constexpr int64_t kFewRows = 8;
  static constexpr int kGroups = kWidth == 8 ? 2 : 1;

  const Number *data;
  int64_t row, along;

  int64_t row_bytes() const { return row * static_cast<int64_t>(sizeof(Number)); }

  void write_panel(int64_t n, int64_t columns, int64_t k, int64_t K, float *panel) const {
    transom::TRANSOM_LEVEL::write_panel(data + n * row + k * along, row, along, columns, K, panel);
  }

  Ahead ahead(int64_t n, int64_t k) const {
    constexpr int64_t size = sizeof(Number);
    Ahead out = {reinterpret_cast<const char *>(data + n * row + k * along), 0, 0, 0,
                 kLineOf<Number>};
    if (along == 1)
      out.count = kPanel, out.across = row * size, out.along = 64;
    else if (row == 1) /* a line of each step along k, kLineOf of them at a time */
      out.count = kLineOf<Number>, out.across = along * size, out.along = along * 64;
    return out;
  }

  /* Columns n, n + gap, ... at k..k+length; `following`: the columns that come next. */
  template <int G>
  void few_rows(int64_t rows, int64_t n, int64_t gap, int64_t following, int64_t k,
                int64_t length, int64_t K, const float *a, int64_t a_stride, float *c,
                int64_t c_stride, bool add) const {
    const Number *w = data + n * row + k;
    switch (rows) {
#define TRANSOM_FEW(R)                                                                           \
  case R:                                                                                        \
    transom::TRANSOM_LEVEL::few_rows<R, G>(length, a, a_stride, w, row * gap, c, c_stride, add, \
                                           K - k, data + following * row);                       \
    break;
      TRANSOM_FEW(2) TRANSOM_FEW(3) TRANSOM_FEW(4)
      TRANSOM_FEW(5) TRANSOM_FEW(6) TRANSOM_FEW(7) TRANSOM_FEW(8)
#undef TRANSOM_FEW
      default:
        transom::TRANSOM_LEVEL::few_rows<1, G>(length, a, a_stride, w, row * gap, c, c_stride, add,
                                               K - k, data + following * row);
    }
  }
};

/* The rows of a quantised matrix as columns of the product. */
template <class Format>
struct QuantizedColumns {
  static constexpr int64_t kFewRows = 1;
  /* More rows of E4M3 side by side would leave L1 before they are used up. */
  static constexpr int kGroups = Format::kNan && kWidth == 8 ? 2 : 4;

  const QuantizedMatrix &w;

  int64_t row_bytes() const { return w.row; }
  static constexpr int64_t bytes(int64_t k) { return k * 4 / Format::kCodes; }

  void write_panel(int64_t n, int64_t columns, int64_t k, int64_t K, float *panel) const {
    for (int64_t i = 0; i < kPanel; i += kWidth)
      each_column<Format, 1>(w, n + i, 1, clamp(columns - i, 0, kWidth), k, K,
                             [&](int, int64_t at, vf v) { store(panel + at * kPanel + i, v); });
  }

  Ahead ahead(int64_t n, int64_t k) const {
    return {reinterpret_cast<const char *>(w.values + n * w.row + bytes(k)), kPanel, w.row, 64,
            16 * Format::kCodes};
  }

  template <int G>
  void few_rows(int64_t, int64_t n, int64_t gap, int64_t following, int64_t k, int64_t length,
                int64_t K, const float *a, int64_t, float *c, int64_t, bool add) const {
#if defined(__AVX2__) && !defined(__AVX512F__)
    if constexpr (Format::kNan && G > 1) {
      vf sums[G];
      if (few_rows_e4m3<G>(w, n, gap, following, k, length, K, a, sums)) {
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) {
          float *to = c + g * kWidth;
          store(to, add ? load(to) + sums[g] : sums[g]);
        }
        return;
      }
    }
#endif
    /* What is read soon lies this far along the rows, or at the beginning of those that follow. */
    constexpr int64_t kSoon = 1024;
    const int64_t row = bytes(K), soon = min_of(kSoon, row);
    for (int64_t line = up_to(bytes(k), 64); line < bytes(k + length); line += 64) {
      const uint8_t *next = line + soon < row ? w.values + n * w.row + line + soon
                                              : w.values + following * w.row + line + soon - row;
      for (int64_t l = 0; l < G * kWidth; l++) __builtin_prefetch(next + l * gap * w.row, 0, 3);
    }
    vf sums[G] = {};
    each_column<Format, G>(w, n, gap, G * kWidth, k, length,
                           [&](int g, int64_t at, vf v) __attribute__((always_inline)) {
                             sums[g] += all(a[at]) * v;
                           });
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) {
      float *to = c + g * kWidth;
      store(to, add ? load(to) + sums[g] : sums[g]);
    }
  }
};

/* The same matrix with its rows along k: what a gradient in x multiplies with. */
template <class Format>
struct QuantizedRows {
  const QuantizedMatrix &w;

  void write_panel(int64_t n, int64_t columns, int64_t k, int64_t K, float *panel) const {
    /* kWidth rows of the matrix at a time are decoded as columns, in whole runs, and transposed back. */
    constexpr int64_t kRun = 4 * Format::kCodes;
    const int64_t start = n / kRun * kRun;
    const int64_t span = min_of(up_to(n + columns, kRun), w.columns) - start;
    alignas(64) float some[(kPanel + 2 * kRun) * kWidth];
    if (columns < kPanel) memset(some, 0, sizeof some);
    for (int64_t i = 0; i < K; i += kWidth) {
      const int64_t rows = min_of(kWidth, K - i);
      each_column<Format, 1>(w, k + i, 1, rows, start, span,
                             [&](int, int64_t at, vf v) { store(some + at * kWidth, v); });
      const float *first = some + (n - start) * kWidth;
      for (int64_t v = 0; v < kPanel; v += kWidth)
        for (int64_t r = 0; r < rows; r += 4) {
          vf back[4];
          transpose(first + v * kWidth + r, kWidth, back);
          for (int64_t j = 0; j < min_of(4, rows - r); j++)
            store(panel + (i + r + j) * kPanel + v, back[j]);
        }
    }
  }

  Ahead ahead(int64_t n, int64_t k) const {
    constexpr int64_t kRows = 16;
    return {reinterpret_cast<const char *>(w.values + k * w.row + n * 4 / Format::kCodes), kRows,
            w.row, kRows * w.row, kRows};
  }
};

/* c = the products of rows of x with columns of w, by panels; with `more` they are added to it. */
template <class Source>
inline void multiply_panels(const Source &w, int64_t rows, int64_t K, const float *x,
                            int64_t x_stride, int64_t first, int64_t columns, float *c,
                            int64_t c_stride, int64_t l2, bool more = false) {
  alignas(64) float panel[kDepth * kPanel];
  const int64_t panels = (columns + kPanel - 1) / kPanel;
  const int64_t chunks = max_of((K + kDepth - 1) / kDepth, 1);
  /* All of k for one panel after the other where x stays in L2 meanwhile; else all panels for a
   * chunk of k. */
  const bool k_first = rows * x_stride * 4 <= l2 / 2;
  for (int64_t i = 0; i < panels * chunks; i++) {
    const auto n_of = [&](int64_t at) { return (k_first ? at / chunks : at % panels) * kPanel; };
    const auto k_of = [&](int64_t at) { return (k_first ? at % chunks : at / panels) * kDepth; };
    const int64_t n = n_of(i), k = k_of(i), next = min_of(i + 1, panels * chunks - 1);
    const int64_t length = min_of(kDepth, K - k);
    w.write_panel(first + n, min_of(kPanel, columns - n), k, length, panel);
    multiply_panel(rows, length, x + k, x_stride, panel, kPanel, c + n, c_stride, more || k > 0,
                   w.ahead(first + n_of(next), k_of(next)));
  }
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
