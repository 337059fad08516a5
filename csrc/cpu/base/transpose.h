/* Small blocks of numbers read as their transposes, in registers. */
#pragma once

#include "vector.h"

namespace transom::TRANSOM_LEVEL {
namespace {

/* 16 bytes of each of kWidth rows: rows j, j + 4, ... in the quarters of the j-th of four calls. They
 * are assembled in registers: what goes through memory would wait for its stores. */
inline vf quarters(const char *p, int64_t bytes) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  /* The second half comes straight from memory: of two loads gcc 12 makes another shuffle. */
  return bits_as<vf>(_mm256_loadu2_m128(reinterpret_cast<const float *>(p + 4 * bytes),
                                        reinterpret_cast<const float *>(p)));
#else
  v4 some[kWidth / 4];
#pragma GCC unroll 4
  for (int g = 0; g < kWidth / 4; g++) memcpy(some + g, p + 4 * g * bytes, sizeof(v4));
#if defined(__AVX512F__)
  const auto low = __builtin_shufflevector(some[0], some[1], 0, 1, 2, 3, 4, 5, 6, 7);
  const auto high = __builtin_shufflevector(some[2], some[3], 0, 1, 2, 3, 4, 5, 6, 7);
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  return some[0];
#endif
#endif
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

/* words[j], element i: the j-th 32 bits of row i, rows `bytes` apart. */
inline void transpose_words(const char *p, int64_t bytes, vf words[4]) {
  const vf a = quarters(p, bytes), b = quarters(p + bytes, bytes);
  const vf c = quarters(p + 2 * bytes, bytes), d = quarters(p + 3 * bytes, bytes);
  const vf ab = interleave_low(a, b), cd = interleave_low(c, d);
  const vf a2 = interleave_high(a, b), c2 = interleave_high(c, d);
  words[0] = halves_low(ab, cd), words[1] = halves_high(ab, cd);
  words[2] = halves_low(a2, c2), words[3] = halves_high(a2, c2);
}

/* Neighbours along k that are transposed together. */
template <class Number>
constexpr int kNeighbours = 16 / static_cast<int>(sizeof(Number));

/* Pairs of 16-bit numbers as float32: the first ones of the pairs, and the second ones. */
template <class Number>
inline void widen_pairs(vf pairs, vf *first, vf *second);

template <>
inline void widen_pairs<bf16>(vf pairs, vf *first, vf *second) {
  *first = bits_as<vf>(bits_as<vu>(pairs) << 16);
  *second = bits_as<vf>(bits_as<vu>(pairs) & 0xffff0000u);
}

template <>
inline void widen_pairs<f16>(vf pairs, vf *first, vf *second) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const vu both = bits_as<vu>(pairs), low = both & 0xffffu, high = both >> 16;
  const __m256i apart = _mm256_permute4x64_epi64(
      _mm256_packus_epi32(bits_as<__m256i>(low), bits_as<__m256i>(high)), 0xd8);
  *first = bits_as<vf>(_mm256_cvtph_ps(_mm256_castsi256_si128(apart)));
  *second = bits_as<vf>(_mm256_cvtph_ps(_mm256_extracti128_si256(apart, 1)));
#else
  *first = widen<f16>(__builtin_convertvector(bits_as<vu>(pairs), vs));
  *second = widen<f16>(__builtin_convertvector(bits_as<vu>(pairs) >> 16, vs));
#endif
}

/* out[j], element i: w[i * stride + j] of kWidth rows, for kNeighbours numbers along k. */
template <class Number>
inline void transpose(const Number *w, int64_t stride, vf out[kNeighbours<Number>]) {
  vf words[4];
  transpose_words(reinterpret_cast<const char *>(w), stride * static_cast<int64_t>(sizeof(Number)),
             words);
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    if constexpr (sizeof(Number) == 4)
      out[j] = words[j];
    else
      widen_pairs<Number>(words[j], out + 2 * j, out + 2 * j + 1);
  }
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
