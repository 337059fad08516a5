/* What short_conv and its gradient share: the arguments, and the rows that a position's taps read.
 * Internal linkage, as in vector.h. */
#pragma once

#include "../base/parallel.h"
#include "../base/tensor.h"
#include "_strided_rows.h"

namespace transom::TRANSOM_LEVEL {
namespace {

struct Taps {
  const transom_tensor *v, *weight, *state;
  int64_t B, S, C, K, dilation, reach;
  int64_t block; /* channels of a task */
  bool pieces;   /* rows of v and of the state lie in one piece */
};

inline Taps describe_taps(const transom_call *call, int v, int weight, int dilation, int state,
                          int64_t block) {
  Taps taps = {};
  taps.v = tensor(call, v), taps.weight = tensor(call, weight), taps.state = tensor(call, state);
  taps.B = taps.v->shape[0], taps.S = taps.v->shape[1], taps.C = taps.v->shape[2];
  taps.K = taps.weight->shape[1];
  taps.dilation = call->args[dilation].i, taps.reach = (taps.K - 1) * taps.dilation;
  taps.block = clamp(up_to(taps.C, kWidth), kWidth, block);
  taps.pieces = in_pieces(taps.v) && in_pieces(taps.state);
  return taps;
}

/* Bytes for sources(): K addresses, a row of zeros, and a row for each tap where they do not lie in
 * one piece. */
inline int64_t source_bytes(const Taps *taps) {
  const int64_t row = taps->block * size_of(taps->v);
  return up_to(taps->K * 8, 64) + up_to(row, 64) * (taps->pieces ? 1 : taps->K + 1);
}

/* Channels c .. c + n of row `at` of state and v together; zeros where a sequence has not begun. */
template <class Number>
inline const Number *source(const Taps *taps, int64_t b, int64_t at, int64_t c, int64_t n,
                            const Number *zeros, Number *buffer) {
  const transom_tensor *t = at < taps->reach ? taps->state : taps->v;
  if (t == nullptr) return zeros;
  const int64_t row = at < taps->reach ? at : at - taps->reach;
  return in_one_piece(t, b * t->strides[0] + row * t->strides[1] + c * t->strides[2], n, buffer);
}

/* The row that each tap of position s reads. `memory` of source_bytes(), zeroed before. */
template <class Number>
inline const Number *const *sources(const Taps *taps, int64_t b, int64_t s, int64_t c, int64_t n,
                                    char *memory) {
  const Number **rows = reinterpret_cast<const Number **>(memory);
  const int64_t step = up_to(taps->block * size_of(taps->v), 64);
  char *zeros = memory + up_to(taps->K * 8, 64);
  for (int64_t i = 0; i < taps->K; i++) {
    Number *own = reinterpret_cast<Number *>(taps->pieces ? zeros : zeros + (i + 1) * step);
    rows[i] = source(taps, b, s + i * taps->dilation, c, n, reinterpret_cast<Number *>(zeros), own);
  }
  return rows;
}

/* to[i][j] = weight[c + j][i], rows of `block` floats. */
inline void transpose_weight(const Taps *taps, int64_t c, int64_t n, float *to) {
  const transom_tensor *w = taps->weight;
  for (int64_t i = 0; i < taps->K; i++)
    for (int64_t j = 0; j < n; j++)
      to[i * taps->block + j] = number(w, (c + j) * w->strides[0] + i * w->strides[1]);
}

/* Channels i .. i + n of the convolution. kTaps > 0: K as a constant. */
template <class Number, int kTaps>
inline vf convolved(const Taps *taps, const Number *const *rows, const float *weight, int64_t i,
                    int64_t n) {
  const int64_t K = kTaps > 0 ? kTaps : taps->K;
  vf z = {};
#pragma GCC unroll 4
  for (int64_t tap = 0; tap < K; tap++)
    z += load(weight + tap * taps->block + i) * load_up_to(rows[tap] + i, n);
  return z;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
