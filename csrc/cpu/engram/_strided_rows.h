/* Rows of any stride as rows whose elements lie side by side, and loops over them. */
#pragma once

#include "../base/kernel.h"

namespace transom::TRANSOM_LEVEL {
namespace {

inline bool rows_are_dense(const transom_tensor *t) {
  return t == nullptr || t->shape[t->ndim - 1] <= 1 || t->strides[t->ndim - 1] == 1;
}

/* A row side by side: where it lies, or copied into `buffer`. */
template <class Number>
inline const Number *dense_row(const transom_tensor *t, int64_t start, int64_t n,
                               Number *buffer) {
  const int64_t stride = t->strides[t->ndim - 1];
  const Number *from = static_cast<const Number *>(t->data) + start;
  if (stride == 1 || n <= 1) return from;
  for (int64_t i = 0; i < n; i++) buffer[i] = from[i * stride];
  return buffer;
}

template <class Number>
inline vf load_up_to(const Number *p, int64_t count) {
  return count == kWidth ? load(p) : load_some(p, count);
}

/* Stores the first n elements. */
template <class Number>
inline void store_up_to(Number *p, vf v, int64_t n) {
  if (n == kWidth)
    store(p, v);
  else
    store_some(p, v, n);
}

/* step(i, n) for all elements, with n the width but for those left over at the end. The step is
 * inlined twice, so that what it asks of n is asked once. */
template <class Step>
inline void each_vector(int64_t D, Step step) {
  int64_t i = 0;
  for (; i + kWidth <= D; i += kWidth) step(i, static_cast<int64_t>(kWidth));
  if (i < D) step(i, D - i);
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
