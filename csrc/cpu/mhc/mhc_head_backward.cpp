/* mhc_head_backward: see _mixes_backward.h; the gradient of a is x . dh through the sigmoid. */
#include "_mixes_backward.h"

namespace transom::TRANSOM_LEVEL {

TRANSOM_KERNEL(mhc_head_backward, supports, workspace, run)

namespace {

Backward describe(const transom_call *call) {
  const transom_tensor *x = tensor(call, ARG(X));
  Backward work = backward_of(mixes_of(x, tensor(call, ARG(FN)), x->shape[x->ndim - 2]),
                              call->threads, 0);
  work.out.dh = tensor(call, ARG(DH));
  return work;
}

void coefficients(const transom_call *call, const Backward &work, int64_t token, const vf *sums) {
  const transom_value *args = call->args;
  const transom_tensor *base = tensor(call, ARG(BASE));
  const Mixes &mixes = work.mixes;
  const int64_t R = mixes.R;
  const float by = number(tensor(call, ARG(SCALE)), 0);
  const float eps = static_cast<float>(args[ARG(EPS)].f);
  float u[kMostStreams + 1] = {}, gate[kMostStreams + kWidth] = {}, da[kMostStreams];
  float scale[kMostStreams];
  totals(mixes, sums, static_cast<float>(args[ARG(RMS_EPS)].f), u);
  for (int64_t j = 0; j < R; j++) gate[j] = u[j] * u[R] * by + number(base, j * base->strides[0]);
  for (int64_t j = 0; j < R; j += kWidth) store(gate + j, sigmoid(load(gate + j)));
  against_streams(mixes, work.out.dh, mixes.first + token, da);
  for (int64_t j = 0; j < R; j++) {
    da[j] = da[j] * gate[j] * (1.0f - gate[j]);
    scale[j] = by;
    gate[j] += eps;
  }
  set_record(work, token, da, u, scale, gate);
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
  run_backward(
      &work, 1,
      [&](const Backward &span, int32_t, int64_t first, int64_t tokens, const vf *sums) {
        for (int64_t t = 0; t < tokens; t++)
          coefficients(call, span, first + t, sums + t * span.mixes.sums);
      },
      [](int64_t) { return 0; });
  return 0;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
