/* mhc_head: h = sum of pre[j] * x[j], pre = sigmoid(mix * scale + base) + eps, mix as in mhc_pre.
 *
 * The products and the squares of a block of tokens are taken in one pass over their streams
 * (_mixes.h), then h, for which x is read again, from the cache. It is bound by the memory of x. */
#include "_mixes.h"

namespace transom::TRANSOM_LEVEL {

TRANSOM_KERNEL(mhc_head, supports, workspace, run)

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
  work.mixes = mixes_of(x, tensor(call, ARG(FN)), x->shape[x->ndim - 2]);
  work.how = schedule(work.mixes, call->threads);
  return work;
}

void finish(const Work &work, int64_t token, const vf *sums) {
  const transom_value *args = work.call->args;
  const transom_tensor *base = tensor(work.call, ARG(BASE));
  const float scale = number(tensor(work.call, ARG(SCALE)), 0);
  const int64_t R = work.mixes.R;
  const vf eps = all(static_cast<float>(args[ARG(EPS)].f));
  float u[kMostStreams + 1] = {}, pre[kMostStreams + kWidth];
  totals(work.mixes, sums, static_cast<float>(args[ARG(RMS_EPS)].f), u);
  for (int64_t j = 0; j < R; j++)
    pre[j] = u[j] * u[R] * scale + number(base, j * base->strides[0]);
  for (int64_t j = R; j < up_to(R, kWidth); j++) pre[j] = 0.0f;
  for (int64_t j = 0; j < R; j += kWidth) store(pre + j, sigmoid(load(pre + j)) + eps);
  collapse(work.mixes, token, pre, work.call->outs[0], work.past_caches);
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
            for (int64_t t = 0; t < tokens; t++)
              finish(work, first + t, sums + t * work.mixes.sums);
          });
  return 0;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
