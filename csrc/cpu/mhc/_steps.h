/* The steps of Sinkhorn, of as many tokens at once as a vector has elements: each element of the
 * matrix is a vector, and a token one place in all of them. So a token has the same bits alone and
 * among others. Internal linkage, as in vector.h. */
#pragma once

#include "../tensor.h"

namespace transom::TRANSOM_LEVEL {
namespace {

constexpr int64_t kMostStreams = 16;

/* exp() of x <= 0, with the subnormal results too: without eps a column may hold nothing else. */
inline vf exp_below(vf x) {
  const vf root = exp(x * 0.5f);
  return x < -87.0f ? root * root : exp(x);
}

/* One step: each row (or column) of m [R,R] divided by its sum + eps. */
template <int kR>
inline void divide(vf *m, int64_t given, int64_t next_line, int64_t next, vf eps) {
  const int64_t R = kR > 0 ? kR : given;
#pragma GCC unroll 4
  for (int64_t i = 0; i < R; i++) {
    vf *line = m + i * next_line;
    vf total = line[0];
#pragma GCC unroll 4
    for (int64_t j = 1; j < R; j++) total += line[j * next];
    total += eps;
#pragma GCC unroll 4
    for (int64_t j = 0; j < R; j++) line[j * next] /= total;
  }
}

/* kR > 0: R as a constant, for which the matrix stays in registers where there are enough. */
template <int kR>
inline void steps_of(vf *matrix, int64_t given, int64_t iterations, vf eps) {
  const int64_t R = kR > 0 ? kR : given;
  for (int64_t i = 0; i < R; i++) {
    vf *row = matrix + i * R, most = row[0], total = {};
    for (int64_t j = 1; j < R; j++) most = row[j] > most ? row[j] : most;
    for (int64_t j = 0; j < R; j++) {
      row[j] = exp_below(row[j] - most);
      total += row[j];
    }
    for (int64_t j = 0; j < R; j++) row[j] = row[j] / total + eps;
  }
  vf held[kR > 0 ? kR * kR : 1], *m = matrix;
  if constexpr (kR > 0) {
    memcpy(held, matrix, sizeof held);
    m = held;
  }
  divide<kR>(m, R, 1, R, eps);
  for (int64_t step = 1; step < iterations; step++) {
    divide<kR>(m, R, R, 1, eps);
    divide<kR>(m, R, 1, R, eps);
  }
  if constexpr (kR > 0) memcpy(matrix, held, sizeof held);
}

/* m [R,R], row-major: logits in, the nearly doubly stochastic matrix out. */
inline void steps(vf *m, int64_t R, int64_t iterations, float eps) {
  if (R == 4)
    steps_of<4>(m, R, iterations, all(eps));
  else
    steps_of<0>(m, R, iterations, all(eps));
}

/* False, and the reason, for a matrix that does not fit or a float64 tensor. */
inline bool streams_fit(const transom_tensor *t, const char *name, int64_t R,
                        transom_status *status) {
  if (kind(t) < 0)
    snprintf(status->message, sizeof status->message,
             "%s is float64; supported: float32, bfloat16, float16", name);
  else if (R > kMostStreams)
    snprintf(status->message, sizeof status->message, "R = %lld; supported: at most %lld",
             static_cast<long long>(R), static_cast<long long>(kMostStreams));
  else
    return true;
  return false;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
