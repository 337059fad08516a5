/* lightning_indexer_kl: sum of target * (log target - log softmax of the scores), query by query.
 *
 * A task is a query: its keys are gathered in pieces and multiplied with all heads (_indexer_loss.h).
 * Bound by FMA. */
#include "../base/parallel.h"
#include "_indexer_loss.h"

namespace transom::TRANSOM_LEVEL {
namespace {

#define ARGUMENT(name) TRANSOM_LIGHTNING_INDEXER_KL_##name

struct Work : Listed {
  const transom_call *call;
  int64_t thread_floats;
  int32_t threads;
  int64_t next;
};

Work describe(const transom_call *call) {
  Work work = {};
  work.call = call;
  static_cast<Listed &>(work) =
      listed_of(tensor(call, ARGUMENT(Q)), tensor(call, ARGUMENT(K)),
                tensor(call, ARGUMENT(WEIGHTS)), tensor(call, ARGUMENT(TARGET)),
                tensor(call, ARGUMENT(INDICES)));
  work.threads = threads_for(
      static_cast<double>(work.B * work.S * work.L) * static_cast<double>(work.H * work.D),
      call->threads);
  Cutter cutter = {nullptr};
  cut_scored(&cutter, work);
  work.thread_floats = cutter.floats;
  return work;
}

void take_queries(void *context, int32_t thread) {
  Work *work = static_cast<Work *>(context);
  Cutter cutter = {static_cast<float *>(work->call->workspace) + thread * work->thread_floats};
  Scored one = cut_scored(&cutter, *work);
  float *losses = static_cast<float *>(work->call->outs[0]->data);
  for (;;) {
    const int64_t task = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
    if (task >= work->B * work->S) return;
    score(*work, &one, task / work->S, task % work->S);
    double loss = 0.0;
    for (int64_t i = 0; i < one.count; i++) {
      const float goal = one.goals[i];
      if (goal != 0.0f)
        loss += static_cast<double>(goal * (log_of(goal) - (one.scores[i] - one.norm)));
    }
    losses[task] = static_cast<float>(loss);
  }
}

int32_t supports(const transom_call *call, transom_status *status) {
  return readable(tensor(call, ARGUMENT(Q)), "q", status);
}

uint64_t workspace(const transom_call *call) {
  const Work work = describe(call);
  return static_cast<uint64_t>(work.thread_floats * work.threads) * sizeof(float);
}

int32_t run(const transom_call *call, transom_status *) {
  Work work = describe(call);
  parallel(work.threads, take_queries, &work);
  return 0;
}

}  // namespace

extern const transom_impl lightning_indexer_kl = {
    sizeof(transom_impl), TRANSOM_TUNED, "lightning_indexer_kl", "native",
    TRANSOM_LIGHTNING_INDEXER_KL_HASH, TRANSOM_DETERMINISTIC, 0, supports, workspace, run};

}  // namespace transom::TRANSOM_LEVEL
