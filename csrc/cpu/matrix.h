/* c[r][n] (+)= sum over k of a[r][k] * b[k][n], in float32: the one inner loop of matrix products.
 *
 * b is a panel: kPanel columns wide, row after row of k. A weight is stored the other way round
 * ([N,K], k running); pack() turns a piece of it while it is widened or decoded, into L1, where all
 * rows of a use it. With few rows of a memory is the limit and `narrow` turns it in registers, on
 * its way through.
 *
 * Every sum runs along k in rising order, one fused multiply-add after the other, in pieces of
 * kDepth whose totals are added in order. So an element has the same bits whatever the tile, the
 * number of rows beside it, or the threads: narrow and wide agree to the bit. Internal linkage, as
 * in vector.h. */
#pragma once

#include "tensor.h"

namespace transom::TRANSOM_LEVEL {
namespace {

/* A tile of c stays in registers, of which AVX-512 and AArch64 have 32, others 16. */
#if defined(__AVX512F__)
constexpr int kTileRows = 12, kTileVectors = 2;
#elif defined(__aarch64__)
constexpr int kTileRows = 8, kTileVectors = 3;
#else
constexpr int kTileRows = 6, kTileVectors = 2;
#endif
constexpr int kPanel = kTileVectors * kWidth;
/* Rows of a panel: 16 KiB with AVX2, half of the smallest L1. */
constexpr int64_t kDepth = 256;

/* R rows of a times one panel. */
template <int R>
inline void tile(int64_t K, const float *a, int64_t a_stride, const float *b, int64_t b_stride,
                 float *c, int64_t c_stride, bool add) {
  vf sums[R][kTileVectors] = {};
  for (int64_t k = 0; k < K; k++) {
    vf right[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; v++) right[v] = load(b + k * b_stride + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const vf left = all(a[r * a_stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; v++) sums[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; v++) {
      float *to = c + r * c_stride + v * kWidth;
      store(to, add ? load(to) + sums[r][v] : sums[r][v]);
    }
}

/* Any number of rows of a times one panel of at most kDepth rows; c has room for kPanel columns.
 * b_stride: floats between rows of the panel, kPanel where pack() made it. */
inline void multiply_panel(int64_t rows, int64_t K, const float *a, int64_t a_stride,
                           const float *b, int64_t b_stride, float *c, int64_t c_stride,
                           bool add) {
  /* Tiles of nearly equal height: 13 rows are 7 + 6, not 12 + 1. */
  for (int64_t left = (rows + kTileRows - 1) / kTileRows; left > 0; left--) {
    const int64_t r = (rows + left - 1) / left;
#define TRANSOM_TILE(R) \
  case R: tile<R>(K, a, a_stride, b, b_stride, c, c_stride, add); break;
    switch (r) {
      TRANSOM_TILE(1) TRANSOM_TILE(2) TRANSOM_TILE(3) TRANSOM_TILE(4) TRANSOM_TILE(5)
#if defined(__AVX512F__) || defined(__aarch64__)
      TRANSOM_TILE(6) TRANSOM_TILE(7)
#endif
#if defined(__AVX512F__)
      TRANSOM_TILE(8) TRANSOM_TILE(9) TRANSOM_TILE(10) TRANSOM_TILE(11)
#endif
      default: tile<kTileRows>(K, a, a_stride, b, b_stride, c, c_stride, add);
    }
#undef TRANSOM_TILE
    rows -= r;
    a += r * a_stride;
    c += r * c_stride;
  }
}

/* Four neighbours along k of kWidth rows: rows j, j + 4, ... in the quarters of the j-th vector. */
/* Assembled in registers: pieces that go through memory would wait for their stores. */
inline vf quarters(const float *p, int64_t stride) {
  v4 some[kWidth / 4];
#pragma GCC unroll 4
  for (int g = 0; g < kWidth / 4; g++) memcpy(some + g, p + 4 * g * stride, sizeof(v4));
#if defined(__AVX512F__)
  const auto low = __builtin_shufflevector(some[0], some[1], 0, 1, 2, 3, 4, 5, 6, 7);
  const auto high = __builtin_shufflevector(some[2], some[3], 0, 1, 2, 3, 4, 5, 6, 7);
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#elif defined(__AVX2__)
  return __builtin_shufflevector(some[0], some[1], 0, 1, 2, 3, 4, 5, 6, 7);
#else
  return some[0];
#endif
}

template <class Number>
inline vf quarters(const Number *p, int64_t stride) {
  static_assert(sizeof(Number) == 2);
  typedef uint64_t Fours __attribute__((vector_size(2 * kWidth)));
  uint64_t some[kWidth / 4];
#pragma GCC unroll 4
  for (int g = 0; g < kWidth / 4; g++) memcpy(some + g, p + 4 * g * stride, sizeof some[g]);
#if defined(__AVX512F__)
  const Fours all = {some[0], some[1], some[2], some[3]};
#elif defined(__AVX2__)
  const Fours all = {some[0], some[1]};
#else
  const Fours all = {some[0]};
#endif
  return widen<Number>(bits_as<vs>(all));
}

/* In each quarter: {a0, b0, a1, b1} and {a2, b2, a3, b3}; {a0, a1, b0, b1} and {a2, a3, b2, b3}. */
#if defined(__AVX512F__)
#define TRANSOM_QUARTERS(a, b, i, j, k, l)                                                  \
  __builtin_shufflevector(a, b, i, j, k, l, i + 4, j + 4, k + 4, l + 4, i + 8, j + 8, k + 8, \
                          l + 8, i + 12, j + 12, k + 12, l + 12)
#elif defined(__AVX2__)
#define TRANSOM_QUARTERS(a, b, i, j, k, l) \
  __builtin_shufflevector(a, b, i, j, k, l, i + 4, j + 4, k + 4, l + 4)
#else
#define TRANSOM_QUARTERS(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#endif
inline vf interleave_low(vf a, vf b) { return TRANSOM_QUARTERS(a, b, 0, kWidth, 1, kWidth + 1); }
inline vf interleave_high(vf a, vf b) {
  return TRANSOM_QUARTERS(a, b, 2, kWidth + 2, 3, kWidth + 3);
}
inline vf halves_low(vf a, vf b) { return TRANSOM_QUARTERS(a, b, 0, 1, kWidth, kWidth + 1); }
inline vf halves_high(vf a, vf b) { return TRANSOM_QUARTERS(a, b, 2, 3, kWidth + 2, kWidth + 3); }
#undef TRANSOM_QUARTERS

/* turned[j][i] = w[i * stride + j]: kWidth rows, four neighbours along k. */
template <class Number>
inline void turn(const Number *w, int64_t stride, vf turned[4]) {
  const vf p = quarters(w, stride), q = quarters(w + stride, stride);
  const vf r = quarters(w + 2 * stride, stride), s = quarters(w + 3 * stride, stride);
  const vf pq = interleave_low(p, q), rs = interleave_low(r, s);
  const vf p2 = interleave_high(p, q), r2 = interleave_high(r, s);
  turned[0] = halves_low(pq, rs), turned[1] = halves_high(pq, rs);
  turned[2] = halves_low(p2, r2), turned[3] = halves_high(p2, r2);
}

/* Neighbours along k that are turned together: a line of the cache, so that each is read once. */
template <class Number>
constexpr int kLine = 64 / sizeof(Number);
/* How far ahead of its use a row of a weight is fetched: the prefetchers follow no 16 rows. */
template <class Number>
constexpr int kAhead = 512 / sizeof(Number);

template <class Number>
inline void fetch_ahead(const Number *w, int64_t row) {
  for (int i = 0; i < kWidth; i++) __builtin_prefetch(w + i * row + kAhead<Number>, 0, 3);
}

/* panel[k][i] = w[i * row + k * along] for `columns` rows of a weight, zeros up to kPanel. */
template <class Number>
inline void pack(const Number *w, int64_t row, int64_t along, int64_t columns, int64_t K,
                 float *panel) {
  if (along == 1 && columns == kPanel) {
    const int64_t whole = K - K % kLine<Number>;
    for (int v = 0; v < kTileVectors; v++) {
      const Number *from = w + v * kWidth * row;
      float *to = panel + v * kWidth;
      for (int64_t line = 0; line < whole; line += kLine<Number>) {
        fetch_ahead(from + line, row);
#pragma GCC unroll 8
        for (int64_t k = line; k < line + kLine<Number>; k += 4) {
          vf turned[4];
          turn(from + k, row, turned);
#pragma GCC unroll 4
          for (int j = 0; j < 4; j++) store(to + (k + j) * kPanel, turned[j]);
        }
      }
    }
    w += whole, panel += whole * kPanel, K -= whole;
  } else if (row == 1 && columns == kPanel) {
    for (int64_t k = 0; k < K; k++)
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; v++)
        store(panel + k * kPanel + v * kWidth, load(w + k * along + v * kWidth));
    return;
  }
  for (int64_t k = 0; k < K; k++, panel += kPanel)
    for (int64_t i = 0; i < kPanel; i += kWidth) {
      Number some[kWidth] = {};
      const int64_t n = min_of(columns - i, kWidth);
      for (int64_t j = 0; j < n; j++) some[j] = w[(i + j) * row + k * along];
      store(panel + i, load(some));
    }
}

/* R rows of a times kWidth whole rows of a weight with k running, turned in registers. */
template <int R, class Number>
inline void narrow(int64_t K, const float *a, int64_t a_stride, const Number *w, int64_t row,
                   float *c, int64_t c_stride, bool add) {
  vf sums[R] = {};
  const int64_t whole = K - K % kLine<Number>;
  for (int64_t line = 0; line < whole; line += kLine<Number>) {
    fetch_ahead(w + line, row);
#pragma GCC unroll 8
    for (int64_t k = line; k < line + kLine<Number>; k += 4) {
      vf turned[4];
      turn(w + k, row, turned);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) sums[r] += all(a[r * a_stride + k + j]) * turned[j];
    }
  }
  for (int64_t k = whole; k < K; k++) {
    Number some[kWidth];
    for (int i = 0; i < kWidth; i++) some[i] = w[i * row + k];
    for (int r = 0; r < R; r++) sums[r] += all(a[r * a_stride + k]) * load(some);
  }
  for (int r = 0; r < R; r++)
    store(c + r * c_stride, add ? load(c + r * c_stride) + sums[r] : sums[r]);
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
