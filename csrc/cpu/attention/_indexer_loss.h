/* The indexer's scores of the keys that a query lists, and their softmax. Internal linkage, as in
 * vector.h. */
#pragma once

#include "../base/tensor.h"
#include "_gradient.h"

namespace transom::TRANSOM_LEVEL {
namespace {

struct Listed {
  const transom_tensor *q, *k, *weights, *target, *indices;
  int64_t B, S, N, H, D, L;
  int64_t padded, key_stride; /* heads in panels; floats of a row of a tile */
};

inline Listed listed_of(const transom_tensor *q, const transom_tensor *k,
                        const transom_tensor *weights, const transom_tensor *target,
                        const transom_tensor *indices) {
  return {q, k, weights, target, indices, q->shape[0], q->shape[1], k->shape[1], q->shape[2],
          q->shape[3], indices->shape[2], up_to(q->shape[2], kPanel), tile_stride(q->shape[3])};
}

/* One query: its keys that exist, in the order of its list. */
struct Scored {
  int64_t *keys, *places, count; /* places: in the list */
  float *goals, *scores, *shares; /* targets; shares: e^(score - peak) */
  float norm, mass;               /* log softmax = score - norm; softmax = share / mass */
  float *packed, *weights;        /* of the heads: [padded * D], [padded] */
  float *tile, *dots;             /* of a piece: keys, and [kKeys][padded] */
};

inline Scored cut_scored(Cutter *cutter, const Listed &at) {
  Scored one = {};
  one.keys = reinterpret_cast<int64_t *>(cutter->part(2 * at.L));
  one.places = reinterpret_cast<int64_t *>(cutter->part(2 * at.L));
  one.goals = cutter->part(at.L), one.scores = cutter->part(at.L);
  one.shares = cutter->part(at.L);
  one.packed = cutter->part(at.padded * at.D), one.weights = cutter->part(at.padded);
  one.tile = cutter->part(kKeys * at.key_stride), one.dots = cutter->part(kKeys * at.padded);
  return one;
}

/* The tile and the dots of `count` keys from the first-th on. */
inline void read_piece(const Listed &at, const Scored &one, int64_t b, int64_t first,
                       int64_t count) {
  gather(at.k, b, one.keys + first, count, one.tile, at.key_stride);
  against(one.packed, at.padded, at.D, one.tile, at.key_stride, count, one.dots);
}

inline void score(const Listed &at, Scored *one, int64_t b, int64_t s) {
  const auto start = [&](const transom_tensor *t) {
    return b * t->strides[0] + s * t->strides[1];
  };
  one->count = 0;
  for (int64_t l = 0; l < at.L; l++) {
    const int64_t j = integer(at.indices, start(at.indices) + l * at.indices->strides[2]);
    if (j < 0 || j >= at.N) continue;
    one->keys[one->count] = j, one->places[one->count] = l;
    one->goals[one->count++] = number(at.target, start(at.target) + l * at.target->strides[2]);
  }
  if (one->count == 0) return;
  pack_heads(at.q, start(at.q), at.H, one->packed);
  for (int64_t h = 0; h < at.padded; h++)
    one->weights[h] =
        h < at.H ? number(at.weights, start(at.weights) + h * at.weights->strides[2]) : 0.0f;
  for (int64_t first = 0; first < one->count; first += kKeys) {
    const int64_t count = min_of(kKeys, one->count - first);
    read_piece(at, *one, b, first, count);
    for (int64_t j = 0; j < count; j++) {
      vf total = {};
      for (int64_t h = 0; h < at.padded; h += kWidth) {
        const vf dot = load(one->dots + j * at.padded + h);
        total += load(one->weights + h) * (dot < 0.0f ? vf{} : dot);
      }
      one->scores[first + j] = sum(total);
    }
  }
  float peak = kNever;
  double mass = 0.0;
  for (int64_t i = 0; i < one->count; i++) peak = one->scores[i] > peak ? one->scores[i] : peak;
  for (int64_t i = 0; i < one->count; i += kWidth) {
    const int64_t count = min_of(kWidth, one->count - i);
    store_some(one->shares + i, exp(load_some(one->scores + i, count) - peak), count);
  }
  for (int64_t i = 0; i < one->count; i++) mass += static_cast<double>(one->shares[i]);
  one->mass = static_cast<float>(mass);
  one->norm = peak + log_of(one->mass);
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
