/* compress_kv_backward: dkv = p * dE, dgate = p * (kv - E) * dE, with the weights p computed again.
 *
 * A task is some channels of all entries, one after the other, so that the gradient of the bias is
 * a sum in one order; it stays in the thread's workspace. Each half of a row's channels belongs to
 * one entry at most: written, never added to, but for what comes through the next state. */
#include "../base/parallel.h"
#include "_compress_kv.h"

namespace transom::TRANSOM_LEVEL {
namespace {

#define ARGUMENT(name) TRANSOM_COMPRESS_KV_BACKWARD_##name

struct Work {
  const transom_call *call;
  Slots slots;
  const transom_tensor *dentries, *dnext_kv, *dnext_gate;
  int64_t thread_floats;
  int64_t next; /* channels, by fetch-and-add */
};

/* What a thread works in: gates [slots][some], bias [slots][some], rows of `some`. */
struct Desk {
  float *gates, *bias, *totals, *entry, *dentry, *values, *dvalues, *dgates;
};

Work describe(const transom_call *call) {
  Work work = {};
  work.call = call;
  work.slots = slots_of(tensor(call, ARGUMENT(KV)), tensor(call, ARGUMENT(GATE)),
                        tensor(call, ARGUMENT(POSITION_BIAS)), tensor(call, ARGUMENT(STATE_KV)),
                        tensor(call, ARGUMENT(STATE_GATE)), call->args[ARGUMENT(OVERLAP)].i != 0,
                        call->args[ARGUMENT(PENDING)].i);
  work.dentries = tensor(call, ARGUMENT(DENTRIES));
  work.dnext_kv = tensor(call, ARGUMENT(DNEXT_KV));
  work.dnext_gate = tensor(call, ARGUMENT(DNEXT_GATE));
  work.thread_floats = (2 * work.slots.slots + 6) * work.slots.some;
  return work;
}

Desk desk_of(const Work *work, int32_t thread) {
  float *at = static_cast<float *>(work->call->workspace) + thread * work->thread_floats;
  const int64_t some = work->slots.some, held = work->slots.slots * some;
  float *rows = at + 2 * held;
  return {at, at + held, rows, rows + some, rows + 2 * some, rows + 3 * some, rows + 4 * some,
          rows + 5 * some};
}

/* Gradients of n channels of a row; those of a token's gates are added up for its place's bias. */
void write_gradients(const Work *work, int64_t b, int64_t row, int64_t channel, int64_t n,
                     bool used, const Desk &desk) {
  const Slots &s = work->slots;
  float *dvalues = desk.dvalues, *dgates = desk.dgates;
  if (!used) {
    memset(dvalues, 0, static_cast<size_t>(s.some) * sizeof(float));
    memset(dgates, 0, static_cast<size_t>(s.some) * sizeof(float));
  }
  const int64_t first = s.blocks * s.m;
  if (row >= first) {
    alignas(64) float more[512];
    for (int which = 0; which < 2; which++) {
      const transom_tensor *d = which == 0 ? work->dnext_kv : work->dnext_gate;
      float *to = which == 0 ? dvalues : dgates;
      read_row(d, b * d->strides[0] + (row - first) * d->strides[1] + channel * d->strides[2],
               d->strides[2], n, more);
      for (int64_t i = 0; i < n; i += kWidth) store(to + i, load(to + i) + load(more + i));
    }
  }
  transom_tensor *const *outs = work->call->outs;
  if (row < s.head) {
    if (s.state_kv == nullptr) return;
    const int64_t to = (b * s.slots + row) * s.W + channel;
    write_row(at(outs[3], to), 0, dvalues, n);
    write_row(at(outs[4], to), 0, dgates, n);
    return;
  }
  const int64_t token = row - s.head, to = (b * s.S + token) * s.W + channel;
  write_row(at(outs[0], to), kind(outs[0]), dvalues, n);
  write_row(at(outs[1], to), kind(outs[1]), dgates, n);
  const int64_t place = (token + s.pending) % s.m;
  float *bias = desk.bias + ((channel >= s.D ? s.m : 0) + place) * s.some;
  for (int64_t i = 0; i < n; i += kWidth) store(bias + i, load(bias + i) + load(dgates + i));
}

/* Gradients of what entry i pooled, channels c .. c + n. */
void spread(const Work *work, int64_t b, int64_t i, int64_t c, int64_t n, const Desk &desk) {
  const Slots &s = work->slots;
  const transom_tensor *d = work->dentries;
  weigh(s, b, i, c, n, desk.gates, desk.totals);
  read_row(d, b * d->strides[0] + i * d->strides[1] + c * d->strides[2], d->strides[2], n,
           desk.dentry);
  memset(desk.entry, 0, static_cast<size_t>(s.some) * sizeof(float));
  for (int pass = 0; pass < 2; pass++)
    for (int64_t slot = 0; slot < s.slots; slot++) {
      const int64_t row = row_of(s, i, slot), channel = channel_of(s, slot) + c;
      read_values(s, b, row, channel, n, desk.values);
      for (int64_t k = 0; k < n; k += kWidth) {
        const vf e = load(desk.gates + slot * s.some + k), p = e / load(desk.totals + k);
        const vf value = e == 0.0f ? vf{} : load(desk.values + k);
        if (pass == 0) {
          store(desk.entry + k, load(desk.entry + k) + p * value);
        } else {
          const vf dvalue = p * load(desk.dentry + k);
          store(desk.dvalues + k, dvalue);
          store(desk.dgates + k, dvalue * (value - load(desk.entry + k)));
        }
      }
      if (pass == 1) write_gradients(work, b, row, channel, n, true, desk);
    }
}

void by_channels(void *context, int32_t thread) {
  Work *work = static_cast<Work *>(context);
  const Slots &s = work->slots;
  const Desk desk = desk_of(work, thread);
  const transom_tensor *dbias = work->call->outs[2];
  const int64_t halves = s.before > 0 ? 2 : 1, count = s.head + s.S;
  for (;;) {
    const int64_t c = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED) * s.some;
    if (c >= s.D) return;
    const int64_t n = min_of(s.some, s.D - c);
    memset(desk.bias, 0, static_cast<size_t>(s.slots * s.some) * sizeof(float));
    for (int64_t b = 0; b < s.B; b++) {
      for (int64_t i = 0; i < s.blocks; i++) spread(work, b, i, c, n, desk);
      /* And of what no entry of this call pools: rows before and behind those of its blocks. */
      for (int64_t half = 0; half < halves; half++) {
        const int64_t channel = half * s.D + c;
        const int64_t from = half * s.before;
        for (int64_t row = 0; row < count; row++) {
          if (row == from) row += s.blocks * s.m;
          if (row < count) write_gradients(work, b, row, channel, n, false, desk);
        }
      }
    }
    for (int64_t half = 0; half < halves; half++)
      for (int64_t place = 0; place < s.m; place++)
        write_row(at(dbias, place * s.W + half * s.D + c), kind(dbias),
                  desk.bias + (half * s.m + place) * s.some, n);
  }
}

int32_t supports(const transom_call *call, transom_status *status) {
  return readable(tensor(call, ARGUMENT(KV)), "kv", status);
}

uint64_t workspace(const transom_call *call) {
  const Work work = describe(call);
  return static_cast<uint64_t>(work.thread_floats * call->threads) * sizeof(float);
}

int32_t run(const transom_call *call, transom_status *) {
  Work work = describe(call);
  const Slots &s = work.slots;
  /* Rows of the state that are not filled have no gradient. */
  for (int i = 3; i < 5; i++)
    memset(call->outs[i]->data, 0, static_cast<size_t>(s.B * s.slots * s.W) * sizeof(float));
  const double steps = 32.0 * static_cast<double>(s.B * s.S) * static_cast<double>(s.W);
  parallel(threads_for(steps, call->threads), by_channels, &work);
  return 0;
}

}  // namespace

extern const transom_impl compress_kv_backward = {
    sizeof(transom_impl), TRANSOM_TUNED, "compress_kv_backward", "native",
    TRANSOM_COMPRESS_KV_BACKWARD_HASH, TRANSOM_DETERMINISTIC, 0, supports, workspace, run};

}  // namespace transom::TRANSOM_LEVEL
