/* engram_gate: y = x + g * value, g from the similarity of x and key, for each stream of a token.
 *
 * A task is some streams. The statistics of a stream (two squares and the product) are taken in one
 * pass over x and key; x is then read again, from the cache, and value, which its streams share. It
 * is bound by memory: x, key and y once each, value once a token. */
#include "_gate.h"

namespace transom::TRANSOM_LEVEL {

TRANSOM_KERNEL(engram_gate, supports, workspace, run)

namespace {

constexpr int64_t kMostStreamsAtOnce = 16;

struct Work {
  Gated gated;
  const transom_tensor *y;
  bool streams;
  int64_t block;
  int32_t threads;
  char *buffers; /* three rows for each thread, where some are not dense */
  int64_t buffer_bytes;
};

Work describe(const transom_call *call) {
  Work work = {};
  work.gated = describe_gated<Arguments>(call);
  const Gated *g = &work.gated;
  work.y = call->outs[0];
  const int64_t streams = g->T * g->R;
  /* Memory is the limit, and an element weighs as much as some eight multiplications. */
  work.threads = threads_for(8.0 * static_cast<double>(streams) * static_cast<double>(g->D),
                             call->threads);
  work.block = clamp((streams + 4 * work.threads - 1) / (4 * work.threads), 1, kMostStreamsAtOnce);
  if (!rows_are_dense(g->x) || !rows_are_dense(g->key) || !rows_are_dense(g->value))
    work.buffer_bytes = up_to(3 * g->D * size_of(g->x), 64);
  return work;
}

template <class Number, bool kStream>
inline void put(Number *to, vf v, int64_t n) {
  if (n < kWidth)
    store_some(to, v, n);
  else if constexpr (kStream)
    stream(to, v);
  else
    store(to, v);
}

template <class Number, bool kStream>
void one(const Work *work, int64_t token, int64_t j, Rows next, Number *buffer) {
  const Gated *g = &work->gated;
  const int64_t D = g->D;
  const transom_tensor *x = g->x, *key = g->key;
  Number *y = static_cast<Number *>(work->y->data) + (token * g->R + j) * D;
  const Number *from = dense_row(
      x, start_of(x, 2, token) + j * x->strides[x->ndim - 2], D, buffer);
  if (!takes_part(g, token)) {
    if (g->residual)
      memcpy(y, from, static_cast<size_t>(D) * sizeof(Number));
    else
      memset(y, 0, static_cast<size_t>(D) * sizeof(Number));
    return;
  }
  const Number *keys = dense_row(
      key, start_of(key, 2, token) + j * key->strides[key->ndim - 2], D, buffer + D);
  const Number *value =
      dense_row(g->value, start_of(g->value, 1, token), D, buffer + 2 * D);
  const Statistics s = statistics<Number, false>(
      g, from, keys, g->weights + j * g->weights_stride, nullptr, nullptr, nullptr);
  const vf gate = all(gate_of(s.dot, g->clamp));
  if (g->residual)
    each_vector(D, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      prefetch<Number>(next, i);
      put<Number, kStream>(y + i, load_up_to(from + i, n) + gate * load_up_to(value + i, n), n);
    });
  else
    each_vector(D, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      prefetch<Number>(next, i);
      put<Number, kStream>(y + i, gate * load_up_to(value + i, n), n);
    });
}

void lay_out(Work *work, Arena &arena) {
  lay_out_weight(&work->gated, arena);
  work->buffers = arena.take<char>(work->threads * work->buffer_bytes);
}

template <class Number>
void gate_streams(const Work *work, int64_t first, int64_t end, char *buffer) {
  const int64_t R = work->gated.R;
  Number *rows = reinterpret_cast<Number *>(buffer);
  for (int64_t i = first; i < end; i++) {
    const Rows next = i + 1 < end ? rows_of(&work->gated, nullptr, (i + 1) / R, (i + 1) % R)
                                  : Rows{};
    if (work->streams)
      one<Number, true>(work, i / R, i % R, next, rows);
    else
      one<Number, false>(work, i / R, i % R, next, rows);
  }
}

int32_t supports(const transom_call *call, transom_status *status) {
  const Work work = describe(call);
  return readable(work.gated.x, "x", status);
}

uint64_t workspace(const transom_call *call) {
  Work work = describe(call);
  Arena arena;
  lay_out(&work, arena);
  return arena.bytes();
}

int32_t run(const transom_call *call, transom_status *) {
  Work work = describe(call);
  const int64_t streams = work.gated.T * work.gated.R;
  Arena arena(call->workspace);
  lay_out(&work, arena);
  copy_weight(&work.gated);
  work.streams = goes_past_caches(work.y, streams, work.gated.D);
  Counter counter((streams + work.block - 1) / work.block);
  with_type_of(work.gated.x, [&]<class Number>(const Number *) {
    on_threads(work.threads, [&](int32_t thread) {
      for (int64_t task; counter.take(&task);)
        gate_streams<Number>(&work, task * work.block, min_of((task + 1) * work.block, streams),
                             work.buffers + thread * work.buffer_bytes);
      if (work.streams) fence();
    });
  });
  return 0;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
