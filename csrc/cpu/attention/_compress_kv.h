/* The slots of compress_kv's entries: where their values and gates lie. Internal linkage, as in
 * vector.h.
 *
 * Rows stand in the order [block before, with overlap] [pending, of the state] [new tokens]; entry
 * i pools, of its own channels, the rows i*m .. of the block before (first half of a row's
 * channels) and the rows of its own block (second half; all of them without overlap). */
#pragma once

#include "../base/tensor.h"

namespace transom::TRANSOM_LEVEL {
namespace {

struct Slots {
  const transom_tensor *kv, *gate, *bias, *state_kv, *state_gate;
  int64_t B, S, W, m, D;  /* D: channels of an entry */
  int64_t pending, head;  /* rows of the incomplete block, and of all that comes from the state */
  int64_t before, blocks; /* rows of the block before: m or 0; entries */
  int64_t slots, some;    /* slots of an entry; channels that are done at once */
};

/* Bytes of gates that are held at once: half of the smallest L1. */
constexpr int64_t kHeldBytes = 1 << 14;

inline Slots slots_of(const transom_tensor *kv, const transom_tensor *gate,
                      const transom_tensor *bias, const transom_tensor *state_kv,
                      const transom_tensor *state_gate, bool overlap, int64_t pending) {
  Slots s = {};
  s.kv = kv, s.gate = gate, s.bias = bias, s.state_kv = state_kv, s.state_gate = state_gate;
  s.B = kv->shape[0], s.S = kv->shape[1], s.W = kv->shape[2], s.m = bias->shape[0];
  s.D = overlap ? s.W / 2 : s.W;
  s.before = overlap ? s.m : 0;
  s.pending = pending, s.head = s.before + pending;
  s.blocks = (pending + s.S) / s.m;
  s.slots = s.before + s.m;
  s.some = clamp(kHeldBytes / (4 * s.slots) / 16 * 16, 16, 512);
  return s;
}

/* The row and the first channel of a slot of entry i. */
inline int64_t row_of(const Slots &s, int64_t i, int64_t slot) { return i * s.m + slot; }
inline int64_t channel_of(const Slots &s, int64_t slot) {
  return s.before > 0 && slot >= s.m ? s.D : 0;
}

/* n values of a row from channel c on, zeros after them up to the width. */
inline void read_values(const Slots &s, int64_t b, int64_t row, int64_t c, int64_t n, float *to) {
  const bool old = row < s.head;
  const transom_tensor *t = old ? s.state_kv : s.kv;
  if (t == nullptr) {
    memset(to, 0, static_cast<size_t>(up_to(n, kWidth)) * sizeof(float));
    return;
  }
  const int64_t at = old ? row : row - s.head;
  read_row(t, b * t->strides[0] + at * t->strides[1] + c * t->strides[2], t->strides[2], n, to);
}

/* Its gates, with the bias of their place in the block; -inf where nothing is filled. */
inline void read_gates(const Slots &s, int64_t b, int64_t row, int64_t c, int64_t n, float *to) {
  if (row >= s.head) {
    alignas(64) float bias[512];
    const int64_t at = row - s.head, place = (at + s.pending) % s.m;
    const transom_tensor *g = s.gate, *p = s.bias;
    read_row(g, b * g->strides[0] + at * g->strides[1] + c * g->strides[2], g->strides[2], n, to);
    read_row(p, place * p->strides[0] + c * p->strides[1], p->strides[1], n, bias);
    for (int64_t i = 0; i < n; i += kWidth) store(to + i, load(to + i) + load(bias + i));
  } else if (s.state_gate != nullptr) {
    const transom_tensor *g = s.state_gate;
    read_row(g, b * g->strides[0] + row * g->strides[1] + c * g->strides[2], g->strides[2], n, to);
  } else {
    for (int64_t i = 0; i < n; i += kWidth) store(to + i, all(-__builtin_inff()));
  }
}

/* The softmax of n channels over the slots of entry i: gates [slots][some] become e^(gate - peak),
 * 0 for a slot that is left out; totals [some] their sums, 1 where nothing is left. */
inline void weigh(const Slots &s, int64_t b, int64_t i, int64_t c, int64_t n, float *gates,
                  float *totals) {
  for (int64_t slot = 0; slot < s.slots; slot++)
    read_gates(s, b, row_of(s, i, slot), channel_of(s, slot) + c, n, gates + slot * s.some);
  for (int64_t d = 0; d < n; d += kWidth) {
    const vf nothing = all(-__builtin_inff());
    vf peak = nothing, total = {};
    for (int64_t slot = 0; slot < s.slots; slot++) {
      const vf g = load(gates + slot * s.some + d);
      peak = g > peak ? g : peak;
    }
    for (int64_t slot = 0; slot < s.slots; slot++) {
      float *at = gates + slot * s.some + d;
      const vf g = load(at), e = g == nothing ? vf{} : exp(g - peak);
      store(at, e);
      total += e;
    }
    store(totals + d, total == 0.0f ? all(1.0f) : total);
  }
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
