/* A weight in panels: a copy of it in the order in which multiplications want its numbers.
 *
 * Few rows of x read a panel from its beginning to its end, with nothing to transpose on the way;
 * more rows widen chunks of it into L1. Numbers keep the width that they are stored in. (float32,
 * which has nothing to widen, would gain too little for a second copy of it.) kSteps neighbours
 * along k of a column stand side by side, then the same of the next column, kPanel of them, then the
 * next kSteps of k; kSteps is what widens for the least. Beyond the last column and the last k stand
 * zeros. Products have the same bits as those of the weight as it is stored. */
#pragma once

#include "panels.h"

namespace transom::TRANSOM_LEVEL {
namespace {

/* How a format's panels are made of `Unit`s, as wide as its numbers; decode() gives kSteps rows of a
 * panel as float32. */
struct F16Panels {
  typedef f16 Unit;
  static constexpr int kSteps = 1;
  static constexpr bool kScaled = false;

  static inline __attribute__((always_inline)) void decode(const char *from, const float *,
                                                           vf out[kSteps][kTileVectors]) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; v++)
      out[0][v] = load(reinterpret_cast<const f16 *>(from) + v * kWidth);
  }
};

/* Pairs become float32 by a shift and a mask; single numbers would want a shuffle too. */
struct Bf16Panels {
  typedef bf16 Unit;
  static constexpr int kSteps = 2;
  static constexpr bool kScaled = false;

  static inline __attribute__((always_inline)) void decode(const char *from, const float *,
                                                           vf out[kSteps][kTileVectors]) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; v++)
      widen_pairs<bf16>(load(reinterpret_cast<const float *>(from) + v * kWidth), &out[0][v],
                        &out[1][v]);
  }
};

/* E4M3 without NaN, in blocks whose scales a float16 of 2^-8 the value leaves in float32. */
struct Fp8Panels {
  typedef uint8_t Unit;
  static constexpr bool kScaled = true;

#if defined(__AVX2__) && !defined(__AVX512F__)
  static constexpr int kSteps = 2;

  /* Both bytes of a pair become float16 of 2^-8 the value where they stand, so that neither crosses
   * a half of the vector, and are converted on their way from memory: one operation, where
   * registers would take three. */
  static inline __attribute__((always_inline)) void decode(const char *from, const float *scales,
                                                           vf out[kSteps][kTileVectors]) {
    static_assert(kTileVectors == 2);
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
    /* The signed low byte times 128 in one operation, where a shift up and one down are two. */
    const __m256i low = _mm256_maddubs_epi16(_mm256_set1_epi16(128), pairs);
    __m256i halves[kSteps] = {e4m3_as_f16(low), e4m3_as_f16(_mm256_srai_epi16(pairs, 1))};
    asm("" : "+m"(halves));
#pragma GCC unroll 2
    for (int s = 0; s < kSteps; s++)
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; v++)
        out[s][v] = bits_as<vf>(_mm256_cvtph_ps(_mm_load_si128(
                        reinterpret_cast<const __m128i *>(halves + s) + v))) *
                    load(scales + v * kWidth);
  }
#else
  static constexpr int kSteps = Fp8::kCodes;

  static inline __attribute__((always_inline)) void decode(const char *from, const float *scales,
                                                           vf out[kSteps][kTileVectors]) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; v++) {
      vu word;
      memcpy(&word, from + v * static_cast<int64_t>(sizeof word), sizeof word);
      const vf scale = load(scales + v * kWidth);
      Fp8::decode<false>(word, vu{}, [&](int j, vf number) __attribute__((always_inline)) {
        out[j][v] = number * scale;
      });
    }
  }
#endif
};

template <class Format>
constexpr int64_t kGroup = Format::kSteps * kPanel * sizeof(typename Format::Unit);

template <class Format>
inline int64_t panel_bytes(int64_t K) {
  return up_to(up_to(K, Format::kSteps) / Format::kSteps * kGroup<Format>, kLine);
}

template <class Format>
inline int64_t matrix_bytes(int64_t N, int64_t K) {
  return up_to(N, kPanel) / kPanel * panel_bytes<Format>(K);
}

