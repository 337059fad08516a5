/* sinkhorn: softmax of the rows + eps; columns, then rows and columns in turn, over sums + eps.
 *
 * A task is as many tokens as a vector has elements, a token in each place: R * R vectors on the
 * stack (in registers for R = 4) through all steps. Bound by division: 2 * iterations * R * R of
 * vectors a task; with one token all but one place is idle. */
#include "../base/parallel.h"
#include "../base/tensor.h"
#include "_sinkhorn.h"

namespace transom::TRANSOM_LEVEL {
namespace {

#define ARGUMENT(name) TRANSOM_SINKHORN_##name

struct Work {
  const transom_tensor *logits;
  float *comb;
  int64_t T, R, iterations;
  float eps;
  int64_t next; /* group of kWidth tokens, by fetch-and-add */
};

Work describe(const transom_call *call) {
  Work work = {};
  const transom_tensor *logits = work.logits = tensor(call, ARGUMENT(LOGITS));
  work.T = 1;
  for (int i = 0; i < logits->ndim - 2; i++) work.T *= logits->shape[i];
  work.R = logits->shape[logits->ndim - 1];
  work.iterations = call->args[ARGUMENT(ITERATIONS)].i;
  work.eps = static_cast<float>(call->args[ARGUMENT(EPS)].f);
  return work;
}

void groups(void *context, int32_t) {
  Work *work = static_cast<Work *>(context);
  const transom_tensor *in = work->logits;
  const int64_t R = work->R, down = in->strides[in->ndim - 2], along = in->strides[in->ndim - 1];
  vf m[kMostStreams * kMostStreams];
  for (;;) {
    const int64_t first = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED) * kWidth;
    if (first >= work->T) return;
    const int64_t tokens = min_of(kWidth, work->T - first);
    for (int64_t i = 0; i < R * R; i++) m[i] = vf{};
    for (int64_t t = 0; t < tokens; t++) {
      const int64_t start = start_of(in, 2, first + t);
      for (int64_t i = 0; i < R; i++)
        for (int64_t j = 0; j < R; j++)
          m[i * R + j][t] = number(in, start + i * down + j * along);
    }
    steps(m, R, work->iterations, work->eps);
    float *out = work->comb + first * R * R;
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t i = 0; i < R * R; i++) out[t * R * R + i] = m[i][t];
  }
}

int32_t supports(const transom_call *call, transom_status *status) {
  const Work work = describe(call);
  return streams_fit(work.logits, "logits", work.R, status);
}

int32_t run(const transom_call *call, transom_status *) {
  Work work = describe(call);
  if (work.R == 0) return 0;
  work.comb = static_cast<float *>(call->outs[0]->data);
  const double divisions =
      2.0 * static_cast<double>(work.T * work.R * work.R) * static_cast<double>(work.iterations);
  /* A division weighs as much as some four multiplications. */
  const double most = static_cast<double>((work.T + kWidth - 1) / kWidth);
  const int32_t threads = threads_for(4.0 * divisions, call->threads);
  parallel(threads <= most ? threads : static_cast<int32_t>(most), groups, &work);
  return 0;
}

}  // namespace

extern const transom_impl sinkhorn = {
    sizeof(transom_impl), TRANSOM_TUNED, "sinkhorn", "native", TRANSOM_SINKHORN_HASH,
    TRANSOM_DETERMINISTIC, 0, supports, nullptr, run};

}  // namespace transom::TRANSOM_LEVEL
