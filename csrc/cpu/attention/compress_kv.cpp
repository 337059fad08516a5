/* compress_kv: each block of m tokens pooled into an entry, by a softmax of gates per channel.
 *
 * A task is some channels of one entry: their gates stay in L1 between the peak and the weights,
 * values are read once. Bound by memory. */
#include "../base/parallel.h"
#include "_compress_kv.h"

namespace transom::TRANSOM_LEVEL {
namespace {

#define ARGUMENT(name) TRANSOM_COMPRESS_KV_##name

struct Work {
  const transom_call *call;
  Slots slots;
  int64_t pieces; /* of an entry's channels */
  int64_t next;   /* (sequence, entry, piece), by fetch-and-add */
};

Work describe(const transom_call *call) {
  Work work = {};
  work.call = call;
  work.slots = slots_of(tensor(call, ARGUMENT(KV)), tensor(call, ARGUMENT(GATE)),
                        tensor(call, ARGUMENT(POSITION_BIAS)), tensor(call, ARGUMENT(STATE_KV)),
                        tensor(call, ARGUMENT(STATE_GATE)), call->args[ARGUMENT(OVERLAP)].i != 0,
                        call->args[ARGUMENT(PENDING)].i);
  work.pieces = (work.slots.D + work.slots.some - 1) / work.slots.some;
  return work;
}

void pool(void *context, int32_t thread) {
  Work *work = static_cast<Work *>(context);
  const Slots &s = work->slots;
  float *gates = static_cast<float *>(work->call->workspace) + thread * s.slots * s.some;
  alignas(64) float totals[512], values[512], sums[512];
  const transom_tensor *entries = work->call->outs[0];
  for (;;) {
    const int64_t task = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
    if (task >= s.B * s.blocks * work->pieces) return;
    const int64_t c = task % work->pieces * s.some, n = min_of(s.some, s.D - c);
    const int64_t entry = task / work->pieces, b = entry / s.blocks, i = entry % s.blocks;
    weigh(s, b, i, c, n, gates, totals);
    memset(sums, 0, sizeof sums);
    for (int64_t slot = 0; slot < s.slots; slot++) {
      read_values(s, b, row_of(s, i, slot), channel_of(s, slot) + c, n, values);
      for (int64_t d = 0; d < n; d += kWidth) {
        const vf e = load(gates + slot * s.some + d);
        /* Selected: a slot that is left out may hold NaN. */
        store(sums + d, load(sums + d) + (e == 0.0f ? vf{} : e * load(values + d)));
      }
    }
    for (int64_t d = 0; d < n; d += kWidth) store(sums + d, load(sums + d) / load(totals + d));
    write_row(at(entries, entry * s.D + c), kind(entries), sums, n);
  }
}

/* The rows that no entry has used up, and behind them what is not filled. */
void carry(const Slots &s, float *values, float *gates) {
  const int64_t first = s.blocks * s.m, left = s.head + s.S - first;
  for (int64_t b = 0; b < s.B; b++)
    for (int64_t row = 0; row < s.slots; row++)
      for (int64_t c = 0; c < s.W; c += 512) {
        alignas(64) float v[512], g[512];
        const int64_t n = min_of(512, s.W - c), at = (b * s.slots + row) * s.W + c;
        if (row < left) {
          read_values(s, b, first + row, c, n, v);
          read_gates(s, b, first + row, c, n, g);
        } else {
          for (int64_t i = 0; i < n; i++) v[i] = 0.0f, g[i] = -__builtin_inff();
        }
        write_row(values + at, 0, v, n);
        write_row(gates + at, 0, g, n);
      }
}

int32_t supports(const transom_call *call, transom_status *status) {
  return readable(tensor(call, ARGUMENT(KV)), "kv", status);
}

uint64_t workspace(const transom_call *call) {
  const Slots s = describe(call).slots;
  return static_cast<uint64_t>(s.slots * s.some * call->threads) * sizeof(float);
}

int32_t run(const transom_call *call, transom_status *) {
  Work work = describe(call);
  /* Memory is the limit, and an exponential weighs as much as some eight multiplications. */
  const double steps = 16.0 * static_cast<double>(work.slots.B * work.slots.S) *
                       static_cast<double>(work.slots.W);
  parallel(work.slots.blocks > 0 ? threads_for(steps, call->threads) : 1, pool, &work);
  carry(work.slots, static_cast<float *>(call->outs[1]->data),
        static_cast<float *>(call->outs[2]->data));
  return 0;
}

}  // namespace

extern const transom_impl compress_kv = {
    sizeof(transom_impl), TRANSOM_TUNED, "compress_kv", "native", TRANSOM_COMPRESS_KV_HASH,
    TRANSOM_DETERMINISTIC, 0, supports, workspace, run};

}  // namespace transom::TRANSOM_LEVEL
