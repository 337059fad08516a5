/* Rows of x quantised to 16 bits, for products with weights of 4 and 8 bits in integers.
 *
 * A block of a row (of the weight's group along k, at most 128) becomes whole numbers of at most
 * kMostNumber, times a power of two. A product with a weight's integers is then exact, and so is its
 * sum over the block in 32 bits, in whatever order; block by block, in rising order, it is
 * converted, scaled and added in float32. So one row has the same bits as among many.
 *
 * A row of floats is quantised in place: it becomes K numbers of 16 bits; for weights of 4 bits the
 * same stands once more as bytes, 64 of k after the other: high bytes of the even ones, low bytes of
 * these, high and low bytes of the odd ones. Behind padded(K) floats stand a power of two and the
 * sum of the numbers for each block, and whether the row could be quantised. */
#pragma once

#include "multiply.h"

#if defined(__AVX2__)

namespace transom::TRANSOM_LEVEL {
namespace {

/* Its high byte stays below 128 when its low byte is taken as signed. */
constexpr float kMostNumber = 32639.0f;
/* Codes of mxfp4 as bytes without a sign: twice the number, plus this. */
constexpr int kOffset = 12;

struct QuantizedRow {
  const int16_t *numbers;
  const int8_t *bytes;
  const float *scales;
  const int32_t *sums;
  bool quantized;
};

inline QuantizedRow quantized_row(const float *x, int64_t K, int64_t block) {
  const float *behind = x + padded(K);
  int32_t quantized;
  memcpy(&quantized, behind + 2 * (K / block), sizeof quantized);
  const void *all = x, *sums = behind + K / block;
  return {static_cast<const int16_t *>(all), static_cast<const int8_t *>(all) + 2 * K, behind,
          static_cast<const int32_t *>(sums), quantized != 0};
}

inline __m256i load_256(const void *p) {
  return _mm256_loadu_si256(static_cast<const __m256i *>(p));
}
inline __m128i load_128(const void *p) { return _mm_loadu_si128(static_cast<const __m128i *>(p)); }
inline void store_256(void *p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i *>(p), v); }

inline int32_t largest(__m256i v) {
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

inline int32_t total(__m256i v) {
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

/* The power of two of which a block's largest number, given by its bits, has at most kMostNumber;
 * 0 where there is none or its inverse could leave float32. */
inline float power_for(uint32_t most) {
  if (most == 0) return 1.0f;
  const uint32_t exponent = most >> 23;
  if (exponent < 127 - 80 || exponent > 127 + 100) return 0.0f;
  const float scale = bits_as<float>((exponent - 14) << 23);
  return bits_as<float>(most) > kMostNumber * scale ? 2.0f * scale : scale;
}

/* 32 numbers of 16 bits in two vectors -> 32 bytes: the low ones as signed numbers, and the rest by
 * 256. */
inline void split_bytes(__m256i a, __m256i b, int8_t *high, int8_t *low) {
  const __m256i low_a = _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8);
  const __m256i low_b = _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8);
  const __m256i high_a = _mm256_srai_epi16(_mm256_sub_epi16(a, low_a), 8);
  const __m256i high_b = _mm256_srai_epi16(_mm256_sub_epi16(b, low_b), 8);
  store_256(high, _mm256_permute4x64_epi64(_mm256_packs_epi16(high_a, high_b), 0xd8));
  store_256(low, _mm256_permute4x64_epi64(_mm256_packs_epi16(low_a, low_b), 0xd8));
}

/* 16 numbers of 32 bits as 16 bits each, in their order. */
inline __m256i to_16_bits(__m256i a, __m256i b) {
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
}

inline void quantize_row(WeightFormat format, int64_t block, int64_t K, float *x) {
  float *scales = x + padded(K);
  void *behind = scales + K / block, *start = x;
  int32_t *sums = static_cast<int32_t *>(behind), *quantized = sums + K / block;
  *quantized = 0;
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  for (int64_t k = 0; k < K; k += block) {
    __m256i most = _mm256_setzero_si256();
    for (int64_t i = k; i < k + block; i += 8)
      most = _mm256_max_epi32(most, _mm256_and_si256(load_256(x + i), magnitude));
    const float scale = power_for(static_cast<uint32_t>(largest(most)));
    if (scale == 0.0f) return;
    scales[k / block] = scale;
  }
  *quantized = 1;
  int16_t *numbers = static_cast<int16_t *>(start);
  for (int64_t k = 0; k < K; k += block) {
    const float scale = scales[k / block];
    const __m256 inverse = _mm256_set1_ps(1.0f / scale);
    __m256i sum = _mm256_setzero_si256();
    for (int64_t i = k; i < k + block; i += 16) {
      const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), inverse));
      const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8), inverse));
      store_256(numbers + i, to_16_bits(a, b));
      sum = _mm256_add_epi32(sum, _mm256_add_epi32(a, b));
    }
    sums[k / block] = total(sum) * (format == kMxfp4 ? kOffset : 1);
    if (format == kMxfp4) scales[k / block] = 0.5f * scale;
  }
  if (format == kInt8) return;
  int8_t *bytes = static_cast<int8_t *>(start) + 2 * K;
  for (int64_t k = 0; k < K; k += 64, bytes += 128) {
    __m256i even[4], odd[4];
    for (int i = 0; i < 4; i++) {
      const __m256i pairs = load_256(numbers + k + 16 * i);
      even[i] = _mm256_srai_epi32(_mm256_slli_epi32(pairs, 16), 16);
      odd[i] = _mm256_srai_epi32(pairs, 16);
    }
    split_bytes(to_16_bits(even[0], even[1]), to_16_bits(even[2], even[3]), bytes, bytes + 32);
    split_bytes(to_16_bits(odd[0], odd[1]), to_16_bits(odd[2], odd[3]), bytes + 64, bytes + 96);
  }
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL

#endif
