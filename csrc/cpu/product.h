/* out[m][n] = sum over k of x[m][k] * w[n][k]: rows of float32 times rows of a weight, as stored.
 *
 * Both operands run along k, so nothing is packed: a tile of R rows of x times C rows of w keeps
 * one vector of partial sums for each pair, loads each vector of x and w once, widens w in
 * registers, and adds up each vector at the end. Every sum is taken in the same order (kWidth
 * chains along a piece of k, sum(), then piece by piece) whatever the tile: the same bits for one
 * token and for thousands, and at any number of threads. A tile does R*C FMAs for R+C loads: bound
 * by FMA with many rows; with one it streams w once and is bound by memory. Internal linkage, as
 * in vector.h. */
#pragma once

#include "parallel.h"
#include "tensor.h"

namespace transom::TRANSOM_LEVEL {
namespace {

/* Rows and columns of the tile: with its operands it fills the vector registers, of which there
 * are 32 with AVX-512 and on AArch64, else 16. */
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 4, kColumns = 6;
#else
constexpr int kRows = 4, kColumns = 3;
#endif
/* Columns of a tile of one row: as many streams as the prefetchers follow. */
constexpr int kStreams = 8;
/* Elements of a row that are multiplied before their sums are added to the output's. */
constexpr int64_t kPiece = 1024;
/* Floats between rows of x beyond their length: rows of a power of two would share cache sets. */
constexpr int64_t kPad = 16;

inline int64_t padded(int64_t k) { return up_to(k, kWidth) + kPad; }

/* out[r][c] (+)= the products along k..k+K of R rows of x and C of w. */
template <class Weight, int R, int C>
inline void tile(const float *x, int64_t x_stride, const Weight *w, int64_t w_stride, int64_t K,
                 float *out, int64_t out_stride, bool add) {
  vf sums[R][C] = {};
  const int64_t whole = K - K % kWidth;
  for (int64_t k = 0; k < whole; k += kWidth) {
    vf right[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
      right[c] = load(w + c * w_stride + k);
      /* One row of x: memory is the limit. The same place of the next C rows of w, since a row is
       * often a page, where the prefetchers start anew. */
      if constexpr (R == 1) __builtin_prefetch(w + (c + C) * w_stride + k, 0, 2);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const vf left = load(x + r * x_stride + k);
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) sums[r][c] += left * right[c];
    }
  }
  if (whole < K)
    for (int c = 0; c < C; c++) {
      const vf right = load_some(w + c * w_stride + whole, K - whole);
      for (int r = 0; r < R; r++) sums[r][c] += load(x + r * x_stride + whole) * right;
    }
  float totals[R * C];
#pragma GCC unroll 32
  for (int i = 0; i + 4 <= R * C; i += 4) {
    const v4 four = sum(sums[i / C][i % C], sums[(i + 1) / C][(i + 1) % C],
                        sums[(i + 2) / C][(i + 2) % C], sums[(i + 3) / C][(i + 3) % C]);
    memcpy(totals + i, &four, sizeof four);
  }
#pragma GCC unroll 4
  for (int i = R * C / 4 * 4; i < R * C; i++) totals[i] = sum(sums[i / C][i % C]);
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
      float *to = out + r * out_stride + c;
      *to = add ? *to + totals[r * C + c] : totals[r * C + c];
    }
}

template <class Weight, int C>
inline void column(int64_t rows, const float *x, int64_t x_stride, const Weight *w,
                   int64_t w_stride, int64_t K, float *out, int64_t out_stride, bool add) {
  /* Tiles of nearly equal height: 7 rows are 4 + 3, not 6 + 1. */
  for (int64_t left = (rows + kRows - 1) / kRows; left > 0; left--) {
    const int64_t r = (rows + left - 1) / left;
    switch (r) {
      case 1: tile<Weight, 1, C>(x, x_stride, w, w_stride, K, out, out_stride, add); break;
      case 2: tile<Weight, 2, C>(x, x_stride, w, w_stride, K, out, out_stride, add); break;
      case 3: tile<Weight, 3, C>(x, x_stride, w, w_stride, K, out, out_stride, add); break;
      default: tile<Weight, 4, C>(x, x_stride, w, w_stride, K, out, out_stride, add); break;
    }
    rows -= r;
    x += r * x_stride;
    out += r * out_stride;
  }
}

