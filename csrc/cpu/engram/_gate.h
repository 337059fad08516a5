/* What engram_gate and its gradient share: the arguments, the statistics of one stream of one
 * token, the gate. */
#pragma once

#include "../base/output.h"
#include "_strided_rows.h"

namespace transom::TRANSOM_LEVEL {
namespace {

struct Gated {
  const transom_tensor *x, *key, *value, *weight, *mask;
  int64_t T, R, D;
  float eps, clamp, root; /* root: sqrt(D) */
  bool residual;
  const float *weights; /* [R,weights_stride] in float32: as given, or the copy */
  int64_t weights_stride;
  float *copy; /* in the workspace, or NULL */
};

/* Args: the arguments of engram_gate or of its gradient. */
template <class Args>
inline Gated describe_gated(const transom_call *call) {
  Gated work = {};
  const transom_tensor *x = work.x = tensor(call, Args::X);
  work.key = tensor(call, Args::KEY), work.value = tensor(call, Args::VALUE);
  work.weight = tensor(call, Args::WEIGHT), work.mask = tensor(call, Args::MASK);
  work.T = tokens_of(x, 2);
  work.R = x->shape[x->ndim - 2], work.D = x->shape[x->ndim - 1];
  work.eps = static_cast<float>(call->args[Args::EPS].f);
  work.clamp = static_cast<float>(call->args[Args::CLAMP].f);
  work.root = __builtin_sqrtf(static_cast<float>(max_of(1, work.D)));
  work.residual = call->args[Args::RESIDUAL].i != 0;
  return work;
}

/* A copy of the weight in the workspace, if it is not float32 in dense rows. */
inline void lay_out_weight(Gated *work, Arena &arena) {
  const transom_tensor *w = work->weight;
  if (w->dtype_bits == 32 && (work->D <= 1 || w->strides[1] == 1)) {
    work->weights = static_cast<const float *>(w->data), work->weights_stride = w->strides[0];
    return;
  }
  work->weights_stride = up_to(work->D, kWidth);
  work->weights = work->copy = arena.take<float>(work->R * work->weights_stride);
}

/* Fills it. */
inline void copy_weight(const Gated *work) {
  const transom_tensor *w = work->weight;
  for (int64_t j = 0; work->copy != nullptr && j < work->R; j++)
    read_row(w, j * w->strides[0], w->strides[1], work->D, work->copy + j * work->weights_stride);
}

inline bool takes_part(const Gated *work, int64_t token) {
  const transom_tensor *mask = work->mask;
  return mask == nullptr ||
         static_cast<const uint8_t *>(mask->data)[start_of(mask, 0, token)] != 0;
}

/* The rows of one stream where they lie, as bytes; NULL where there is nothing to ask for. */
struct Rows {
  const char *x, *key, *dy;
};

/* One stream's rows, if the token takes part and they are dense. */
inline Rows rows_of(const Gated *work, const transom_tensor *dy, int64_t token, int64_t j) {
  const transom_tensor *x = work->x, *key = work->key;
  if (!takes_part(work, token)) return {};
  const auto row = [&](const transom_tensor *t) -> const char * {
    if (t == nullptr || t->strides[t->ndim - 1] != 1) return nullptr;
    return static_cast<const char *>(
        at(t, start_of(t, 2, token) + j * t->strides[t->ndim - 2]));
  };
  return {row(x), row(key), row(dy)};
}

/* Asks for element i and its line. The processor's own prefetchers stop at every page, and a row is
 * one or two pages: while the output of one stream is computed, the next one's rows are fetched. */
template <class Number>
inline __attribute__((always_inline)) void prefetch(Rows rows, int64_t i) {
  constexpr int64_t kPerLine = kLine / static_cast<int64_t>(sizeof(Number));
  if (rows.x == nullptr || (kPerLine > kWidth && i % kPerLine != 0)) return;
  const int64_t bytes = i * static_cast<int64_t>(sizeof(Number));
  __builtin_prefetch(rows.x + bytes);
  __builtin_prefetch(rows.key + bytes);
  if (rows.dy != nullptr) __builtin_prefetch(rows.dy + bytes);
}

struct Statistics {
  float rx, rk, dot;
};

/* The sum of term(i, n) for all elements: two chains of vectors, and what is left over at the end. */
template <class Term>
inline float summed(int64_t n, Term term) {
  vf sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    sums[0] += term(i, kWidth);
    sums[1] += term(i + kWidth, kWidth);
  }
  for (; i < n; i += kWidth) sums[0] += term(i, min_of(kWidth, n - i));
  return sum(sums[0] + sums[1]);
}

/* Statistics of one stream, and, with dy, the sum of dy * value. */
template <class Number, bool kGradient>
inline Statistics statistics(const Gated *work, const Number *x, const Number *key,
                             const float *weight, const Number *dy, const Number *value,
                             float *dgate) {
  const int64_t D = work->D;
  vf xx[2] = {}, kk[2] = {}, xk[2] = {}, dv[2] = {};
  int64_t i = 0;
  const auto add = [&](int c, int64_t at, int64_t n) {
    const vf a = load_up_to(x + at, n), b = load_up_to(key + at, n);
    xx[c] += a * a, kk[c] += b * b;
    xk[c] += a * load_up_to(weight + at, n) * b;
    if constexpr (kGradient) dv[c] += load_up_to(dy + at, n) * load_up_to(value + at, n);
  };
  for (; i + 2 * kWidth <= D; i += 2 * kWidth) add(0, i, kWidth), add(1, i + kWidth, kWidth);
  for (; i < D; i += kWidth) add(0, i, min_of(kWidth, D - i));
  const v4 s = sum(xx[0] + xx[1], kk[0] + kk[1], xk[0] + xk[1], dv[0] + dv[1]);
  const float count = static_cast<float>(max_of(1, D));
  Statistics out = {};
  out.rx = 1.0f / __builtin_sqrtf(s[0] / count + work->eps);
  out.rk = 1.0f / __builtin_sqrtf(s[1] / count + work->eps);
  out.dot = s[2] * out.rx * out.rk / work->root;
  if constexpr (kGradient) *dgate = s[3];
  /* The bare product leaves float32 where both rows are huge or tiny: there they are normalised
   * first. */
  constexpr float kLeast = 0x1p-50f, kMost = 0x1p50f;
  const bool plain = out.rx > kLeast && out.rx < kMost && out.rk > kLeast && out.rk < kMost &&
                     s[2] - s[2] == 0.0f;
  if (!plain) {
    const vf rx = all(out.rx), rk = all(out.rk);
    out.dot = summed(D, [&](int64_t at, int64_t n) {
                return load_up_to(x + at, n) * rx * load_up_to(weight + at, n) *
                       (load_up_to(key + at, n) * rk);
              }) / work->root;
  }
  return out;
}

/* A zero of either sign counts as positive. */
inline float gate_of(float dot, float clamp) {
  const float size = dot < 0 ? -dot : dot;
  const float root = __builtin_sqrtf(size < clamp ? clamp : size);
  return 1.0f / (1.0f + exp(all(dot < 0 ? root : -root))[0]);
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
