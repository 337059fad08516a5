/* The experts' activations on rows of float32. Internal linkage, as in vector.h. */
#pragma once

#include <math.h>

#include "../tensor.h"

namespace transom::TRANSOM_LEVEL {
namespace {

enum Activation { kSilu, kGelu, kGeluTanh, kRelu, kSwigluOai };

struct Gated {
  Activation activation;
  bool limited;
  float limit, alpha;
};

inline Gated gated_from(const char *activation, const transom_value *limit, double alpha) {
  Gated out = {kRelu, limit->tag != TRANSOM_VALUE_NONE, 0.0f, static_cast<float>(alpha)};
  if (strcmp(activation, "silu") == 0) out.activation = kSilu;
  if (strcmp(activation, "gelu") == 0) out.activation = kGelu;
  if (strcmp(activation, "gelu_tanh") == 0) out.activation = kGeluTanh;
  if (strcmp(activation, "swiglu_oai") == 0) out.activation = kSwigluOai;
  if (out.limited) out.limit = static_cast<float>(limit->f);
  return out;
}

inline vf each(vf v, float (*function)(float)) {
  for (int i = 0; i < kWidth; i++) v[i] = function(v[i]);
  return v;
}

/* f(gate) * up, clamped first where there is a limit; NaN stays NaN. */
inline vf apply(const Gated &gated, vf gate, vf up) {
  if (gated.limited) {
    const vf most = all(gated.limit);
    gate = gate > most ? most : gate;
    up = up > most ? most : up < -most ? -most : up;
  }
  switch (gated.activation) {
    case kSilu: return gate / (1.0f + exp(-gate)) * up;
    case kSwigluOai: return gate / (1.0f + exp(-gate * gated.alpha)) * (up + 1.0f);
    case kGelu: return gate * (0.5f * (1.0f + each(gate * 0.70710678f, erff))) * up;
    case kGeluTanh: {
      /* Hendrycks & Gimpel 2016, arXiv:1606.08415. */
      const vf inner = 0.79788456f * (gate + 0.044715f * gate * gate * gate);
      return 0.5f * gate * (1.0f + each(inner, tanhf)) * up;
    }
    default: return (gate > 0.0f ? gate : gate == gate ? vf{} : gate) * up;
  }
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
