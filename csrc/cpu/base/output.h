/* Outputs so large that nobody finds them in the caches again are stored past them: half the traffic,
 * since a line that is written whole is not read first. Internal linkage, as in vector.h. */
#pragma once

#include "parallel.h"
#include "tensor.h"

namespace transom::TRANSOM_LEVEL {
namespace {

/* Whether an output of rows of a whole number of lines is better stored past the caches; asks the
 * system for its memory. What the system has yet to provide comes by way of the caches. */
inline bool goes_past_caches(const transom_tensor *out, int64_t rows, int64_t length) {
  const int64_t row = length * size_of(out), bytes = rows * row;
  return about_to_write(out->data, bytes) && bytes > 8 * l2_bytes() && row % kLine == 0 &&
         reinterpret_cast<uintptr_t>(out->data) % kLine == 0;
}

/* kWidth numbers past the caches, to an address that is aligned to their size; fence() comes last.
 * Plain stores where the processor has no others of this width. */
inline void stream(float *to, vf v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, bits_as<__m512>(v));
#elif defined(__AVX2__)
  _mm256_stream_ps(to, bits_as<__m256>(v));
#else
  store(to, v);
#endif
}

inline void stream_bits(uint16_t *to, vs v) {
#if defined(__AVX512F__)
  _mm256_stream_si256(reinterpret_cast<__m256i *>(to), bits_as<__m256i>(v));
#elif defined(__AVX2__)
  _mm_stream_si128(reinterpret_cast<__m128i *>(to), bits_as<__m128i>(v));
#else
  memcpy(to, &v, sizeof v);
#endif
}

inline void stream(bf16 *to, vf v) { stream_bits(&to->bits, to_bf16(v)); }
inline void stream(f16 *to, vf v) { stream_bits(&to->bits, to_f16(v)); }

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
