/* engram_gate: y = x + g * value, g from the similarity of x and key, for each stream of a token.
 *
 * A task is some streams. The statistics of a stream (two squares and the product) are taken in one
 * pass over x and key; x is then read again, from the cache, and value, which its streams share.
 * Bound by memory: x, key and y once each, value once a token. */
#include "_gate.h"

namespace transom::TRANSOM_LEVEL {
namespace {

#define ARGUMENT(name) TRANSOM_ENGRAM_GATE_##name

constexpr int64_t kMostStreamsAtOnce = 16;

struct Work {
  Gated gated;
  const transom_tensor *y;
  bool streams;
  int64_t block;
  int32_t threads;
  char *buffers; /* three rows for each thread, where some do not lie in one piece */
  int64_t buffer_bytes;
  int64_t next; /* block, by fetch-and-add */
};

Work describe(const transom_call *call) {
  Work work = {};
  work.gated = describe_gated(call, GATE_ARGUMENTS);
  const Gated *g = &work.gated;
  work.y = call->outs[0];
  const int64_t streams = g->T * g->R;
  /* Memory is the limit: an element weighs as much as some eight multiplications. */
  work.threads = threads_for(8.0 * static_cast<double>(streams) * static_cast<double>(g->D),
                             call->threads);
  work.block = clamp((streams + 4 * work.threads - 1) / (4 * work.threads), 1, kMostStreamsAtOnce);
  if (!in_pieces(g->x) || !in_pieces(g->key) || !in_pieces(g->value))
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
  const Number *from = in_one_piece(
      x, start_of(x, 2, token) + j * x->strides[x->ndim - 2], D, buffer);
  if (!takes_part(g, token)) {
    if (g->residual)
      memcpy(y, from, static_cast<size_t>(D) * sizeof(Number));
    else
      memset(y, 0, static_cast<size_t>(D) * sizeof(Number));
    return;
  }
  const Number *keys = in_one_piece(
      key, start_of(key, 2, token) + j * key->strides[key->ndim - 2], D, buffer + D);
  const Number *value =
      in_one_piece(g->value, start_of(g->value, 1, token), D, buffer + 2 * D);
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

template <class Number>
void tasks(Work *work, int32_t thread) {
  Number *buffer = reinterpret_cast<Number *>(work->buffers + thread * work->buffer_bytes);
  const int64_t streams = work->gated.T * work->gated.R, R = work->gated.R;
  for (;;) {
    const int64_t first = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED) * work->block;
    if (first >= streams) break;
    const int64_t end = min_of(first + work->block, streams);
    for (int64_t i = first; i < end; i++) {
      const Rows next = i + 1 < end ? rows_of(&work->gated, nullptr, (i + 1) / R, (i + 1) % R)
                                    : Rows{};
      if (work->streams)
        one<Number, true>(work, i / R, i % R, next, buffer);
      else
        one<Number, false>(work, i / R, i % R, next, buffer);
    }
  }
  if (work->streams) fence();
}

void by_dtype(void *context, int32_t thread) {
  Work *work = static_cast<Work *>(context);
  switch (kind(work->gated.x)) {
    case 0: return tasks<float>(work, thread);
    case 1: return tasks<bf16>(work, thread);
    default: return tasks<f16>(work, thread);
  }
}

int32_t supports(const transom_call *call, transom_status *status) {
  const Work work = describe(call);
  return readable(work.gated.x, "x", status);
}

uint64_t workspace(const transom_call *call) {
  const Work work = describe(call);
  return static_cast<uint64_t>(weight_bytes(&work.gated) + work.threads * work.buffer_bytes);
}

int32_t run(const transom_call *call, transom_status *) {
  Work work = describe(call);
  char *memory = static_cast<char *>(call->workspace);
  take_weight(&work.gated, memory);
  work.streams = goes_past_caches(work.y, work.gated.T * work.gated.R, work.gated.D);
  work.buffers = memory + weight_bytes(&work.gated);
  parallel(work.threads, by_dtype, &work);
  return 0;
}

}  // namespace

extern const transom_impl engram_gate = {
    sizeof(transom_impl), TRANSOM_TUNED, "engram_gate", "native", TRANSOM_ENGRAM_GATE_HASH,
    TRANSOM_DETERMINISTIC, 0, supports, workspace, run};

}  // namespace transom::TRANSOM_LEVEL
