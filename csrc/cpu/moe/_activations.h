/* The experts' activations on rows of float32. */
#pragma once

#include <math.h>

#include "../base/tensor.h"

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

/* h, and the gradients of gate and up for one of h, which are zero strictly beyond a clamp. */
inline vf apply_backward(const Gated &gated, vf gate, vf up, vf dh, vf *dgate, vf *dup) {
  const vf most = all(gated.limit);
  vf g = gate, u = up, value, slope;
  if (gated.limited) {
    g = g > most ? most : g;
    u = u > most ? most : u < -most ? -most : u;
  }
  switch (gated.activation) {
    case kSilu:
    case kSwigluOai: {
      const vf a = all(gated.activation == kSilu ? 1.0f : gated.alpha);
      const vf sigmoid = 1.0f / (1.0f + exp(-g * a));
      value = g * sigmoid;
      slope = sigmoid * (1.0f + a * g * (1.0f - sigmoid));
      if (gated.activation == kSwigluOai) u += 1.0f;
      break;
    }
    case kGelu: {
      const vf below = 0.5f * (1.0f + each(g * 0.70710678f, erff));
      value = g * below;
      slope = below + g * (exp(-0.5f * g * g) * 0.39894228f);
      break;
    }
    case kGeluTanh: {
      const vf t = each(0.79788456f * (g + 0.044715f * g * g * g), tanhf);
      value = 0.5f * g * (1.0f + t);
      slope = 0.5f * (1.0f + t) +
              0.5f * g * (1.0f - t * t) * (0.79788456f * (1.0f + 0.134145f * g * g));
      break;
    }
    default:
      value = g > 0.0f ? g : g == g ? vf{} : g;
      slope = g > 0.0f ? all(1.0f) : vf{};
  }
  *dgate = dh * u * slope;
  *dup = dh * value;
  if (gated.limited) {
    *dgate = gate > most ? vf{} : *dgate;
    *dup = ((up > most) | (up < -most)) ? vf{} : *dup;
  }
  return value * u;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
