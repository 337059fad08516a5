/* route: scores of a token's logits, the k largest of them + bias, and their weights.
 *
 * A task is some tokens, a token at a time in L1: the scores in vectors, then k times the largest
 * key that is left and its first position. It is bound by arithmetic, an exponential or two a logit.
 * Keys are float32 and comparisons exact, so ties are ties: a chosen key becomes NaN, which no
 * comparison finds again, and a NaN key was -inf before. */
#include "../base/kernel.h"
#include "_scores.h"

namespace transom::TRANSOM_LEVEL {

TRANSOM_KERNEL(route, supports, workspace, run)

namespace {

constexpr int64_t kTokens = 16; /* of a task */

struct Work {
  const transom_call *call;
  const transom_tensor *logits, *bias, *preset, *mask;
  Score score;
  bool renormalize;
  float scale;
  int64_t T, E, k, groups, top_groups;
  int64_t row; /* floats of a row of the workspace */
  int32_t threads;
};

/* The workspace of a thread, whose arrays have an element for each expert, or each that is chosen. */
struct RouteWorkspace {
  float *scores, *keys, *bias, *group_keys, *chosen;
  bool *valid;
  float *largest; /* of each segment */
};

Work describe(const transom_call *call) {
  Work work = {};
  work.call = call;
  work.logits = tensor(call, ARG(LOGITS));
  work.bias = tensor(call, ARG(BIAS));
  work.preset = tensor(call, ARG(PRESET));
  work.mask = tensor(call, ARG(MASK));
  work.score = score_from(call->args[ARG(SCORE)].string);
  work.renormalize = call->args[ARG(RENORMALIZE)].i != 0;
  work.scale = static_cast<float>(call->args[ARG(SCALE)].f);
  work.T = work.logits->shape[0], work.E = work.logits->shape[1];
  work.k = call->args[ARG(K)].i;
  work.groups = call->args[ARG(GROUPS)].i;
  work.top_groups = call->args[ARG(TOP_GROUPS)].i;
  work.row = up_to(max_of(work.E, work.k), 16) + 16;
  const double each = static_cast<double>(work.E) * (24.0 + static_cast<double>(work.k));
  work.threads = threads_for(static_cast<double>(work.T) * each, call->threads);
  return work;
}

RouteWorkspace lay_out(const Work &work, Arena &arena) {
  RouteWorkspace own = {};
  own.scores = arena.take<float>(work.row), own.keys = arena.take<float>(work.row);
  own.bias = arena.take<float>(work.row), own.group_keys = arena.take<float>(work.row);
  own.chosen = arena.take<float>(work.row), own.valid = arena.take<bool>(work.row);
  own.largest = arena.take<float>(work.row);
  return own;
}

int64_t thread_bytes(const Work &work) {
  return bytes_of([&](Arena &arena) { lay_out(work, arena); });
}

/* Keys stand in segments, whose largest keys are known: to take one is to search two segments. */
constexpr int64_t kSegment = 64;

void find_largest(const float *key, int64_t n, float *tops) {
  for (int64_t i = 0; i < n; i += kSegment)
    tops[i / kSegment] = largest(key + i, min_of(kSegment, n - i));
}

/* The first position of the largest of n keys, which becomes NaN. */
int64_t take_largest(float *key, int64_t n, float *tops) {
  const int64_t segments = (n + kSegment - 1) / kSegment;
  float most = tops[0];
  for (int64_t s = 1; s < segments; s++) most = tops[s] > most ? tops[s] : most;
  for (int64_t s = 0;; s++) {
    if (tops[s] != most) continue;
    const int64_t end = min_of((s + 1) * kSegment, n);
    int64_t i = s * kSegment;
    while (i < end && !any(load(key + i) == most)) i += kWidth;
    if (i >= end) continue; /* the segment is used up, and -inf is the largest key elsewhere */
    while (key[i] != most) i++;
    key[i] = __builtin_nanf("");
    tops[s] = largest(key + s * kSegment, end - s * kSegment);
    return i;
  }
}

/* A group's key: the sum of its two largest with a bias, the largest without, also where that is
 * +inf and the next -inf. */
float of_group(const float *key, int64_t n, bool two) {
  const vf low = all(-__builtin_inff());
  vf firsts = low, seconds = low;
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const vf here = load(key + i), lesser = here > firsts ? firsts : here;
    firsts = here > firsts ? here : firsts;
    seconds = lesser > seconds ? lesser : seconds;
  }
  float first = low[0], second = first;
  const auto add = [&](float x) {
    const float lesser = x > first ? first : x;
    first = x > first ? x : first;
    second = lesser > second ? lesser : second;
  };
  if (i > 0)
    for (int j = 0; j < kWidth; j++) add(firsts[j]), add(seconds[j]);
  for (; i < n; i++) add(key[i]);
  const float out = two && n > 1 ? first + second : first;
  return out == out ? out : first;
}

/* The ids of the k largest of the scores s + bias. */
void select(const Work *work, const RouteWorkspace &own, const float *bias, int32_t *ids) {
  const float *s = own.scores;
  float *key = own.keys, *best = own.group_keys, *tops = own.largest;
  const int64_t E = work->E, members = E / work->groups;
  const vf low = all(-__builtin_inff());
  for (int64_t i = 0; i < E; i += kWidth) {
    const vf sum = bias != nullptr ? load(s + i) + load(bias + i) : load(s + i);
    store(key + i, sum == sum ? sum : low);
  }
  for (int64_t i = E; i < up_to(E, kWidth); i++) key[i] = __builtin_nanf("");
  if (work->top_groups < work->groups) {
    for (int64_t g = 0; g < work->groups; g++)
      best[g] = of_group(key + g * members, members, bias != nullptr);
    for (int64_t g = work->groups; g < up_to(work->groups, kWidth); g++)
      best[g] = __builtin_nanf("");
    find_largest(best, work->groups, tops);
    for (int64_t i = 0; i < work->top_groups; i++) take_largest(best, work->groups, tops);
    for (int64_t g = 0; g < work->groups; g++)
      if (best[g] == best[g]) /* not taken: nor is any of its keys, which are as if chosen before */
        for (int64_t i = 0; i < members; i++) key[g * members + i] = __builtin_nanf("");
  }
  find_largest(key, E, tops);
  for (int64_t i = 0; i < work->k; i++) ids[i] = static_cast<int32_t>(take_largest(key, E, tops));
}

void route_token(const Work *work, int64_t t, const RouteWorkspace &own, const float *bias) {
  const int64_t E = work->E, k = work->k;
  const transom_tensor *logits = work->logits, *preset = work->preset;
  int32_t *ids = static_cast<int32_t *>(work->call->outs[0]->data) + t * k;
  float *weights = static_cast<float *>(work->call->outs[1]->data) + t * k;
  if (work->mask != nullptr &&
      static_cast<const uint8_t *>(work->mask->data)[t * work->mask->strides[0]] == 0) {
    for (int64_t i = 0; i < k; i++) ids[i] = -1, weights[i] = 0.0f;
    return;
  }
  float *s = own.scores, *chosen = own.chosen;
  bool *valid = own.valid;
  const int64_t start = t * logits->strides[0], stride = logits->strides[1];
  /* A preset needs the logits of its experts only, but for the softmax over all. */
  const bool everything = preset == nullptr || work->score == kSoftmax;
  if (everything) {
    read_row(logits, start, stride, E, s);
    for (int64_t i = E; i < up_to(E, kWidth); i++) s[i] = -__builtin_inff();
    if (work->score == kSoftmax)
      softmax(s, E);
    else if (work->score != kTopkSoftmax)
      for (int64_t i = 0; i < E; i += kWidth) store(s + i, score_of(work->score, load(s + i)));
  }
  if (preset == nullptr) {
    select(work, own, bias, ids);
  } else {
    for (int64_t i = 0; i < k; i++) {
      const int64_t id = integer(preset, t * preset->strides[0] + i * preset->strides[1]);
      ids[i] = id >= 0 && id < E ? static_cast<int32_t>(id) : -1;
    }
  }
  for (int64_t i = 0; i < k; i++) {
    valid[i] = ids[i] >= 0;
    chosen[i] = !valid[i]  ? 0.0f
                : everything ? s[ids[i]]
                             : number(logits, start + ids[i] * stride);
  }
  for (int64_t i = k; i < up_to(k, kWidth); i++) chosen[i] = 0.0f;
  if (!everything && work->score != kTopkSoftmax)
    for (int64_t i = 0; i < k; i += kWidth)
      store(chosen + i, score_of(work->score, load(chosen + i)));
  float total = 1.0f;
  if (work->score == kTopkSoftmax) {
    softmax_of_chosen(chosen, valid, k);
  } else if (work->renormalize) {
    total = kTiny;
    for (int64_t i = 0; i < k; i++) total += valid[i] ? chosen[i] : 0.0f;
  }
  for (int64_t i = 0; i < k; i++) weights[i] = valid[i] ? chosen[i] / total * work->scale : 0.0f;
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
  const transom_tensor *bias = work.bias;
  const int64_t bytes = thread_bytes(work);
  Counter counter((work.T + kTokens - 1) / kTokens);
  on_threads(work.threads, [&](int32_t thread) {
    Arena arena(static_cast<char *>(call->workspace) + thread * bytes);
    const RouteWorkspace own = lay_out(work, arena);
    if (bias != nullptr) read_parameter(bias, work.E, own.bias);
    for (int64_t task; counter.take(&task);)
      for (int64_t t = task * kTokens; t < min_of((task + 1) * kTokens, work.T); t++)
        route_token(&work, t, own, bias != nullptr ? own.bias : nullptr);
  });
  return 0;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
