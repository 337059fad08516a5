/* c[r][n] (+)= sum over k of a[r][k] * b[k][n], in float32: the one inner loop of matrix products.
 *
 * b is a panel: kPanel columns wide, row after row of k. A weight is stored the other way round
 * ([N,K], k running); write_panel() transposes a chunk of it while it is widened or decoded, into
 * L1, where all rows of a use it. With few rows of a memory is the limit, and few_rows() transposes
 * the weight in registers, on its way through.
 *
 * Every sum runs along k in rising order, one fused multiply-add after the other, in chunks of
 * kDepth whose totals are added in order. So an element has the same bits whatever the tile, the
 * number of rows beside it, or the threads, and by either way. */
#pragma once

#include "../base/tensor.h"
#include "../base/transpose.h"

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

/* Lines of the cache that are wanted next. They are fetched between multiplications, so that reading
 * and multiplying overlap: every `step` along k, `count` of them `across` bytes apart, and `along`
 * bytes further each time. */
struct Ahead {
  const char *at;
  int64_t count, across, along, step;
};

/* R rows of a times one panel. */
template <int R>
inline void tile(int64_t K, const float *a, int64_t a_stride, const float *b, int64_t b_stride,
                 float *c, int64_t c_stride, bool add, const Ahead &ahead = {}) {
  vf sums[R][kTileVectors] = {};
  const char *wanted = ahead.at;
  for (int64_t from = 0; from < K;) {
    const int64_t to = ahead.count > 0 ? min_of(from + ahead.step, K) : K;
    for (int64_t i = 0; i < ahead.count; i++) __builtin_prefetch(wanted + i * ahead.across, 0, 2);
    wanted += ahead.along;
    for (int64_t k = from; k < to; k++) {
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
    from = to;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; v++) {
      float *to = c + r * c_stride + v * kWidth;
      store(to, add ? load(to) + sums[r][v] : sums[r][v]);
    }
}

/* Any number of rows of a times one panel of at most kDepth rows; rows of c hold kPanel columns.
 * b_stride: floats between rows of the panel, kPanel where write_panel() made it. */
inline void multiply_panel(int64_t rows, int64_t K, const float *a, int64_t a_stride,
                           const float *b, int64_t b_stride, float *c, int64_t c_stride,
                           bool add, Ahead ahead = {}) {
  /* Tiles are of nearly equal height: 13 rows are 7 + 6, not 12 + 1. */
  int64_t left = (rows + kTileRows - 1) / kTileRows, wanted = ahead.count;
  for (; left > 0; left--) {
    const int64_t r = (rows + left - 1) / left;
    ahead.count = (wanted + left - 1) / left;
#define TRANSOM_TILE(R) \
  case R: tile<R>(K, a, a_stride, b, b_stride, c, c_stride, add, ahead); break;
    switch (r) {
      TRANSOM_TILE(1) TRANSOM_TILE(2) TRANSOM_TILE(3) TRANSOM_TILE(4) TRANSOM_TILE(5)
#if defined(__AVX512F__) || defined(__aarch64__)
      TRANSOM_TILE(6) TRANSOM_TILE(7)
#endif
#if defined(__AVX512F__)
      TRANSOM_TILE(8) TRANSOM_TILE(9) TRANSOM_TILE(10) TRANSOM_TILE(11)
#endif
      default: tile<kTileRows>(K, a, a_stride, b, b_stride, c, c_stride, add, ahead);
    }
#undef TRANSOM_TILE
    rows -= r;
    a += r * a_stride;
    c += r * c_stride;
    wanted -= ahead.count;
    ahead.at += ahead.count * ahead.across;
  }
}

/* Neighbours along k of one line of the cache. */
template <class Number>
constexpr int kLineOf = static_cast<int>(kLine / sizeof(Number));

/* panel[k][i] = w[i * row + k * along] for `columns` rows of a weight, zeros up to kPanel. */
template <class Number>
inline void write_panel(const Number *w, int64_t row, int64_t along, int64_t columns, int64_t K,
                 float *panel) {
  if (along == 1 && columns == kPanel) {
    const int64_t whole = K - K % kNeighbours<Number>;
    for (int v = 0; v < kTileVectors; v++) {
      const Number *from = w + v * kWidth * row;
      float *to = panel + v * kWidth;
#pragma GCC unroll 2
      for (int64_t k = 0; k < whole; k += kNeighbours<Number>) {
        vf steps[kNeighbours<Number>];
        transpose(from + k, row, steps);
#pragma GCC unroll 8
        for (int j = 0; j < kNeighbours<Number>; j++) store(to + (k + j) * kPanel, steps[j]);
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

/* How far before its use a line of each row is fetched, in bytes along the row. */
constexpr int64_t kFetched = 256;

/* R rows of a times G * kWidth whole rows of a weight with k running, transposed in registers. The
 * prefetchers of a processor do not keep up with 16 rows: lines are fetched kFetched bytes before
 * their use, one or two between multiplications, since a burst of them waits for its own misses.
 * `left`: numbers of a row from w on; beyond them the rows at `following` come next. One sum waits
 * for its last addition, so that few rows of a want more groups at a time. */
template <int R, int G, class Number>
inline void few_rows(int64_t K, const float *a, int64_t a_stride, const Number *w, int64_t row,
                   float *c, int64_t c_stride, bool add, int64_t left, const Number *following) {
  constexpr int64_t size = sizeof(Number), kWord = kNeighbours<Number> / 4;
  vf sums[G][R] = {};
  const int64_t whole = K - K % kLineOf<Number>;
  for (int64_t line = 0; line < whole; line += kLineOf<Number>) {
    const int64_t soon = line + kFetched / size;
    const Number *next = soon < left ? w + soon : following + (soon - left);
    /* The line of kWidth rows before the next ones: rows a multiple of 4 KiB apart share the sets
     * of L1, from which they would have gone before their next 16 bytes are wanted. */
#pragma GCC unroll 4
    for (int g = 0; g < G; g++)
#pragma GCC unroll 1 /* together, sums would not stay in registers */
      for (int k = 0; k < kLineOf<Number>; k += kNeighbours<Number>) {
        for (int i = 0; i < kWidth / 4; i++, next += row) __builtin_prefetch(next, 0, 3);
        vf words[4];
        transpose_words(reinterpret_cast<const char *>(w + g * kWidth * row + line + k), row * size,
                   words);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
          vf steps[kWord];
          if constexpr (kWord == 1)
            steps[0] = words[i];
          else
            widen_pairs<Number>(words[i], steps, steps + 1);
#pragma GCC unroll 2
          for (int j = 0; j < kWord; j++)
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
              sums[g][r] += all(a[r * a_stride + line + k + i * kWord + j]) * steps[j];
        }
      }
  }
  for (int64_t k = whole; k < K; k++)
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) {
      Number some[kWidth];
      for (int i = 0; i < kWidth; i++) some[i] = w[(g * kWidth + i) * row + k];
      const vf column = load(some);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) sums[g][r] += all(a[r * a_stride + k]) * column;
    }
#pragma GCC unroll 4
  for (int g = 0; g < G; g++)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      float *to = c + r * c_stride + g * kWidth;
      store(to, add ? load(to) + sums[g][r] : sums[g][r]);
    }
}

/* Columns that sweep() takes at once: its sums stay in L1. */
constexpr int64_t kSweep = 512;

/* R rows of a times rows of w along k, each with `columns` (a multiple of kWidth, at most kSweep)
 * numbers side by side: for few rows of a and a weight that is stored [K,N]. */
template <int R, class Number>
inline void sweep(int64_t K, const float *a, int64_t a_stride, const Number *w, int64_t along,
                  int64_t columns, float *c, int64_t c_stride, bool add) {
  constexpr int kTogether = 4;
  alignas(64) float sums[R][kSweep];
  for (int r = 0; r < R; r++)
    memset(sums[r], 0, static_cast<size_t>(columns) * sizeof(float));
  const auto rows = [&]<int J>(int64_t k) __attribute__((always_inline)) {
    for (int64_t i = 0; i < columns; i += kWidth) {
      vf right[J];
#pragma GCC unroll 4
      for (int j = 0; j < J; j++) {
        const Number *from = w + (k + j) * along + i;
        __builtin_prefetch(from + 2 * kTogether * along, 0, 3);
        right[j] = load(from);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        vf sum = load(sums[r] + i);
#pragma GCC unroll 4
        for (int j = 0; j < J; j++) sum += all(a[r * a_stride + k + j]) * right[j];
        store(sums[r] + i, sum);
      }
    }
  };
  int64_t k = 0;
  for (; k + kTogether <= K; k += kTogether) rows.template operator()<kTogether>(k);
  for (; k < K; k++) rows.template operator()<1>(k);
  for (int r = 0; r < R; r++)
    for (int64_t i = 0; i < columns; i += kWidth) {
      float *to = c + r * c_stride + i;
      store(to, add ? load(to) + load(sums[r] + i) : load(sums[r] + i));
    }
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
