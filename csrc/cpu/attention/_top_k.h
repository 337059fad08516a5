/* The top_k best of a stream of scores, in one pass, without keeping the stream.
 *
 * A list holds candidates in rising order of their index. When it is full it is cut to the top_k
 * best of what it holds: everything above the k-th largest score, and of those equal to it the
 * first. From then on a score must exceed that one to enter: an equal one comes later and loses. So
 * the outcome is the one and only top_k, whatever the pieces in which the stream came. Internal
 * linkage, as in vector.h. */
#pragma once

#include "../base/tensor.h"

namespace transom::TRANSOM_LEVEL {
namespace {

struct Best {
  int64_t top_k, room; /* room: at least top_k + kWidth */
  int64_t count;
  bool cut;        /* `least` counts */
  float least;     /* a candidate must exceed it */
  float *scores;   /* [room] */
  int32_t *places; /* [room] */
};

/* Candidates that a list takes beyond its top_k before it is cut. */
constexpr int64_t kSlack = 1024;

inline int64_t room_for(int64_t top_k) { return up_to(top_k + kSlack, 16); }

inline void clear(Best *best) {
  best->count = 0;
  best->cut = false;
  best->least = 0.0f;
}

/* Numbers in the order of the floats that they came from; +0 and -0 are one. */
inline uint32_t rank_of(float x) {
  const uint32_t bits = bits_as<uint32_t>(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* The k-th largest rank of n scores, 1 <= k <= n, and in *above how many exceed it. */
inline uint32_t kth_largest(const float *scores, int64_t n, int64_t k, int64_t *above) {
  /* Eleven bits at a time from the top, counting only those that agree in the bits before. */
  uint32_t prefix = 0, mask = 0;
  int64_t more = 0;
  const int shifts[] = {21, 10, 0};
  for (const int shift : shifts) {
    const uint32_t digits = shift == 0 ? 1024 : 2048;
    int32_t counts[2048] = {};
    for (int64_t i = 0; i < n; i++) {
      const uint32_t rank = rank_of(scores[i]);
      if ((rank & mask) == prefix) counts[(rank >> shift) & (digits - 1)]++;
    }
    uint32_t digit = digits - 1;
    while (more + counts[digit] < k) more += counts[digit--];
    prefix |= digit << shift;
    mask |= (digits - 1) << shift;
  }
  *above = more;
  return prefix;
}

/* Leaves the top_k best, in their order. */
inline void keep_best(Best *best) {
  if (best->count <= best->top_k) return;
  int64_t above;
  const uint32_t least = kth_largest(best->scores, best->count, best->top_k, &above);
  int64_t equal = best->top_k - above, kept = 0;
  for (int64_t i = 0; i < best->count; i++) {
    const float score = best->scores[i];
    const uint32_t rank = rank_of(score);
    if (rank < least || (rank == least && equal-- <= 0)) continue;
    if (rank == least) best->least = score;
    best->scores[kept] = score;
    best->places[kept++] = best->places[i];
  }
  best->count = kept;
  best->cut = true;
}

/* Offers n <= kWidth scores, of the keys first, first + 1, ...; NaN never enters. */
inline void offer(Best *best, vf scores, int64_t first, int64_t n) {
  if (best->count + kWidth > best->room) keep_best(best);
  const vi enters = best->cut ? scores > best->least : scores == scores;
  float *to = best->scores + best->count;
  int32_t *place = best->places + best->count;
  int64_t taken = 0;
#if defined(__AVX512F__)
  const __mmask16 mask = static_cast<__mmask16>(_mm512_cmplt_epi32_mask(bits_as<__m512i>(enters), __m512i{}) &
                                                ((1u << n) - 1));
  const __m512i at = _mm512_add_epi32(
      _mm512_set1_epi32(static_cast<int32_t>(first)),
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  _mm512_mask_compressstoreu_ps(to, mask, bits_as<__m512>(scores));
  _mm512_mask_compressstoreu_epi32(place, mask, at);
  taken = __builtin_popcount(mask);
#else
  for (int64_t i = 0; i < n; i++) {
    /* Written either way: a jump would be guessed wrong every other time. */
    to[taken] = scores[i];
    place[taken] = static_cast<int32_t>(first + i);
    taken -= enters[i];
  }
#endif
  best->count += taken;
}

/* out[top_k]: the places of the best in rising order, then -1. */
inline void write_best(Best *best, int32_t *out) {
  keep_best(best);
  memcpy(out, best->places, static_cast<size_t>(best->count) * sizeof(int32_t));
  for (int64_t i = best->count; i < best->top_k; i++) out[i] = -1;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
