/* sinkhorn_backward: the steps are taken again and recorded, then walked backwards.
 *
 * A task is as many tokens as a vector has elements, as in sinkhorn. It is bound by division, and by
 * L1, where the steps are recorded. */
#include "../base/kernel.h"
#include "_sinkhorn.h"

namespace transom::TRANSOM_LEVEL {

TRANSOM_KERNEL(sinkhorn_backward, supports, workspace, run)

namespace {

struct Work {
  const transom_tensor *dcomb, *logits;
  int64_t T, R, iterations, groups;
  float eps;
  int32_t threads;
};

Work describe(const transom_call *call) {
  Work work = {};
  work.dcomb = tensor(call, ARG(DCOMB)), work.logits = tensor(call, ARG(LOGITS));
  work.T = tokens_of(work.logits, 2), work.R = work.logits->shape[work.logits->ndim - 1];
  work.iterations = call->args[ARG(ITERATIONS)].i;
  work.eps = static_cast<float>(call->args[ARG(EPS)].f);
  work.groups = (work.T + kWidth - 1) / kWidth;
  const double divisions =
      4.0 * static_cast<double>(work.T * work.R * work.R) * static_cast<double>(work.iterations);
  /* A division weighs as much as some four multiplications. */
  const int32_t threads = threads_for(4.0 * divisions, call->threads);
  work.threads = static_cast<int32_t>(clamp(work.groups, 1, threads));
  return work;
}

int64_t record_bytes(const Work &work) {
  return recorded_vectors(work.R, work.iterations) * static_cast<int64_t>(sizeof(vf));
}

int32_t supports(const transom_call *call, transom_status *status) {
  const Work work = describe(call);
  return streams_fit(work.logits, "logits", work.R, status);
}

uint64_t workspace(const transom_call *call) {
  const Work work = describe(call);
  return static_cast<uint64_t>(work.threads * record_bytes(work));
}

int32_t run(const transom_call *call, transom_status *) {
  const Work work = describe(call);
  const int64_t R = work.R;
  const transom_tensor *out = call->outs[0];
  if (R == 0) return 0;
  tasks(work.threads, work.groups, [&](int64_t group, int32_t thread) {
    const int64_t first = group * kWidth, tokens = min_of(kWidth, work.T - first);
    void *record = static_cast<char *>(call->workspace) + thread * record_bytes(work);
    vf m[kMostStreams * kMostStreams], grad[kMostStreams * kMostStreams];
    read_matrices(work.logits, R, first, tokens, m);
    read_matrices(work.dcomb, R, first, tokens, grad);
    normalize_backward(m, grad, R, work.iterations, work.eps, static_cast<vf *>(record));
    for (int64_t t = 0; t < tokens; t++) {
      float row[kMostStreams * kMostStreams];
      for (int64_t i = 0; i < R * R; i++) row[i] = grad[i][t];
      write_row(at(out, (first + t) * R * R), kind(out), row, R * R);
    }
  });
  return 0;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
