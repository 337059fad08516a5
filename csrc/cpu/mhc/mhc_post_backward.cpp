/* mhc_post_backward: of each token, df = sum of post[k] * dy[k]; dx[j] = sum over k of comb[j][k] *
 * dy[k]; dpost[k] = dy[k] . f; dcomb[j][k] = x[j] . dy[k].
 *
 * One pass is bound by memory: (3R + 2) * D elements a token, each once. A chunk of every stream is
 * read into L1 as float32, from where both the outputs and the products are made. */
#include "../base/kernel.h"
#include "_sinkhorn.h"

namespace transom::TRANSOM_LEVEL {

TRANSOM_KERNEL(mhc_post_backward, supports, nothing, run)

namespace {

constexpr int64_t kInL1 = 256;

struct Work {
  const transom_call *call;
  const transom_tensor *dy, *f, *x, *post, *comb;
  int64_t T, R, D, tokens; /* tokens of a task */
};

Work describe(const transom_call *call) {
  Work work = {};
  work.call = call;
  work.dy = tensor(call, ARG(DY));
  work.f = tensor(call, ARG(F));
  work.x = tensor(call, ARG(X));
  work.post = tensor(call, ARG(POST));
  work.comb = tensor(call, ARG(COMB));
  const transom_tensor *x = work.x;
  work.T = tokens_of(x, 2);
  work.R = x->shape[x->ndim - 2], work.D = x->shape[x->ndim - 1];
  return work;
}

/* out = sum over k of by[k] * dy[k]. */
template <int kR>
void combine(int64_t given, const float (*dy)[kInL1], const vf *by, int64_t n, float *out) {
  const int64_t R = kR > 0 ? kR : given;
  for (int64_t i = 0; i < n; i += kWidth) {
    vf sum = by[0] * load(dy[0] + i);
#pragma GCC unroll 4
    for (int64_t k = 1; k < R; k++) sum += by[k] * load(dy[k] + i);
    store(out + i, sum);
  }
}

/* sums[k] += x . dy[k]. */
template <int kR>
void product(int64_t given, const float *x, const float (*dy)[kInL1], int64_t n, vf *sums) {
  if constexpr (kR > 0) {
    vf here[kR];
#pragma GCC unroll 4
    for (int k = 0; k < kR; k++) here[k] = sums[k];
    for (int64_t i = 0; i < n; i += kWidth) {
      const vf left = load(x + i);
#pragma GCC unroll 4
      for (int k = 0; k < kR; k++) here[k] += left * load(dy[k] + i);
    }
#pragma GCC unroll 4
    for (int k = 0; k < kR; k++) sums[k] = here[k];
  } else {
    for (int64_t k = 0; k < given; k++)
      for (int64_t i = 0; i < n; i += kWidth) sums[k] += load(x + i) * load(dy[k] + i);
  }
}

template <int kR>
void token(const Work *work, int64_t t) {
  const int64_t R = work->R, D = work->D;
  alignas(64) float dy[kMostStreams][kInL1], in[kInL1], out[kInL1];
  const transom_tensor *f = work->f, *x = work->x, *g = work->dy;
  const transom_tensor *p = work->post, *c = work->comb;
  transom_tensor *const *outs = work->call->outs;
  /* Products with f first, then with each stream of x. */
  vf sums[(kMostStreams + 1) * kMostStreams], post[kMostStreams];
  vf comb[kMostStreams * kMostStreams];
  for (int64_t i = 0; i < (R + 1) * R; i++) sums[i] = vf{};
  const int64_t p0 = start_of(p, 1, t), c0 = start_of(c, 2, t);
  for (int64_t j = 0; j < R; j++) {
    post[j] = all(number(p, p0 + j * p->strides[p->ndim - 1]));
    for (int64_t k = 0; k < R; k++)
      comb[j * R + k] =
          all(number(c, c0 + j * c->strides[c->ndim - 2] + k * c->strides[c->ndim - 1]));
  }
  const int64_t f0 = start_of(f, 1, t), x0 = start_of(x, 2, t), g0 = start_of(g, 2, t);
  const int64_t f_last = f->strides[f->ndim - 1];
  const int64_t x_last = x->strides[x->ndim - 1], x_between = x->strides[x->ndim - 2];
  const int64_t g_last = g->strides[g->ndim - 1], g_between = g->strides[g->ndim - 2];
  for (int64_t d = 0; d < D; d += kInL1) {
    const int64_t n = min_of(kInL1, D - d);
    for (int64_t k = 0; k < R; k++) read_row(g, g0 + k * g_between + d * g_last, g_last, n, dy[k]);
    read_row(f, f0 + d * f_last, f_last, n, in);
    product<kR>(R, in, dy, n, sums);
    combine<kR>(R, dy, post, n, out);
    write_row(at(outs[0], t * D + d), kind(outs[0]), out, n);
    for (int64_t j = 0; j < R; j++) {
      read_row(x, x0 + j * x_between + d * x_last, x_last, n, in);
      product<kR>(R, in, dy, n, sums + (j + 1) * R);
      combine<kR>(R, dy, comb + j * R, n, out);
      write_row(at(outs[1], (t * R + j) * D + d), kind(outs[1]), out, n);
    }
  }
  float *dpost = static_cast<float *>(outs[2]->data) + t * R;
  float *dcomb = static_cast<float *>(outs[3]->data) + t * R * R;
  for (int64_t k = 0; k < R; k++) dpost[k] = sum(sums[k]);
  for (int64_t i = 0; i < R * R; i++) dcomb[i] = sum(sums[R + i]);
}

int32_t supports(const transom_call *call, transom_status *status) {
  const Work work = describe(call);
  return streams_fit(work.x, "x", work.R, status);
}

int32_t run(const transom_call *call, transom_status *) {
  Work work = describe(call);
  const int64_t R = work.R, D = work.D;
  if (work.T * R == 0) {
    /* No streams: f has no part in anything. */
    memset(call->outs[0]->data, 0, static_cast<size_t>(work.T * D * size_of(call->outs[0])));
    return 0;
  }
  const double products = static_cast<double>(work.T * D) * static_cast<double>(R);
  /* Memory is the limit: an element weighs as much as some four multiplications. */
  const int32_t threads = threads_for(12.0 * products, call->threads);
  work.tokens = clamp((1 << 19) / max_of(1, R * D), 1, max_of(1, work.T / (4 * threads)));
  for (int i = 0; i < 2; i++)
    about_to_write(call->outs[i]->data, work.T * (i == 0 ? 1 : R) * D * size_of(call->outs[i]));
  tasks(threads, (work.T + work.tokens - 1) / work.tokens, [&](int64_t task, int32_t) {
    const int64_t first = task * work.tokens;
    for (int64_t t = first; t < min_of(first + work.tokens, work.T); t++) {
      if (R == 4)
        token<4>(&work, t);
      else
        token<0>(&work, t);
    }
  });
  return 0;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