/* Bytes before the panels: by matrix, whether its panels hold all of it. */
inline int64_t flag_bytes(int64_t E) { return up_to(E, kLine); }

/* K of a weight whose values stand in a tensor [E,N,K], or in one of bytes. */
inline int64_t depth(const Weight &w, const transom_tensor *values) {
  return w.kind >= 0 ? values->shape[2] : w.quantized.columns;
}

/* use(format) with the panels that a weight would have, if it would have some. */
template <class Use>
inline void with_panels_of(const Weight &w, Use use) {
  if (w.kind == 1) {
    use(Bf16Panels());
  } else if (w.kind == 2) {
    use(F16Panels());
  } else if (w.kind < 0 && w.quantized.format == kFp8 &&
             w.quantized.block_columns % Fp8Panels::kSteps == 0) { /* of which all have one scale */
    use(Fp8Panels());
  }
}

/* How far before its use a line of a panel is fetched, in bytes. */
constexpr int64_t kSoon = 4096;

template <class Format>
struct WeightPanels {
  const Weight &w;
  int64_t K, bytes; /* of a panel */

  WeightPanels(const Weight &weight, int64_t k) : w(weight), K(k), bytes(panel_bytes<Format>(k)) {}

  /* Row k of the panel that begins with column n. */
  const char *at(int64_t n, int64_t k) const {
    return w.panels + n / kPanel * bytes + k / Format::kSteps * kGroup<Format>;
  }

  /* Where another block begins, or `to`. */
  int64_t block_end(int64_t k, int64_t to) const {
    if constexpr (!Format::kScaled) return to;
    const QuantizedMatrix &s = w.quantized;
    return s.block_columns == 0 ? to : min_of(to, (s.grid_column(k) + 1) * s.block_columns);
  }

  /* Of the columns of a panel in the block of k; decode() gives 2^-8 the value. */
  void scales(int64_t n, int64_t k, float *to) const {
    if constexpr (Format::kScaled) {
      const int64_t last = min_of(n + kPanel, w.columns) - 1;
      if (w.quantized.grid_row(n) == w.quantized.grid_row(last)) {
        const vf scale = all(w.quantized.scale(n, k) * Fp8::kFactor);
        for (int64_t i = 0; i < kPanel; i += kWidth) store(to + i, scale);
      } else {
        for (int64_t i = 0; i < kPanel; i++)
          to[i] = w.quantized.scale(min_of(n + i, last), k) * Fp8::kFactor;
      }
    }
  }

  /* As multiply_panels() asks for it. */
  void write_panel(int64_t n, int64_t, int64_t k, int64_t length, float *panel) const {
    alignas(64) float factors[kPanel];
    const int64_t to = k + length;
    while (k < to) {
      const int64_t stop = block_end(k, to);
      scales(n, k, factors);
      const char *from = at(n, k);
      const auto group = [&](int64_t steps) __attribute__((always_inline)) {
        vf rows[Format::kSteps][kTileVectors];
        Format::decode(from, factors, rows);
#pragma GCC unroll 4
        for (int s = 0; s < steps; s++)
#pragma GCC unroll 4
          for (int v = 0; v < kTileVectors; v++)
            store(panel + s * kPanel + v * kWidth, rows[s][v]);
        k += steps, from += kGroup<Format>, panel += steps * kPanel;
      };
      while (k + Format::kSteps <= stop) group(Format::kSteps);
      if (k < stop) group(stop - k);
    }
  }

  Ahead ahead(int64_t n, int64_t k) const {
    constexpr int64_t kLines = 8;
    return {at(n, k), kLines, kLine, kLines * kLine,
            kLines * kLine / kGroup<Format> * Format::kSteps};
  }

