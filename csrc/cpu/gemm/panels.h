/* Products with a matrix whose pieces are turned into panels in L1, one after the other. Internal
 * linkage, as in vector.h. */
#pragma once

#include "../weights/weight.h"

namespace transom::TRANSOM_LEVEL {
namespace {

/* A plain matrix of one type of number. */
template <class Number>
struct Numbers {
  /* Rows of x up to which each number is used where it is read; vectors of sums for few rows. */
  static constexpr int64_t kNarrow = 8;
  static constexpr int kGroups = kWidth == 8 ? 2 : 1;

  const Number *data;
  int64_t row, along;

  int64_t row_bytes() const { return row * static_cast<int64_t>(sizeof(Number)); }

  void pack(int64_t n, int64_t columns, int64_t k, int64_t K, float *panel) const {
    transom::TRANSOM_LEVEL::pack(data + n * row + k * along, row, along, columns, K, panel);
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

  /* Columns n, n + gap, ... at k..k+piece; `following`: the columns that come next. */
  template <int G>
  void narrow(int64_t rows, int64_t n, int64_t gap, int64_t following, int64_t k, int64_t piece,
              int64_t K, const float *a, int64_t a_stride, float *c, int64_t c_stride,
              bool add) const {
    const Number *w = data + n * row + k;
    switch (rows) {
#define TRANSOM_NARROW(R)                                                                     \
  case R:                                                                                     \
    transom::TRANSOM_LEVEL::narrow<R, G>(piece, a, a_stride, w, row * gap, c, c_stride, add, \
                                         K - k, data + following * row);                      \
    break;
      TRANSOM_NARROW(2) TRANSOM_NARROW(3) TRANSOM_NARROW(4)
      TRANSOM_NARROW(5) TRANSOM_NARROW(6) TRANSOM_NARROW(7) TRANSOM_NARROW(8)
#undef TRANSOM_NARROW
      default:
        transom::TRANSOM_LEVEL::narrow<1, G>(piece, a, a_stride, w, row * gap, c, c_stride, add,
                                             K - k, data + following * row);
    }
  }
};

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

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
