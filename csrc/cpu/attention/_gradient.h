/* One query's heads against a tile of keys, backwards. Internal linkage, as in vector.h. */
#pragma once

#include "_attention_tile.h"

namespace transom::TRANSOM_LEVEL {
namespace {

/* Per head of a query, [padded] each; infinite, 0, 0, 0 for heads beyond the last. */
struct Norms {
  float *lse, *share, *delta, *dlse;
};

inline Norms cut_norms(Cutter *cutter, int64_t lanes) {
  float *lse = cutter->part(lanes), *share = cutter->part(lanes);
  float *delta = cutter->part(lanes);
  return {lse, share, delta, cutter->part(lanes)};
}

/* What a thread needs for one query and one tile. */
struct Backward {
  float *queries, *outputs;           /* packed q and do */
  float *query_rows, *output_rows;    /* the same as rows, zeros up to whole panels */
  float *scores, *products, *weights; /* [kKeys][padded] twice, [padded][kKeys] */
};

inline Backward cut_backward(Cutter *cutter, int64_t heads, int64_t D, int64_t v_dim) {
  const int64_t padded = up_to(heads, kPanel);
  Backward desk = {};
  desk.queries = cutter->part(padded * D), desk.outputs = cutter->part(padded * v_dim);
  desk.query_rows = cutter->part(heads * tile_stride(D));
  desk.output_rows = cutter->part(heads * tile_stride(v_dim));
  desk.scores = cutter->part(kKeys * padded), desk.products = cutter->part(kKeys * padded);
  desk.weights = cutter->part(kKeys * padded);
  return desk;
}

/* The gradient that comes in, what the forward gave, and its sink. */
struct Given {
  const transom_tensor *dout, *dlse, *o, *lse, *sink;
};

inline float sigmoid(float x) {
  return x >= 0.0f ? 1.0f / (1.0f + weight_of(-x)) : weight_of(x) / (1.0f + weight_of(x));
}

inline float number_of(const transom_tensor *t, int64_t b, int64_t s, int64_t h) {
  return number(t, b * t->strides[0] + s * t->strides[1] + h * t->strides[2]);
}

/* do . o of one head of a query. */
inline float delta_of(const Given &given, int64_t b, int64_t s, int64_t h) {
  const auto start = [&](const transom_tensor *t) {
    return b * t->strides[0] + s * t->strides[1] + h * t->strides[2];
  };
  constexpr int64_t kSome = 512;
  alignas(64) float left[kSome], right[kSome];
  const transom_tensor *x = given.dout, *y = given.o;
  vf dot = {};
  for (int64_t d = 0; d < x->shape[3]; d += kSome) {
    const int64_t n = min_of(kSome, x->shape[3] - d);
    read_row(x, start(x) + d * x->strides[3], x->strides[3], n, left);
    read_row(y, start(y) + d * y->strides[3], y->strides[3], n, right);
    for (int64_t i = 0; i < n; i += kWidth) dot += load(left + i) * load(right + i);
  }
  return sum(dot);
}

/* The norms of `heads` heads of query s, from `first` on. */
inline void read_norms(const Given &given, int64_t b, int64_t s, int64_t first, int64_t heads,
                       Norms norms) {
  for (int64_t h = 0; h < up_to(heads, kPanel); h++) {
    norms.lse[h] = -kNever;
    norms.share[h] = norms.delta[h] = norms.dlse[h] = 0.0f;
    if (h >= heads) continue;
    /* Without keys there is nothing to weigh, whatever the lse's gradient. */
    const float lse = number_of(given.lse, b, s, first + h);
    if (lse == kNever) continue;
    norms.lse[h] = lse;
    norms.share[h] = sigmoid(lse - number(given.sink, (first + h) * given.sink->strides[0]));
    norms.delta[h] = delta_of(given, b, s, first + h);
    norms.dlse[h] = number_of(given.dlse, b, s, first + h);
  }
}

/* What a head of a query gives to the gradient of its sink. */
inline float sink_gradient(float sink, float lse, float delta) {
  return sink == kNever || lse == -kNever ? 0.0f : -sigmoid(sink - lse) * delta;
}

/* t[heads][width] as rows of float32 with zeros up to whole panels. */
inline void read_heads(const transom_tensor *t, int64_t first, int64_t heads, float *rows,
                       int64_t stride) {
  const int64_t width = t->shape[3], whole = up_to(width, kPanel);
  for (int64_t h = 0; h < heads; h++, rows += stride) {
    read_row(t, first + h * t->strides[2], t->strides[3], width, rows);
    for (int64_t d = width; d < whole; d++) rows[d] = 0.0f;
  }
}

/* scores and products become dS, scaled, and the weights of the output, in place. */
inline void weigh_back(float *scores, float *products, int64_t keys, int64_t lanes, float scale,
                       Norms norms) {
  for (int64_t h = 0; h < lanes; h += kWidth) {
    const vf lse = load(norms.lse + h), share = load(norms.share + h);
    const vf delta = load(norms.delta + h), dlse = load(norms.dlse + h);
    for (int64_t j = 0; j < keys; j++) {
      float *score = scores + j * lanes + h, *product = products + j * lanes + h;
      const vf p = weight_of(load(score) * scale - lse);
      store(score, ((load(product) - delta) * share + dlse) * p * scale);
      store(product, p * share);
    }
  }
}

/* out[key][lane] = keys times packed heads. */
inline void against(const float *panels, int64_t lanes, int64_t width, const float *keys,
                    int64_t stride, int64_t count, float *out) {
  if (width == 0) memset(out, 0, static_cast<size_t>(count * lanes) * sizeof(float));
  for (int64_t h = 0; h < lanes; h += kPanel, panels += width * kPanel)
    for (int64_t d = 0; d < width; d += kDepth)
      multiply_panel(count, min_of(kDepth, width - d), keys + d, stride, panels + d * kPanel,
                     kPanel, out + h, lanes, d > 0);
}

/* rows[key] (+)= sum over heads of factors[key][head] * of[head]. */
inline void collect(const float *factors, int64_t lanes, int64_t heads, const float *of,
                    int64_t of_stride, int64_t width, int64_t count, float *rows, int64_t stride,
                    bool add) {
  for (int64_t h = 0; h < heads; h += kDepth)
    for (int64_t d = 0; d < width; d += kPanel)
      multiply_panel(count, min_of(kDepth, heads - h), factors + h, lanes,
                     of + h * of_stride + d, of_stride, rows + d, stride, add || h > 0);
}

/* sums[head] += sum over keys of factors[key][head] * keys[key]; weights is overwritten. */
inline void mix(const float *factors, int64_t lanes, int64_t heads, const float *keys,
                int64_t stride, int64_t width, int64_t count, float *weights, float *sums,
                int64_t sum_stride) {
  for (int64_t j = 0; j < count; j += kWidth)
    for (int64_t h = 0; h < lanes; h += 4) {
      vf four[4];
      transpose(factors + j * lanes + h, lanes, four);
      for (int64_t r = 0; r < 4; r++) store(weights + (h + r) * kKeys + j, four[r]);
    }
  for (int64_t d = 0; d < width; d += kPanel)
    multiply_panel(heads, count, weights, kKeys, keys + d, stride, sums + d, sum_stride, true);
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
