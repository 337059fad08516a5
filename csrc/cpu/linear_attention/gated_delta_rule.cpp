/* gated_delta_rule: S <- e^g S + k (beta (v - (e^g S)^T k))^T, o = scale S^T q, token after token.
 *
 * A task is one value head of one sequence. Many tokens go by chunks, whose cost is that of matrix
 * products; of few, such as one that is decoded, the state is read once, kept in the second-level
 * cache while the difference is found, and written once: 8 Dk Dv bytes a head are the limit. */
#include "_chunk.h"

#include "../base/output.h"

namespace transom::TRANSOM_LEVEL {

TRANSOM_KERNEL(gated_delta_rule, supports, workspace, run)

namespace {

/* Up to so many tokens are taken one by one. */
constexpr int64_t kFew = 8;
/* Vectors of a row of the state whose sums stay in registers. */
constexpr int64_t kTogether = 4;

struct Work {
  Rule rule;
  const transom_tensor *o, *new_state;
  int32_t threads;
  int64_t thread_bytes;
};

Work describe(const transom_call *call) {
  Work work = {};
  work.rule = describe_rule<Arguments>(call);
  work.o = call->outs[0], work.new_state = call->outs[1];
  const Rule &rule = work.rule;
  const double tokens = static_cast<double>(rule.B * rule.Hv) * static_cast<double>(rule.S + 1);
  work.threads = threads_for(3.0 * tokens * static_cast<double>(rule.Dk) *
                                 static_cast<double>(rule.Dv),
                             call->threads);
  work.thread_bytes = bytes_of([&](Arena &arena) { lay_out_head(rule, arena); });
  return work;
}

void write_output(const Work &work, int64_t b, int64_t h, int64_t s, float *row) {
  const Rule &rule = work.rule;
  for (int64_t d = 0; d < rule.dv; d += kWidth) store(row + d, load(row + d) * rule.scale);
  write_row(at(work.o, ((b * rule.S + s) * rule.Hv + h) * rule.Dv), kind(work.o), row, rule.Dv);
}

/* One token: o = (e^g S)^T q + (k . q) d. Both products with the state are taken on its way through,
 * some columns at a time. */
void step(const Work &work, int64_t b, int64_t h, int64_t s, const Head &own) {
  const Rule &rule = work.rule;
  read_tokens(rule, b, h, s, 1, own);
  float *decays = own.early;
  for (int64_t d = 0; d < rule.dk; d += kWidth)
    store(decays + d, exp_below(rule.Dg == 1 ? all(own.total[0]) : load(own.total + d)));
  vf both = {};
  for (int64_t d = 0; d < rule.dk; d += kWidth) both += load(own.k + d) * load(own.q + d);
  const float k_q = sum(both);
  for (int64_t first = 0; first < rule.dv; first += kTogether * kWidth) {
    const int64_t vectors = min_of(kTogether, (rule.dv - first) / kWidth);
    vf known[kTogether] = {}, asked[kTogether] = {};
    for (int64_t d = 0; d < rule.Dk; d++) {
      float *row = own.state + d * rule.dv + first;
      for (int64_t i = 0; i < vectors; i++) {
        const vf x = load(row + i * kWidth) * decays[d];
        store(row + i * kWidth, x);
        known[i] += x * own.k[d];
        asked[i] += x * own.q[d];
      }
    }
    for (int64_t i = 0; i < vectors; i++) {
      const int64_t c = first + i * kWidth;
      const vf change = own.beta[0] * (load(own.v + c) - known[i]);
      store(own.v + c, change);
      store(own.out + c, asked[i] + k_q * change);
    }
    for (int64_t d = 0; d < rule.Dk; d++) {
      float *row = own.state + d * rule.dv + first;
      for (int64_t i = 0; i < vectors; i++)
        store(row + i * kWidth,
              load(row + i * kWidth) + own.k[d] * load(own.v + first + i * kWidth));
    }
  }
  write_output(work, b, h, s, own.out);
}

void run_head(const Work &work, int64_t task, const Head &own) {
  const Rule &rule = work.rule;
  const int64_t b = task / rule.Hv, h = task % rule.Hv;
  const transom_tensor *state = rule.state;
  if (state != nullptr)
    for (int64_t d = 0; d < rule.Dk; d++)
      read_row(state, b * state->strides[0] + h * state->strides[1] + d * state->strides[2],
               state->strides[3], rule.Dv, own.state + d * rule.dv);
  if (rule.S <= kFew) {
    for (int64_t s = 0; s < rule.S; s++) step(work, b, h, s, own);
  } else {
    for (int64_t s = 0; s < rule.S; s += kChunk) {
      const int64_t n = min_of(kChunk, rule.S - s);
      read_tokens(rule, b, h, s, n, own);
      weigh_pairs(rule, own, n);
      solve(rule, own, n);
      read_out(rule, own, n);
      for (int64_t i = 0; i < n; i++) write_output(work, b, h, s + i, own.out + i * rule.dv);
      advance(rule, own, n);
    }
  }
  for (int64_t d = 0; d < rule.Dk; d++)
    memcpy(at(work.new_state, (task * rule.Dk + d) * rule.Dv), own.state + d * rule.dv,
           static_cast<size_t>(rule.Dv) * sizeof(float));
}

int32_t supports(const transom_call *call, transom_status *status) {
  return readable(describe(call).rule.q, "q", status);
}

uint64_t workspace(const transom_call *call) {
  const Work work = describe(call);
  return static_cast<uint64_t>(work.threads * work.thread_bytes);
}

int32_t run(const transom_call *call, transom_status *) {
  const Work work = describe(call);
  const Rule &rule = work.rule;
  about_to_write(work.new_state->data, rule.B * rule.Hv * rule.Dk * rule.Dv * 4);
  about_to_write(work.o->data, rule.B * rule.S * rule.Hv * rule.Dv * size_of(work.o));
  Counter counter(rule.B * rule.Hv);
  on_threads(work.threads, [&](int32_t thread) {
    char *memory = static_cast<char *>(call->workspace) + thread * work.thread_bytes;
    for (int64_t task; counter.take(&task);) {
      /* Columns beyond the last are zeros, and so is the state of a sequence that begins. */
      memset(memory, 0, static_cast<size_t>(work.thread_bytes));
      Arena arena(memory);
      run_head(work, task, lay_out_head(rule, arena));
    }
  });
  return 0;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
