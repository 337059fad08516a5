/* Reading the tensors of a call. */
#pragma once

#include <stdio.h>

#include "transom_ops.h"
#include "vector.h"

namespace transom::TRANSOM_LEVEL {
namespace {

inline const transom_tensor *tensor(const transom_call *call, int at) {
  return call->args[at].tag == TRANSOM_VALUE_TENSOR ? call->args[at].tensor : nullptr;
}

inline bool is(const transom_tensor *t, int code, int bits) {
  return t->dtype_code == code && t->dtype_bits == bits;
}

/* 0 float32, 1 bfloat16, 2 float16, -1 anything else. */
inline int kind(const transom_tensor *t) {
  if (is(t, TRANSOM_FLOAT, 32)) return 0;
  if (is(t, TRANSOM_BFLOAT, 16)) return 1;
  return is(t, TRANSOM_FLOAT, 16) ? 2 : -1;
}

inline int64_t size_of(const transom_tensor *t) { return t->dtype_bits / 8; }

/* The address of an element. */
inline void *at(const transom_tensor *t, int64_t index) {
  return static_cast<char *>(t->data) + index * size_of(t);
}

inline int64_t integer(const transom_tensor *t, int64_t index) {
  return t->dtype_bits == 32 ? static_cast<const int32_t *>(t->data)[index]
                             : static_cast<const int64_t *>(t->data)[index];
}

/* One element of a tensor of any float dtype, as float32. */
inline float number(const transom_tensor *t, int64_t index) {
  if (t->dtype_bits == 64) return static_cast<float>(static_cast<const double *>(t->data)[index]);
  if (t->dtype_bits == 32) return static_cast<const float *>(t->data)[index];
  const uint16_t bits = static_cast<const uint16_t *>(t->data)[index];
  if (t->dtype_code == TRANSOM_BFLOAT) return bits_as<float>(static_cast<uint32_t>(bits) << 16);
  const f16 one = {bits};
  return load_some(&one, 1)[0];
}

/* How many tokens there are; the last `inner` dims are a token's own. */
inline int64_t tokens_of(const transom_tensor *t, int inner) {
  int64_t tokens = 1;
  for (int i = 0; i < t->ndim - inner; i++) tokens *= t->shape[i];
  return tokens;
}

/* Where token begins; the last `inner` dims are the token's own. */
inline int64_t start_of(const transom_tensor *t, int inner, int64_t token) {
  int64_t start = 0;
  for (int i = t->ndim - inner - 1; i >= 0; i--) {
    start += token % t->shape[i] * t->strides[i];
    token /= t->shape[i];
  }
  return start;
}

/* body(number) with a null pointer to the type that a tensor of kind() >= 0 holds. */
template <class Body>
inline void with_type_of(const transom_tensor *t, Body body) {
  if (t->dtype_bits == 32)
    body(static_cast<const float *>(nullptr));
  else if (t->dtype_code == TRANSOM_BFLOAT)
    body(static_cast<const bf16 *>(nullptr));
  else
    body(static_cast<const f16 *>(nullptr));
}

template <class Number>
inline void read_numbers(const Number *from, int64_t stride, int64_t n, float *to) {
  int64_t i = 0;
  if (stride == 1)
    for (; i + kWidth <= n; i += kWidth) store(to + i, load(from + i));
  for (; i < n; i += kWidth) {
    Number some[kWidth] = {};
    const int64_t here = n - i < kWidth ? n - i : kWidth;
    for (int64_t j = 0; j < here; j++) some[j] = from[(i + j) * stride];
    store(to + i, load(some));
  }
}

/* n elements from `first` on as float32, with zeros up to the next multiple of the width. */
inline void read_row(const transom_tensor *t, int64_t first, int64_t stride, int64_t n,
                     float *to) {
  if (t->dtype_bits == 32)
    read_numbers(static_cast<const float *>(t->data) + first, stride, n, to);
  else if (t->dtype_code == TRANSOM_BFLOAT)
    read_numbers(static_cast<const bf16 *>(t->data) + first, stride, n, to);
  else
    read_numbers(static_cast<const f16 *>(t->data) + first, stride, n, to);
}

/* A parameter [n] of any float dtype as float32, with zeros up to the next multiple of the width. */
inline void read_parameter(const transom_tensor *t, int64_t n, float *to) {
  if (t->dtype_bits != 64) return read_row(t, 0, t->strides[0], n, to);
  for (int64_t i = 0; i < n; i++) to[i] = number(t, i * t->strides[0]);
  for (int64_t i = n; i < (n + kWidth - 1) / kWidth * kWidth; i++) to[i] = 0.0f;
}

/* True for a tensor of a dtype that kernels read; else the reason is written. */
inline bool readable(const transom_tensor *t, const char *name, transom_status *status) {
  if (kind(t) >= 0) return true;
  snprintf(status->message, sizeof status->message,
           "%s is float64; supported: float32, bfloat16, float16", name);
  return false;
}

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t up_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
inline int64_t clamp(int64_t n, int64_t low, int64_t high) {
  return n < low ? low : n > high ? high : n;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
