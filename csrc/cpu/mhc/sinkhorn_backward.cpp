/* sinkhorn_backward: the steps are taken again and kept, then walked backwards.
 *
 * A task is as many tokens as a vector has elements, as in sinkhorn. Bound by division, and by L1,
 * where the steps are kept. */
#include "../base/parallel.h"
#include "../base/tensor.h"
#include "_sinkhorn.h"

namespace transom::TRANSOM_LEVEL {
namespace {

#define ARGUMENT(name) TRANSOM_SINKHORN_BACKWARD_##name

struct Work {
  const transom_call *call;
  const transom_tensor *dcomb, *logits;
  int64_t T, R, iterations, kept;
  float eps;
  int32_t threads;
  int64_t next; /* group of kWidth tokens, by fetch-and-add */
};

Work describe(const transom_call *call) {
  Work work = {};
  work.call = call;
  work.dcomb = tensor(call, ARGUMENT(DCOMB));
  const transom_tensor *logits = work.logits = tensor(call, ARGUMENT(LOGITS));
  work.T = 1;
  for (int i = 0; i < logits->ndim - 2; i++) work.T *= logits->shape[i];
  work.R = logits->shape[logits->ndim - 1];
  work.iterations = call->args[ARGUMENT(ITERATIONS)].i;
  work.kept = kept_vectors(work.R, work.iterations);
  work.eps = static_cast<float>(call->args[ARGUMENT(EPS)].f);
  const double divisions =
      4.0 * static_cast<double>(work.T * work.R * work.R) * static_cast<double>(work.iterations);
  /* A division weighs as much as some four multiplications. */
  const int32_t threads = threads_for(4.0 * divisions, call->threads);
  work.threads = static_cast<int32_t>(clamp((work.T + kWidth - 1) / kWidth, 1, threads));
  return work;
}

/* The matrices of `tokens` tokens from `first` on, a token in each place. */
void gather(const transom_tensor *from, int64_t R, int64_t first, int64_t tokens, vf *m) {
  const int64_t down = from->strides[from->ndim - 2], along = from->strides[from->ndim - 1];
  for (int64_t i = 0; i < R * R; i++) m[i] = vf{};
  for (int64_t t = 0; t < tokens; t++) {
    const int64_t start = start_of(from, 2, first + t);
    for (int64_t i = 0; i < R; i++)
      for (int64_t j = 0; j < R; j++)
        m[i * R + j][t] = number(from, start + i * down + j * along);
  }
}

void groups(void *context, int32_t thread) {
  Work *work = static_cast<Work *>(context);
  const int64_t R = work->R;
  const transom_tensor *out = work->call->outs[0];
  vf m[kMostStreams * kMostStreams], grad[kMostStreams * kMostStreams];
  vf *kept = static_cast<vf *>(work->call->workspace) + thread * work->kept;
  for (;;) {
    const int64_t first = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED) * kWidth;
    if (first >= work->T) return;
    const int64_t tokens = min_of(kWidth, work->T - first);
    gather(work->logits, R, first, tokens, m);
    gather(work->dcomb, R, first, tokens, grad);
    steps_backward(m, grad, R, work->iterations, work->eps, kept);
    for (int64_t t = 0; t < tokens; t++) {
      float row[kMostStreams * kMostStreams];
      for (int64_t i = 0; i < R * R; i++) row[i] = grad[i][t];
      write_row(at(out, (first + t) * R * R), kind(out), row, R * R);
    }
  }
}

int32_t supports(const transom_call *call, transom_status *status) {
  const Work work = describe(call);
  return streams_fit(work.logits, "logits", work.R, status);
}

uint64_t workspace(const transom_call *call) {
  const Work work = describe(call);
  return static_cast<uint64_t>(work.threads * work.kept) * sizeof(vf);
}

int32_t run(const transom_call *call, transom_status *) {
  Work work = describe(call);
  if (work.R == 0) return 0;
  parallel(work.threads, groups, &work);
  return 0;
}

}  // namespace

extern const transom_impl sinkhorn_backward = {
    sizeof(transom_impl), TRANSOM_TUNED, "sinkhorn_backward", "native",
    TRANSOM_SINKHORN_BACKWARD_HASH, TRANSOM_DETERMINISTIC, 0, supports, workspace, run};

}  // namespace transom::TRANSOM_LEVEL
