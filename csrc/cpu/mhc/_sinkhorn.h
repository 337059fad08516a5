/* The steps of Sinkhorn, for as many tokens at once as a vector has elements: each element of the
 * matrix is a vector, and a token is one lane in all of them. So a token has the same bits alone and
 * among others. */
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

/* kR > 0 is R as a constant, for which the matrix stays in registers where there are enough. */
template <int kR>
inline void normalize_of(vf *matrix, int64_t given, int64_t iterations, vf eps) {
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
  vf registers[kR > 0 ? kR * kR : 1], *m = matrix;
  if constexpr (kR > 0) {
    memcpy(registers, matrix, sizeof registers);
    m = registers;
  }
  divide<kR>(m, R, 1, R, eps);
  for (int64_t step = 1; step < iterations; step++) {
    divide<kR>(m, R, R, 1, eps);
    divide<kR>(m, R, 1, R, eps);
  }
  if constexpr (kR > 0) memcpy(matrix, registers, sizeof registers);
}

/* m [R,R], row-major: the logits become the nearly doubly stochastic matrix. */
inline void normalize(vf *m, int64_t R, int64_t iterations, float eps) {
  if (R == 4)
    normalize_of<4>(m, R, iterations, all(eps));
  else
    normalize_of<0>(m, R, iterations, all(eps));
}

/* Vectors that normalize_backward() records: the softmax, and the result and the sums of each
 * step. */
inline int64_t recorded_vectors(int64_t R, int64_t iterations) {
  return R * R + (2 * iterations - 1) * (R * R + R);
}

template <int kR>
inline void normalize_backward_of(vf *m, vf *grad, int64_t given, int64_t iterations, vf eps,
                                  vf *record) {
  const int64_t R = kR > 0 ? kR : given, steps = 2 * iterations - 1;
  vf *soft = record, *at = record + R * R;
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

/* grad [R,R] of the result of normalize() becomes that of the logits m, which are overwritten. */
inline void normalize_backward(vf *m, vf *grad, int64_t R, int64_t iterations, float eps,
                               vf *record) {
  if (R == 4)
    normalize_backward_of<4>(m, grad, R, iterations, all(eps), record);
  else
    normalize_backward_of<0>(m, grad, R, iterations, all(eps), record);
}

/* The matrices t[*B,R,R] of `tokens` tokens from `first` on, each in a lane of m. */
inline void read_matrices(const transom_tensor *t, int64_t R, int64_t first, int64_t tokens,
                          vf *m) {
  const transom_tensor source = *t; /* a copy: stores to m could change what is read through t */
  const int64_t down = t->strides[t->ndim - 2], along = t->strides[t->ndim - 1];
  for (int64_t i = 0; i < R * R; i++) m[i] = vf{};
  for (int64_t lane = 0; lane < tokens; lane++) {
    const int64_t start = start_of(t, 2, first + lane);
    for (int64_t i = 0; i < R; i++)
      for (int64_t j = 0; j < R; j++)
        m[i * R + j][lane] = number(&source, start + i * down + j * along);
  }
}

/* False, and the reason, for more streams than a kernel has room for, or a float64 tensor. */
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
