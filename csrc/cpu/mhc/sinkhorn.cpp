/* sinkhorn: softmax of the rows + eps; columns, then rows and columns in turn, over sums + eps.
 *
 * A task is as many tokens as a vector has elements, a token in each lane: R * R vectors on the
 * stack (in registers for R = 4) go through all steps. It is bound by division, 2 * iterations *
 * R * R of vectors a task; with one token all lanes but one are idle. */
#include "../base/kernel.h"
#include "_sinkhorn.h"

namespace transom::TRANSOM_LEVEL {

TRANSOM_KERNEL(sinkhorn, supports, nothing, run)

namespace {

int32_t supports(const transom_call *call, transom_status *status) {
  const transom_tensor *logits = tensor(call, ARG(LOGITS));
  return streams_fit(logits, "logits", logits->shape[logits->ndim - 1], status);
}

int32_t run(const transom_call *call, transom_status *) {
  const transom_tensor *logits = tensor(call, ARG(LOGITS));
  const int64_t T = tokens_of(logits, 2), R = logits->shape[logits->ndim - 1];
  const int64_t iterations = call->args[ARG(ITERATIONS)].i, groups = (T + kWidth - 1) / kWidth;
  const float eps = static_cast<float>(call->args[ARG(EPS)].f);
  float *comb = static_cast<float *>(call->outs[0]->data);
  if (R == 0) return 0;
  const double divisions =
      2.0 * static_cast<double>(T * R * R) * static_cast<double>(iterations);
  /* A division weighs as much as some four multiplications. */
  const int32_t threads = threads_for(4.0 * divisions, call->threads);
  tasks(static_cast<int32_t>(min_of(threads, groups)), groups, [&](int64_t group, int32_t) {
    const int64_t first = group * kWidth, tokens = min_of(kWidth, T - first);
    vf m[kMostStreams * kMostStreams];
    read_matrices(logits, R, first, tokens, m);
    normalize(m, R, iterations, eps);
    float *out = comb + first * R * R;
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t i = 0; i < R * R; i++) out[t * R * R + i] = m[i][t];
  });
  return 0;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
