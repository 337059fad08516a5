/* Softmax over keys that come in pieces, heads in the lanes of a vector.
 *
 * A piece is a pure function of a query and of its own keys: its largest logit, the sum of
 * exp(logit - largest) and the values weighted by it. Pieces are merged in order. So it makes no
 * difference which thread computes a piece, beside which other queries, or whether the pieces of a
 * query are computed one after the other or all at once: prefill and decode agree to the bit.
 * Milakov & Gimelshein 2018, arXiv:1805.02867. Internal linkage, as in vector.h. */
#pragma once

#include "../gemm/tile.h"

namespace transom::TRANSOM_LEVEL {
namespace {

constexpr float kNever = -__builtin_inff();

/* e^x, and exactly 0 where that is less than the smallest normal number: subnormal weights would
 * slow down the products. */
inline vf weight_of(vf x) { return x < -87.336f ? vf{} : exp(x); }

inline float weight_of(float x) { return weight_of(all(x))[0]; }

/* Natural logarithm of numbers >= 0 and of NaN, to 1 unit in the last place. */
inline float log_of(float x) {
  if (!(x > 0.0f) || x > 3e38f) return x == 0.0f ? kNever : x;
  if (x < 0x1p-126f) return log_of(x * 0x1p24f) - 16.635532f;
  /* x = 2^n m, m in sqrt(1/2)..sqrt(2); log m = 2 atanh((m - 1) / (m + 1)), as double. */
  const uint32_t bits = bits_as<uint32_t>(x);
  int n = static_cast<int>(bits >> 23) - 127;
  double m = bits_as<float>((bits & 0x7fffffu) | 0x3f800000u);
  if (m > 1.4142135) m *= 0.5, n++;
  const double t = (m - 1.0) / (m + 1.0), u = t * t;
  const double series =
      1.0 + u * (1.0 / 3 + u * (1.0 / 5 + u * (1.0 / 7 + u * (1.0 / 9 + u * (1.0 / 11)))));
  return static_cast<float>(n * 0.69314718055994531 + 2.0 * t * series);
}

/* scores[key][lane] become weights exp(scale * score - largest), for one panel of heads. The sum
 * runs over the keys in order, so a key of weight 0 and one that is left out are the same. */
inline void weigh(float *scores, int64_t keys, float scale, float *largest, float *mass) {
  vf most[kTileVectors], shift[kTileVectors], total[kTileVectors] = {};
  for (int v = 0; v < kTileVectors; v++) most[v] = all(kNever);
  for (int64_t j = 0; j < keys; j++)
    for (int v = 0; v < kTileVectors; v++) {
      /* Stored as rounded: fused with the subtraction below it could exceed the largest. */
      float *at = scores + j * kPanel + v * kWidth;
      const vf x = load(at) * scale;
      store(at, x);
      most[v] = x > most[v] ? x : most[v];
    }
  for (int v = 0; v < kTileVectors; v++) shift[v] = most[v] == kNever ? vf{} : most[v];
  for (int64_t j = 0; j < keys; j++)
    for (int v = 0; v < kTileVectors; v++) {
      float *at = scores + j * kPanel + v * kWidth;
      const vf weight = weight_of(load(at) - shift[v]);
      store(at, weight);
      total[v] += weight;
    }
  for (int v = 0; v < kTileVectors; v++) {
    store(largest + v * kWidth, most[v]);
    store(mass + v * kWidth, total[v]);
  }
}

/* sum and mass, relative to *largest, take up those of the next piece. */
inline void merge(float *largest, float *mass, float *sum, float next_largest, float next_mass,
                  const float *next, int64_t n) {
  if (next_largest > *largest) {
    const float old = weight_of(*largest - next_largest);
    *mass = *mass * old + next_mass;
    *largest = next_largest;
    for (int64_t d = 0; d < n; d += kWidth) store(sum + d, load(sum + d) * old + load(next + d));
  } else {
    /* Two of -inf: their difference would be NaN. */
    const float share = next_largest == *largest ? 1.0f : weight_of(next_largest - *largest);
    *mass += next_mass * share;
    for (int64_t d = 0; d < n; d += kWidth) store(sum + d, load(sum + d) + load(next + d) * share);
  }
}

/* What the weighted sum of the values is multiplied by: 1 / (mass + exp(sink - largest)). */
inline float share_of(float largest, float mass, const float *sink) {
  if (mass == 0.0f) return 0.0f;
  if (sink == nullptr) return 1.0f / mass;
  if (*sink <= largest) return 1.0f / (mass + weight_of(*sink - largest));
  const float kept = weight_of(largest - *sink);
  return kept / (mass * kept + 1.0f);
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