  /* R rows of x times G panels from column n on, side by side, for k..to. A sum waits for its last
   * addition, so that few rows want several panels. */
  template <int R, int G>
  void few_rows(int64_t n, int64_t k, int64_t to, const float *a, int64_t a_stride, float *c,
                int64_t c_stride, bool add) const {
    constexpr int64_t kSteps = Format::kSteps;
    constexpr int64_t kGroups = kLine > kGroup<Format> ? kLine / kGroup<Format> : 1; /* at a time */
    alignas(64) float factors[G][kPanel];
    vf sums[R][G][kTileVectors] = {};
    const auto step = [&]<int kOf>(const char *from,
                                   const float *x) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) {
        vf rows[kSteps][kTileVectors];
        Format::decode(from + g * bytes, factors[g], rows);
#pragma GCC unroll 4
        for (int s = 0; s < kOf; s++)
#pragma GCC unroll 16
          for (int r = 0; r < R; r++) {
            const vf left = all(x[r * a_stride + s]);
#pragma GCC unroll 4
            for (int v = 0; v < kTileVectors; v++) sums[r][g][v] += left * rows[s][v];
          }
      }
    };
    while (k < to) {
      const int64_t stop = block_end(k, to);
      for (int g = 0; g < G; g++) scales(n + g * kPanel, k, factors[g]);
      const char *from = at(n, k), *end = at(n, 0) + bytes;
      for (; k + kGroups * kSteps <= stop; k += kGroups * kSteps) {
        const char *soon = from + kSoon;
        if (soon >= end) soon += (G - 1) * bytes; /* of the panels that come next */
#pragma GCC unroll 4
        for (int g = 0; g < G; g++)
#pragma GCC unroll 4
          for (int64_t i = 0; i < kGroups * kGroup<Format>; i += kLine)
            __builtin_prefetch(soon + g * bytes + i, 0, 3);
#pragma GCC unroll 4
        for (int i = 0; i < kGroups; i++, from += kGroup<Format>, a += kSteps)
          step.template operator()<kSteps>(from, a);
      }
      for (; k + kSteps <= stop; k += kSteps, from += kGroup<Format>, a += kSteps)
        step.template operator()<kSteps>(from, a);
      if constexpr (kSteps == 2) {
        if (k < stop) step.template operator()<1>(from, a);
      } else if constexpr (kSteps == 4) {
        if (stop - k == 1) step.template operator()<1>(from, a);
        if (stop - k == 2) step.template operator()<2>(from, a);
        if (stop - k == 3) step.template operator()<3>(from, a);
      }
      k = stop;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int g = 0; g < G; g++)
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; v++) {
          float *at = c + r * c_stride + g * kPanel + v * kWidth;
          store(at, add ? load(at) + sums[r][g][v] : sums[r][g][v]);
        }
  }
};

/* multiply() by the panels, from a column on with which one begins. */
template <class Format>
inline void multiply_weight_panels(const Weight &weight, int64_t rows, int64_t K, const float *x,
                                   int64_t x_stride, int64_t first, int64_t columns, float *c,
                                   int64_t c_stride, int64_t l2) {
  const WeightPanels<Format> w(weight, K);
  if (rows > kTileRows) {
    multiply_panels(w, rows, K, x, x_stride, first, columns, c, c_stride, l2);
    return;
  }
  int64_t n = 0;
  const auto columns_by = [&]<int R, int G>() __attribute__((always_inline)) {
    for (; n + (G - 1) * kPanel < columns; n += G * kPanel)
      for (int64_t k = 0; k < K; k += kDepth)
        w.template few_rows<R, G>(first + n, k, min_of(k + kDepth, K), x + k, x_stride, c + n,
                                c_stride, k > 0);
  };
  switch (rows) {
    case 1:
      columns_by.template operator()<1, 4>();
      columns_by.template operator()<1, 2>();
      columns_by.template operator()<1, 1>();
      break;
#define TRANSOM_ROWS(R, G)                                 \
  case R:                                                  \
    if constexpr (R <= kTileRows) {                        \
      if constexpr (G > 1) columns_by.template operator()<R, G>(); \
      columns_by.template operator()<R, 1>();              \
    }                                                      \
    break;
    TRANSOM_ROWS(2, 2) TRANSOM_ROWS(3, 2) TRANSOM_ROWS(4, 1) TRANSOM_ROWS(5, 1)
    TRANSOM_ROWS(6, 1) TRANSOM_ROWS(7, 1) TRANSOM_ROWS(8, 1) TRANSOM_ROWS(9, 1)
    TRANSOM_ROWS(10, 1) TRANSOM_ROWS(11, 1) TRANSOM_ROWS(12, 1)
#undef TRANSOM_ROWS
    default: break;
  }
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