/* A piece of C rows of w against all rows of x. */
template <class Weight, int C>
inline void columns_of(int64_t rows, const float *x, int64_t x_stride, const Weight *w,
                       int64_t w_stride, int64_t K, float *out, int64_t out_stride, bool add) {
  if constexpr (sizeof(Weight) == 2) {
    /* Widening in the tile takes the FMAs' ports: with several tiles it is done once, into L1. */
    if (rows > 2 * kRows) {
      alignas(64) float wide[C * kPiece];
      for (int c = 0; c < C; c++) read_numbers(w + c * w_stride, 1, K, wide + c * kPiece);
      column<float, C>(rows, x, x_stride, wide, kPiece, K, out, out_stride, add);
      return;
    }
  }
  column<Weight, C>(rows, x, x_stride, w, w_stride, K, out, out_stride, add);
}

/* x: rows of float32 with zeros up to the next multiple of the width. `more`: the products are
 * added to what out holds, those of the pieces of k before. */
template <class Weight>
inline void multiply(int64_t rows, const float *x, int64_t x_stride, int64_t columns,
                     const Weight *w, int64_t w_stride, int64_t K, float *out,
                     int64_t out_stride, bool more = false) {
  for (int64_t n = 0; n < columns;) {
    const int64_t left = columns - n;
    const int64_t wide = rows == 1 && left >= kStreams ? kStreams : left >= kColumns ? kColumns : 1;
    /* A piece of the rows of w stays in L1 while all rows of x pass by. */
    int64_t k = 0;
    do {
      const int64_t piece = min_of(kPiece, K - k);
      const Weight *right = w + n * w_stride + k;
      float *to = out + n;
      const bool add = more || k > 0;
      if (wide == kStreams)
        tile<Weight, 1, kStreams>(x + k, x_stride, right, w_stride, piece, to, out_stride, add);
      else if (wide == kColumns)
        columns_of<Weight, kColumns>(rows, x + k, x_stride, right, w_stride, piece, to, out_stride,
                                     add);
      else
        columns_of<Weight, 1>(rows, x + k, x_stride, right, w_stride, piece, to, out_stride, add);
      k += kPiece;
    } while (k < K);
    n += wide;
  }
}

/* Rows of a weight [E,N,K] with a last dim of stride 1: `first`, first + step, ... of expert e. */
inline void multiply(int64_t rows, const float *x, int64_t x_stride, const transom_tensor *weight,
                     int64_t e, int64_t first, int64_t step, int64_t columns, float *out,
                     int64_t out_stride) {
  const int64_t K = weight->shape[2], w_stride = weight->strides[1] * step;
  const int64_t at = e * weight->strides[0] + first * weight->strides[1];
  if (weight->dtype_bits == 32)
    multiply(rows, x, x_stride, columns, static_cast<const float *>(weight->data) + at, w_stride,
             K, out, out_stride);
  else if (weight->dtype_code == TRANSOM_BFLOAT)
    multiply(rows, x, x_stride, columns, static_cast<const bf16 *>(weight->data) + at, w_stride,
             K, out, out_stride);
  else
    multiply(rows, x, x_stride, columns, static_cast<const f16 *>(weight->data) + at, w_stride, K,
             out, out_stride);
}

/* Rows of x that a thread takes at once: they stay in half of its L2 while w streams by. */
inline int64_t rows_at_once(int64_t K, int64_t rows, int64_t l2) {
  const int64_t fit = l2 / 2 / (padded(K) * 4) / kRows * kRows;
  return clamp(fit, kRows, max_of(kRows, min_of(rows, 96)));
}

/* Columns of w in one task: eight tasks a thread to share, but no slivers. */
constexpr int64_t kMostColumns = 480;
inline int64_t columns_at_once(int64_t N, int64_t blocks, int64_t threads) {
  return clamp(up_to(N * blocks / (8 * threads), 24), 48, kMostColumns);
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
