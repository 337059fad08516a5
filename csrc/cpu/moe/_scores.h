/* The scores of routing, of vectors of logits: the same bits for equal logits wherever they stand. */
#pragma once

#include "../base/tensor.h"

namespace transom::TRANSOM_LEVEL {
namespace {

enum Score { kSoftmax, kSigmoid, kSqrtSoftplus, kTopkSoftmax };

inline Score score_from(const char *name) {
  if (strcmp(name, "softmax") == 0) return kSoftmax;
  if (strcmp(name, "sigmoid") == 0) return kSigmoid;
  return strcmp(name, "sqrtsoftplus") == 0 ? kSqrtSoftplus : kTopkSoftmax;
}

/* Added to the sum of the chosen scores: scores that all underflow give weights of zero. */
constexpr float kTiny = 1e-20f;
/* Where softplus is linear, and where its root is exp(z / 2), to float32's rounding. */
constexpr float kLinearAbove = 20.0f, kRootBelow = -20.0f;

/* log(1 + e) for e in 0..1, to 2 units in the last place. */
inline vf log_of_one_plus(vf e) {
  /* 2 artanh(s), s = e / (2 + e) <= 1/3, by its series: the first term left out is 1.4e-8. */
  const vf s = e / (2.0f + e), q = s * s;
  vf sum = q * (1.0f / 13.0f) + 1.0f / 11.0f;
  sum = sum * q + 1.0f / 9.0f;
  sum = sum * q + 1.0f / 7.0f;
  sum = sum * q + 1.0f / 5.0f;
  sum = sum * q + 1.0f / 3.0f;
  return 2.0f * (s + s * (sum * q));
}

inline vf sqrt_softplus(vf z) {
  const vf above = z > 0.0f ? z : vf{}, magnitude = z > 0.0f ? z : -z;
  const vf plus = z > kLinearAbove ? z : above + log_of_one_plus(exp(-magnitude));
  const vf root = square_root(plus);
  if (!any(z < kRootBelow)) return root;
  return z < kRootBelow ? exp_below(z * 0.5f) : root;
}

/* A score that is one logit's alone; the logit itself for the two softmaxes. */
inline vf score_of(Score score, vf z) {
  if (score == kSigmoid) return sigmoid(z);
  return score == kSqrtSoftplus ? sqrt_softplus(z) : z;
}

/* ds/dz of such a score. */
inline vf slope_of(Score score, vf z, vf s) {
  if (score == kSigmoid) return s * sigmoid(-z);
  return 0.5f * (z < kRootBelow ? s : sigmoid(z) / (s > kTiny ? s : all(kTiny)));
}

/* The largest of n numbers, NaN apart; x holds what changes nothing after n, up to the width. */
inline float largest(const float *x, int64_t n) {
  vf most = all(-__builtin_inff()), other = most;
  int64_t i = 0;
  for (; i + kWidth < n; i += 2 * kWidth) {
    const vf here = load(x + i), next = load(x + i + kWidth);
    most = here > most ? here : most;
    other = next > other ? next : other;
  }
  if (i < n) {
    const vf here = load(x + i);
    most = here > most ? here : most;
  }
  most = other > most ? other : most;
  float out = most[0];
  for (int i = 1; i < kWidth; i++) out = most[i] > out ? most[i] : out;
  return out;
}

/* z[0..E) becomes its softmax, zeros where all of it is -inf; -inf stands after it up to the width,
 * and zeros then. */
inline void softmax(float *z, int64_t E) {
  const float top = largest(z, E);
  const vf most = all(top == -__builtin_inff() ? 0.0f : top);
  vf total = {};
  for (int64_t i = 0; i < E; i += kWidth) {
    const vf e = exp_below(load(z + i) - most);
    store(z + i, e);
    total += e;
  }
  const float added = sum(total);
  const vf sum_of_all = all(added == 0.0f ? 1.0f : added);
  for (int64_t i = 0; i < E; i += kWidth) store(z + i, load(z + i) / sum_of_all);
}

/* The softmax over k chosen logits, where valid[] is not zero; 0 elsewhere. */
inline void softmax_of_chosen(float *z, const bool *valid, int64_t k) {
  float most = -__builtin_inff(), total = kTiny;
  for (int64_t i = 0; i < k; i++)
    if (valid[i]) most = z[i] > most ? z[i] : most;
  if (most == -__builtin_inff()) most = 0.0f;
  for (int64_t i = 0; i < k; i += kWidth) store(z + i, exp_below(load(z + i) - most));
  for (int64_t i = 0; i < k; i++) {
    if (!valid[i]) z[i] = 0.0f;
    total += z[i];
  }
  for (int64_t i = 0; i < k; i++) z[i] /= total;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
