/* route_backward: the gradient of the weights, through the scores of the chosen experts.
 *
 * A task is some tokens. Only the chosen logits have a gradient, but for the softmax over all: a row
 * of zeros is written, and k numbers into it. It is bound by the memory of dlogits. */
#include "../base/kernel.h"
#include "_scores.h"

namespace transom::TRANSOM_LEVEL {

TRANSOM_KERNEL(route_backward, supports, workspace, run)

namespace {

constexpr int64_t kTokens = 16; /* of a task */

struct Work {
  const transom_call *call;
  const transom_tensor *dweights, *logits, *ids;
  Score score;
  bool renormalize;
  float scale;
  int64_t T, E, k;
  int64_t row; /* floats of a row of the workspace */
  int32_t threads;
};

/* The workspace of a thread: by expert, the softmax and gradients; of those that are chosen, logits,
 * scores, gradients, ids and validity. */
struct RouteWorkspace {
  float *scores, *gradients, *logits, *chosen, *chosen_gradients;
  int32_t *ids;
  bool *valid;
};

RouteWorkspace lay_out(const Work &work, Arena &arena) {
  RouteWorkspace own = {};
  own.scores = arena.take<float>(work.row), own.gradients = arena.take<float>(work.row);
  own.logits = arena.take<float>(work.row), own.chosen = arena.take<float>(work.row);
  own.chosen_gradients = arena.take<float>(work.row);
  own.ids = arena.take<int32_t>(work.row), own.valid = arena.take<bool>(work.row);
  return own;
}

int64_t thread_bytes(const Work &work) {
  return bytes_of([&](Arena &arena) { lay_out(work, arena); });
}

Work describe(const transom_call *call) {
  Work work = {};
  work.call = call;
  work.dweights = tensor(call, ARG(DWEIGHTS));
  work.logits = tensor(call, ARG(LOGITS));
  work.ids = tensor(call, ARG(IDS));
  work.score = score_from(call->args[ARG(SCORE)].string);
  work.renormalize = call->args[ARG(RENORMALIZE)].i != 0;
  work.scale = static_cast<float>(call->args[ARG(SCALE)].f);
  work.T = work.logits->shape[0], work.E = work.logits->shape[1], work.k = work.ids->shape[1];
  work.row = up_to(max_of(work.E, work.k), 16) + 16;
  const double each = static_cast<double>(work.E) * (work.score == kSoftmax ? 24.0 : 4.0);
  work.threads = threads_for(static_cast<double>(work.T) * each, call->threads);
  return work;
}

void token(const Work *work, int64_t t, const RouteWorkspace &own) {
  const int64_t E = work->E, k = work->k;
  const transom_tensor *logits = work->logits, *ids = work->ids, *dw = work->dweights;
  const transom_tensor *out = work->call->outs[0];
  float *s = own.scores, *full = own.gradients, *z = own.logits;
  float *chosen = own.chosen, *grad = own.chosen_gradients;
  int32_t *id = own.ids;
  bool *valid = own.valid;
  bool some = false;
  for (int64_t i = 0; i < k; i++) {
    const int64_t given = integer(ids, t * ids->strides[0] + i * ids->strides[1]);
    valid[i] = given >= 0 && given < E;
    some |= valid[i];
    id[i] = valid[i] ? static_cast<int32_t>(given) : 0;
    grad[i] = !valid[i] ? 0.0f
                        : number(dw, t * dw->strides[0] + i * dw->strides[1]) * work->scale;
  }
  void *to = at(out, t * E);
  if (!some || work->score != kSoftmax) memset(to, 0, static_cast<size_t>(E * size_of(out)));
  if (!some) return;
  const int64_t start = t * logits->strides[0], stride = logits->strides[1];
  if (work->score == kSoftmax) {
    read_row(logits, start, stride, E, s);
    for (int64_t i = E; i < up_to(E, kWidth); i++) s[i] = -__builtin_inff();
    softmax(s, E);
  }
  for (int64_t i = 0; i < up_to(k, kWidth); i++)
    z[i] = i >= k || !valid[i] ? 0.0f
           : work->score == kSoftmax ? s[id[i]] : number(logits, start + id[i] * stride);
  for (int64_t i = 0; i < k; i += kWidth)
    store(chosen + i, score_of(work->score, load(z + i)));
  float along = 0.0f;
  if (work->score == kTopkSoftmax) {
    softmax_of_chosen(chosen, valid, k);
    for (int64_t i = 0; i < k; i++) along += grad[i] * chosen[i];
    for (int64_t i = 0; i < k; i++) grad[i] = chosen[i] * (grad[i] - along);
  } else if (work->renormalize) {
    float total = kTiny;
    for (int64_t i = 0; i < k; i++) total += valid[i] ? chosen[i] : 0.0f;
    for (int64_t i = 0; i < k; i++) along += valid[i] ? grad[i] * (chosen[i] / total) : 0.0f;
    for (int64_t i = 0; i < k; i++) grad[i] = (grad[i] - along) / total;
  }
  /* An id may repeat: its gradients are added in the order of the slots. */
  if (work->score == kSoftmax)
    memset(full, 0, static_cast<size_t>(up_to(E, kWidth)) * sizeof(float));
  else
    for (int64_t i = 0; i < k; i++) full[id[i]] = 0.0f;
  for (int64_t i = 0; i < k; i++)
    if (valid[i]) full[id[i]] += grad[i];
  if (work->score == kSoftmax) {
    vf sums = {};
    for (int64_t i = 0; i < E; i += kWidth) sums += load(full + i) * load(s + i);
    const vf dot = all(sum(sums));
    for (int64_t i = 0; i < E; i += kWidth)
      store(full + i, load(s + i) * (load(full + i) - dot));
    write_row(to, kind(out), full, E);
    return;
  }
  for (int64_t i = 0; i < k; i += kWidth) {
    const vf here = load(z + i);
    store(chosen + i, work->score == kTopkSoftmax ? all(1.0f)
                                                  : slope_of(work->score, here, load(chosen + i)));
  }
  with_type_of(out, [&]<class Number>(const Number *) {
    for (int64_t i = 0; i < k; i++)
      if (valid[i]) store_one(static_cast<Number *>(to) + id[i], full[id[i]] * chosen[i]);
  });
}

int32_t supports(const transom_call *call, transom_status *status) {
  return readable(tensor(call, ARG(LOGITS)), "logits", status);
}

uint64_t workspace(const transom_call *call) {
  const Work work = describe(call);
  return static_cast<uint64_t>(work.threads * thread_bytes(work));
}

int32_t run(const transom_call *call, transom_status *) {
  const Work work = describe(call);
  const int64_t bytes = thread_bytes(work);
  tasks(work.threads, (work.T + kTokens - 1) / kTokens, [&](int64_t task, int32_t thread) {
    Arena arena(static_cast<char *>(call->workspace) + thread * bytes);
    const RouteWorkspace own = lay_out(work, arena);
    for (int64_t t = task * kTokens; t < min_of((task + 1) * kTokens, work.T); t++)
      token(&work, t, own);
  });
  return 0;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
