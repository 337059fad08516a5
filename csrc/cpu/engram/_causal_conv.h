/* What short_conv and its gradient share: the arguments, and the rows that a position's taps read. */
#pragma once

#include "_strided_rows.h"

namespace transom::TRANSOM_LEVEL {
namespace {

struct Taps {
  const transom_tensor *v, *weight, *state;
  int64_t B, S, C, K, dilation, reach;
  int64_t block; /* channels of a task */
  bool dense;    /* are rows of v and of the state */
};

/* Args: the arguments of short_conv or of its gradient. */
template <class Args>
inline Taps describe_taps(const transom_call *call, int64_t block) {
  Taps taps = {};
  taps.v = tensor(call, Args::V), taps.weight = tensor(call, Args::WEIGHT);
  taps.state = tensor(call, Args::STATE);
  taps.B = taps.v->shape[0], taps.S = taps.v->shape[1], taps.C = taps.v->shape[2];
  taps.K = taps.weight->shape[1];
  taps.dilation = call->args[Args::DILATION].i, taps.reach = (taps.K - 1) * taps.dilation;
  taps.block = clamp(up_to(taps.C, kWidth), kWidth, block);
  taps.dense = rows_are_dense(taps.v) && rows_are_dense(taps.state);
  return taps;
}

/* What sources() works in: an address for each tap, a row of zeros, and a row for each tap where
 * they are not dense. */
struct Sources {
  const void **rows;
  char *zeros, *copies;
  int64_t row_bytes;
};

inline Sources lay_out_sources(const Taps *taps, Arena &arena) {
  Sources out = {};
  out.row_bytes = up_to(taps->block * size_of(taps->v), 64);
  out.rows = arena.take<const void *>(taps->K);
  out.zeros = arena.take<char>(out.row_bytes);
  out.copies = arena.take<char>(taps->dense ? 0 : taps->K * out.row_bytes);
  return out;
}

/* Channels c .. c + n of row `at` of state and v together; zeros where a sequence has not begun. */
template <class Number>
inline const Number *source(const Taps *taps, int64_t b, int64_t at, int64_t c, int64_t n,
                            const Number *zeros, Number *buffer) {
  const transom_tensor *t = at < taps->reach ? taps->state : taps->v;
  if (t == nullptr) return zeros;
  const int64_t row = at < taps->reach ? at : at - taps->reach;
  return dense_row(t, b * t->strides[0] + row * t->strides[1] + c * t->strides[2], n, buffer);
}

/* The row that each tap of position s reads; the row of zeros was zeroed before. */
template <class Number>
inline const Number *const *sources(const Taps *taps, int64_t b, int64_t s, int64_t c, int64_t n,
                                    const Sources &own) {
  const Number **rows = reinterpret_cast<const Number **>(own.rows);
  const Number *zeros = reinterpret_cast<const Number *>(own.zeros);
  for (int64_t i = 0; i < taps->K; i++) {
    Number *copy = reinterpret_cast<Number *>(own.copies + (taps->dense ? 0 : i * own.row_bytes));
    rows[i] = source(taps, b, s + i * taps->dilation, c, n, zeros, copy);
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

/* Channels i .. i + n of the convolution; kTaps > 0 is K as a constant. */
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
