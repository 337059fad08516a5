/* mhc_pre: mix = x_flat @ fn.T / rms(x_flat); pre, post and comb of it; h = sum of pre[j] * x[j].
 *
 * The products and the squares of a block of tokens are taken in one pass over their streams
 * (_mixes.h), then the gates and Sinkhorn, a token in each lane, and h, for which x is read again,
 * from the cache. It is bound by FMA with many tokens, by the memory of fn with one. */
#include "_mixes.h"

namespace transom::TRANSOM_LEVEL {

TRANSOM_KERNEL(mhc_pre, supports, workspace, run)

namespace {

struct Work {
  const transom_call *call;
  Mixes mixes;
  Schedule how;
  bool past_caches;
};

Work describe(const transom_call *call) {
  Work work = {};
  work.call = call;
  const transom_tensor *x = tensor(call, ARG(X));
  const int64_t R = x->shape[x->ndim - 2];
  work.mixes = mixes_of(x, tensor(call, ARG(FN)), (2 + R) * R);
  work.how = schedule(work.mixes, call->threads);
  return work;
}

/* The outputs of at most kWidth tokens, from their sums. */
void finish(const Work &work, int64_t first, int64_t tokens, const vf *sums) {
  const transom_value *args = work.call->args;
  const transom_tensor *scale = tensor(work.call, ARG(SCALE));
  const transom_tensor *base = tensor(work.call, ARG(BASE));
  const int64_t R = work.mixes.R, N = work.mixes.N;
  const float eps = static_cast<float>(args[ARG(EPS)].f);
  const float post_scale = static_cast<float>(args[ARG(POST_SCALE)].f);
  float *post = static_cast<float *>(work.call->outs[1]->data) + first * R;
  float *comb = static_cast<float *>(work.call->outs[2]->data) + first * R * R;
  float pre[kWidth][kMostStreams], u[kWidth][(2 + kMostStreams) * kMostStreams + 1] = {};
  vf r = {}, m[kMostStreams * kMostStreams];
  for (int64_t t = 0; t < tokens; t++) {
    totals(work.mixes, sums + t * work.mixes.sums, static_cast<float>(args[ARG(RMS_EPS)].f),
           u[t]);
    r[t] = u[t][N];
  }
  for (int64_t c = 0; c < N; c++) {
    vf here;
    for (int t = 0; t < kWidth; t++) here[t] = u[t][c];
    const int64_t which = c < R ? 0 : c < 2 * R ? 1 : 2;
    const vf a = here * r * all(number(scale, which * scale->strides[0])) +
                 all(number(base, c * base->strides[0]));
    if (which == 2) {
      m[c - 2 * R] = a;
      continue;
    }
    const vf gate = which == 0 ? sigmoid(a) + eps : post_scale * sigmoid(a);
    for (int64_t t = 0; t < tokens; t++) {
      if (which == 0)
        pre[t][c] = gate[t];
      else
        post[t * R + c - R] = gate[t];
    }
  }
  normalize(m, R, args[ARG(ITERATIONS)].i, eps);
  for (int64_t t = 0; t < tokens; t++) {
    for (int64_t i = 0; i < R * R; i++) comb[t * R * R + i] = m[i][t];
    collapse(work.mixes, first + t, pre[t], work.call->outs[0], work.past_caches);
  }
}

int32_t supports(const transom_call *call, transom_status *status) {
  const Work work = describe(call);
  return streams_fit(work.mixes.x, "x", work.mixes.R, status) && rows_fit(work.mixes.fn, status);
}

uint64_t workspace(const transom_call *call) {
  const Work work = describe(call);
  Arena arena;
  lay_out(work.mixes, work.how, arena);
  return arena.bytes();
}

int32_t run(const transom_call *call, transom_status *) {
  Work work = describe(call);
  if (work.mixes.T == 0) return 0;
  work.past_caches = goes_past_caches(call->outs[0], work.mixes.T, work.mixes.D);
  Arena arena(call->workspace);
  mix_all(work.mixes, work.how, lay_out(work.mixes, work.how, arena),
          [&](int32_t, int64_t first, int64_t tokens, const vf *sums) {
            for (int64_t t = 0; t < tokens; t += kWidth)
              finish(work, first + t, min_of(kWidth, tokens - t), sums + t * work.mixes.sums);
          });
  return 0;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
