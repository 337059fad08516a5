/* mhc_pre_backward: see _mixes_backward.h; the gradient of a comes from h, as x . dh, and from post
 * through their sigmoids, and from comb through the steps of Sinkhorn, which are taken again and
 * walked backwards with a token in each lane. */
#include "_mixes_backward.h"

namespace transom::TRANSOM_LEVEL {

TRANSOM_KERNEL(mhc_pre_backward, supports, workspace, run)

namespace {

constexpr int64_t kMostRows = (2 + kMostStreams) * kMostStreams;

Backward describe(const transom_call *call) {
  const transom_tensor *x = tensor(call, ARG(X));
  const int64_t R = x->shape[x->ndim - 2];
  const int64_t recorded = recorded_vectors(R, call->args[ARG(ITERATIONS)].i);
  Backward work = backward_of(mixes_of(x, tensor(call, ARG(FN)), (2 + R) * R), call->threads,
                              recorded * static_cast<int64_t>(sizeof(vf)));
  work.out.dh = tensor(call, ARG(DH));
  return work;
}

/* The records of at most kWidth tokens. */
void coefficients(const transom_call *call, const Backward &work, int32_t thread, int64_t first,
                  int64_t tokens, const vf *sums) {
  const transom_value *args = call->args;
  const transom_tensor *base = tensor(call, ARG(BASE));
  const transom_tensor *given = tensor(call, ARG(SCALE));
  const transom_tensor *dpost = tensor(call, ARG(DPOST));
  const transom_tensor *dcomb = tensor(call, ARG(DCOMB));
  const Mixes &mixes = work.mixes;
  const int64_t R = mixes.R, N = mixes.N;
  const float eps = static_cast<float>(args[ARG(EPS)].f);
  const float rms_eps = static_cast<float>(args[ARG(RMS_EPS)].f);
  const float post_scale = static_cast<float>(args[ARG(POST_SCALE)].f);
  const int64_t p_last = dpost->strides[dpost->ndim - 1];
  const int64_t c_last = dcomb->strides[dcomb->ndim - 1];
  const int64_t c_between = dcomb->strides[dcomb->ndim - 2];
  float u[kWidth][kMostRows + 1] = {}, da[kWidth][kMostRows], pre[kWidth][kMostStreams];
  float dpre[kWidth][kMostStreams] = {}, scale[kMostRows];
  vf r = {}, m[kMostStreams * kMostStreams], grad[kMostStreams * kMostStreams];
  for (int64_t i = 0; i < R * R; i++) grad[i] = vf{};
  for (int64_t t = 0; t < tokens; t++) {
    const int64_t token = mixes.first + first + t, c0 = start_of(dcomb, 2, token);
    totals(mixes, sums + t * mixes.sums, rms_eps, u[t]);
    r[t] = u[t][N];
    against_streams(mixes, work.out.dh, token, dpre[t]);
    for (int64_t i = 0; i < R; i++)
      for (int64_t j = 0; j < R; j++)
        grad[i * R + j][t] = number(dcomb, c0 + i * c_between + j * c_last);
  }
  for (int64_t c = 0; c < N; c++) {
    const int64_t which = c < R ? 0 : c < 2 * R ? 1 : 2;
    scale[c] = number(given, which * given->strides[0]);
    vf here;
    for (int t = 0; t < kWidth; t++) here[t] = u[t][c];
    const vf a = here * r * all(scale[c]) + all(number(base, c * base->strides[0]));
    if (which == 2) {
      m[c - 2 * R] = a;
      continue;
    }
    const vf gate = sigmoid(a), slope = gate * (1.0f - gate);
    for (int64_t t = 0; t < tokens; t++) {
      if (which == 0) {
        pre[t][c] = gate[t] + eps;
        da[t][c] = dpre[t][c] * slope[t];
      } else {
        const int64_t token = mixes.first + first + t;
        da[t][c] = number(dpost, start_of(dpost, 1, token) + (c - R) * p_last) * post_scale *
                   slope[t];
      }
    }
  }
  void *record = work.memory.callers + thread * work.caller_bytes;
  normalize_backward(m, grad, R, args[ARG(ITERATIONS)].i, eps, static_cast<vf *>(record));
  for (int64_t t = 0; t < tokens; t++) {
    for (int64_t i = 0; i < R * R; i++) da[t][2 * R + i] = grad[i][t];
    set_record(work, first + t, da[t], u[t], scale, pre[t]);
  }
}

int32_t supports(const transom_call *call, transom_status *status) {
  const transom_tensor *x = tensor(call, ARG(X));
  return streams_fit(x, "x", x->shape[x->ndim - 2], status) &&
         rows_fit(tensor(call, ARG(FN)), status);
}

uint64_t workspace(const transom_call *call) {
  Backward work = describe(call);
  Arena arena;
  lay_out(&work, arena);
  return arena.bytes();
}

int32_t run(const transom_call *call, transom_status *) {
  Backward work = describe(call);
  Arena arena(call->workspace);
  lay_out(&work, arena);
  work.out.dx = call->outs[0];
  work.out.dfn = static_cast<float *>(call->outs[1]->data);
  work.out.dscale = static_cast<float *>(call->outs[2]->data);
  work.out.dbase = static_cast<float *>(call->outs[3]->data);
  const int64_t R = work.mixes.R;
  run_backward(
      &work, 3,
      [&](const Backward &span, int32_t thread, int64_t first, int64_t tokens, const vf *sums) {
        for (int64_t t = 0; t < tokens; t += kWidth)
          coefficients(call, span, thread, first + t, min_of(kWidth, tokens - t),
                       sums + t * span.mixes.sums);
      },
      [R](int64_t c) { return c < R ? 0 : c < 2 * R ? 1 : 2; });
  return 0;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
