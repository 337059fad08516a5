/* The steps of Sinkhorn, of as many tokens at once as a vector has elements: each element of the
 * matrix is a vector, and a token one place in all of them. So a token has the same bits alone and
 * among others. Internal linkage, as in vector.h. */
#pragma once

#include "../base/tensor.h"

namespace transom::TRANSOM_LEVEL {
namespace {

constexpr int64_t kMostStreams = 16;

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

/* Vectors that steps_backward() keeps: the softmax, and each step's result and sums. */
inline int64_t kept_vectors(int64_t R, int64_t iterations) {
  return R * R + (2 * iterations - 1) * (R * R + R);
}

template <int kR>
inline void steps_backward_of(vf *m, vf *grad, int64_t given, int64_t iterations, vf eps,
                              vf *kept) {
  const int64_t R = kR > 0 ? kR : given, steps = 2 * iterations - 1;
  vf *soft = kept, *at = kept + R * R;
  for (int64_t i = 0; i < R; i++) {
    vf *row = m + i * R, most = row[0], total = {};
    for (int64_t j = 1; j < R; j++) most = row[j] > most ? row[j] : most;
    for (int64_t j = 0; j < R; j++) {
      row[j] = exp_below(row[j] - most);
      total += row[j];
    }
    for (int64_t j = 0; j < R; j++) {
      soft[i * R + j] = row[j] / total;
      row[j] = soft[i * R + j] + eps;
    }
  }
  for (int64_t step = 0; step < steps; step++, at += R * R + R) {
    const int64_t line = step % 2 == 0 ? 1 : R, next = step % 2 == 0 ? R : 1;
    for (int64_t i = 0; i < R; i++) {
      vf total = m[i * line];
      for (int64_t j = 1; j < R; j++) total += m[i * line + j * next];
      total += eps;
      at[R * R + i] = total;
      for (int64_t j = 0; j < R; j++) {
        const int64_t here = i * line + j * next;
        at[here] = m[here] /= total;
      }
    }
  }
  for (int64_t step = steps - 1; step >= 0; step--) {
    at -= R * R + R;
    const int64_t line = step % 2 == 0 ? 1 : R, next = step % 2 == 0 ? R : 1;
    for (int64_t i = 0; i < R; i++) {
      vf along = grad[i * line] * at[i * line];
      for (int64_t j = 1; j < R; j++) along += grad[i * line + j * next] * at[i * line + j * next];
      for (int64_t j = 0; j < R; j++) {
        const int64_t here = i * line + j * next;
        grad[here] = (grad[here] - along) / at[R * R + i];
      }
    }
  }
  for (int64_t i = 0; i < R; i++) {
    vf along = grad[i * R] * soft[i * R];
    for (int64_t j = 1; j < R; j++) along += grad[i * R + j] * soft[i * R + j];
    for (int64_t j = 0; j < R; j++) grad[i * R + j] = soft[i * R + j] * (grad[i * R + j] - along);
  }
}

/* grad [R,R] of the result of steps() becomes that of the logits m, which are overwritten. */
inline void steps_backward(vf *m, vf *grad, int64_t R, int64_t iterations, float eps, vf *kept) {
  if (R == 4)
    steps_backward_of<4>(m, grad, R, iterations, all(eps), kept);
  else
    steps_backward_of<0>(m, grad, R, iterations, all(eps), kept);
}

/* False, and the reason, for a matrix that does not fit or a float64 tensor. */
inline bool streams_fit(const transom_tensor *t, const char *name, int64_t R,
                        transom_status *status) {
  if (!readable(t, name, status)) return false;
  if (R <= kMostStreams) return true;
  snprintf(status->message, sizeof status->message, "R = %lld; supported: at most %lld",
           static_cast<long long>(R), static_cast<long long>(kMostStreams));
  return false;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
