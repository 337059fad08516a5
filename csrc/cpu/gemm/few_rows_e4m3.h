/* One row of x times rows of E4M3 as they are stored, with AVX2.
 *
 * Bytes of 16 rows are transposed in three rounds of interleaving: then each half of a vector holds
 * number k of eight rows, and k + 1. As float16 of 2^-8 the value they are converted on their way
 * from memory, one operation where registers would take three. */
#pragma once

#include "../weights/weight.h"
#include "tile.h"

#if defined(__AVX2__) && !defined(__AVX512F__)

namespace transom::TRANSOM_LEVEL {
namespace {

/* out[j]: numbers 2 * j and 2 * j + 1 of rows 0..7 in its first half, of rows 8..15 in its second;
 * rows `bytes` apart. */
inline __attribute__((always_inline)) void transpose_bytes(const uint8_t *p, int64_t bytes,
                                                           __m256i out[8], __m256i *largest,
                                                           __m256i *most) {
  __m256i row[8], pair[8], four[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    row[i] = _mm256_loadu2_m128i(reinterpret_cast<const __m128i *>(p + (i + 8) * bytes),
                                 reinterpret_cast<const __m128i *>(p + i * bytes));
    *largest = _mm256_max_epi8(*largest, row[i]);
    *most = _mm256_max_epu8(*most, row[i]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    pair[2 * i] = _mm256_unpacklo_epi8(row[i], row[i + 4]);
    pair[2 * i + 1] = _mm256_unpackhi_epi8(row[i], row[i + 4]);
  }
  /* four[0..3] of the even rows, four[4..7] of the odd ones */
#pragma GCC unroll 2
  for (int odd = 0; odd < 2; odd++)
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      const __m256i a = pair[2 * odd + half], b = pair[4 + 2 * odd + half];
      four[4 * odd + 2 * half] = _mm256_unpacklo_epi8(a, b);
      four[4 * odd + 2 * half + 1] = _mm256_unpackhi_epi8(a, b);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    out[2 * i] = _mm256_unpacklo_epi8(four[i], four[4 + i]);
    out[2 * i + 1] = _mm256_unpackhi_epi8(four[i], four[4 + i]);
  }
}

inline __m256i e4m3_as_f16(__m256i codes) {
  typedef int16_t Halves __attribute__((vector_size(32)));
  return bits_as<__m256i>(e4m3_as_f16(bits_as<Halves>(codes)));
}

/* The sums of G vectors of rows n, n + gap, ... over k..k+length, times their scales; false, and no
 * sums, where there is a NaN, or a scale or a block that this does not take. What comes next is
 * fetched meanwhile, as few_rows() of tile.h does. */
template <int G>
inline bool few_rows_e4m3(const QuantizedMatrix &w, int64_t n, int64_t gap, int64_t following,
                          int64_t k, int64_t length, int64_t K, const float *a, vf sums[G]) {
  constexpr int64_t kRun = 16, kLanes = G * kWidth;
  static_assert(kLanes % 16 == 0);
  if (length % kRun != 0 || w.block_columns % kRun != 0) return false;
  const int64_t bytes = gap * w.row;
  __m256i largest = _mm256_set1_epi8(-128), most = _mm256_setzero_si256();
  alignas(64) float scales[kLanes];
  alignas(64) __m256i halves[16];
  int64_t block = -1;
  for (int g = 0; g < G; g++) sums[g] = vf{};
  for (int64_t i = k; i < k + length; i += kRun) {
    if (const int64_t column = w.grid_column(i); column != block) {
      block = column;
      bool fits = true;
      for (int64_t l = 0; l < kLanes; l++) {
        const float scale = w.scale(n + l * gap, i);
        fits = fits && scale < 0x1p100f && scale > -0x1p100f;
        scales[l] = scale * kOfE4m3AsF16;
      }
      if (!fits) return false;
    }
    const int64_t soon = i + kFetched, at = soon & 63; /* a quarter of the rows with each run */
    const int64_t line = soon - at;
    const uint8_t *next = line < K ? w.values + n * w.row + line
                                   : w.values + following * w.row + line - K;
    next += at / kRun * (kLanes / 4) * bytes;
#pragma GCC unroll 2
    for (int u = 0; u < G / 2; u++) {
      for (int l = 0; l < 4; l++, next += bytes) __builtin_prefetch(next, 0, 3);
      __m256i columns[8];
      transpose_bytes(w.values + (n + u * 16 * gap) * w.row + i, bytes, columns, &largest, &most);
      const __m256i none = _mm256_setzero_si256();
#pragma GCC unroll 8
      for (int j = 0; j < 8; j++) {
        /* The codes come into the high bytes of 16 bits. */
        const __m256i low = _mm256_unpacklo_epi8(none, columns[j]);
        const __m256i high = _mm256_unpackhi_epi8(none, columns[j]);
        halves[2 * j] = e4m3_as_f16(_mm256_srai_epi16(low, 1));
        halves[2 * j + 1] = e4m3_as_f16(_mm256_srai_epi16(high, 1));
      }
      const vf left = load(scales + u * 16), right = load(scales + u * 16 + 8);
      const __m128i *from = reinterpret_cast<const __m128i *>(halves);
#pragma GCC unroll 4
      for (int j = 0; j < kRun; j++) {
        const vf x = all(a[i - k + j]);
        const vf low = bits_as<vf>(_mm256_cvtph_ps(_mm_load_si128(from + 2 * j))) * left;
        const vf high = bits_as<vf>(_mm256_cvtph_ps(_mm_load_si128(from + 2 * j + 1))) * right;
        sums[2 * u] += x * low;
        sums[2 * u + 1] += x * high;
      }
    }
  }
  /* 0x7f is the largest of bytes with a sign, 0xff of those without one. */
  const __m256i nan = _mm256_or_si256(_mm256_cmpeq_epi8(largest, _mm256_set1_epi8(0x7f)),
                                      _mm256_cmpeq_epi8(most, _mm256_set1_epi8(-1)));
  return _mm256_testz_si256(nan, nan) != 0;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL

#endif
