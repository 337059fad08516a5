/* short_conv: y = SiLU of a depthwise, causal, dilated convolution; and the rows that the next chunk
 * needs.
 *
 * A task is some channels of some rows: a row of v is read from memory once and then, by the other
 * taps, from the cache. Bound by memory: v and y once each, and the state. */
#include "_causal_conv.h"

namespace transom::TRANSOM_LEVEL {
namespace {

#define ARGUMENT(name) TRANSOM_SHORT_CONV_##name

constexpr int64_t kMostChannels = 1024, kLeastRows = 16;

struct Work {
  Taps taps;
  transom_tensor *const *outs;
  int64_t blocks, rows, parts; /* tasks: blocks of channels x parts of the B * S rows */
  int32_t threads;
  char *buffers; /* for each thread: weights, then what sources() wants */
  int64_t weight_bytes, buffer_bytes;
  int64_t next; /* task, then row of the state, by fetch-and-add */
};

Work describe(const transom_call *call) {
  Work work = {};
  Taps *taps = &work.taps;
  *taps = describe_taps(call, ARGUMENT(V), ARGUMENT(WEIGHT), ARGUMENT(DILATION), ARGUMENT(STATE),
                        kMostChannels);
  work.outs = call->outs;
  work.blocks = (taps->C + taps->block - 1) / taps->block;
  work.rows = taps->B * taps->S;
  const double elements = static_cast<double>(work.rows + taps->B * taps->reach) *
                          static_cast<double>(taps->C);
  work.threads = threads_for(16.0 * elements, call->threads);
  const int64_t wanted = (8 * work.threads + work.blocks) / max_of(1, work.blocks);
  work.parts = clamp(wanted, 1, max_of(1, work.rows / kLeastRows));
  work.weight_bytes = up_to(taps->K * taps->block * 4, 64);
  work.buffer_bytes = work.weight_bytes + source_bytes(taps);
  return work;
}

template <class Number, int kTaps>
void convolve(const Work *work, int64_t b, int64_t s, int64_t c, int64_t n, const float *weight,
              char *memory) {
  const Taps *taps = &work->taps;
  const Number *const *rows = sources<Number>(taps, b, s, c, n, memory);
  Number *y = static_cast<Number *>(work->outs[0]->data) + (b * taps->S + s) * taps->C + c;
  each_vector(n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    const vf z = convolved<Number, kTaps>(taps, rows, weight, i, count);
    store_up_to(y + i, z / (1.0f + exp(-z)), count);
  });
}

template <class Number>
void tasks(Work *work, int32_t thread) {
  const Taps *taps = &work->taps;
  float *weight = reinterpret_cast<float *>(work->buffers + thread * work->buffer_bytes);
  char *memory = reinterpret_cast<char *>(weight) + work->weight_bytes;
  memset(weight, 0, static_cast<size_t>(work->buffer_bytes));
  for (;;) {
    const int64_t task = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
    if (task >= work->blocks * work->parts) return;
    const int64_t part = task / work->blocks, c = task % work->blocks * taps->block;
    const int64_t n = min_of(taps->block, taps->C - c);
    transpose_weight(taps, c, n, weight);
    const int64_t end = work->rows * (part + 1) / work->parts;
    for (int64_t row = work->rows * part / work->parts; row < end; row++) {
      const int64_t b = row / taps->S, s = row % taps->S;
      if (taps->K == 4)
        convolve<Number, 4>(work, b, s, c, n, weight, memory);
      else
        convolve<Number, 0>(work, b, s, c, n, weight, memory);
    }
  }
}

/* The last `reach` rows of state and v together, bit for bit. */
template <class Number>
void keep_rows(Work *work) {
  const Taps *taps = &work->taps;
  for (;;) {
    const int64_t at = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
    if (at >= taps->B * taps->reach) return;
    const int64_t b = at / taps->reach, row = taps->S + at % taps->reach;
    Number *to = static_cast<Number *>(work->outs[1]->data) + at * taps->C;
    const Number *from = source<Number>(taps, b, row, 0, taps->C, nullptr, to);
    if (from == nullptr)
      memset(to, 0, static_cast<size_t>(taps->C) * sizeof(Number));
    else if (from != to)
      memcpy(to, from, static_cast<size_t>(taps->C) * sizeof(Number));
  }
}

void by_dtype(void *context, int32_t thread) {
  Work *work = static_cast<Work *>(context);
  switch (kind(work->taps.v)) {
    case 0: return tasks<float>(work, thread);
    case 1: return tasks<bf16>(work, thread);
    default: return tasks<f16>(work, thread);
  }
}

void keep(void *context, int32_t) {
  Work *work = static_cast<Work *>(context);
  if (size_of(work->taps.v) == 4)
    keep_rows<float>(work);
  else
    keep_rows<bf16>(work);
}

int32_t supports(const transom_call *call, transom_status *status) {
  const Work work = describe(call);
  return readable(work.taps.v, "v", status);
}

uint64_t workspace(const transom_call *call) {
  const Work work = describe(call);
  return static_cast<uint64_t>(work.threads * work.buffer_bytes);
}

int32_t run(const transom_call *call, transom_status *) {
  Work work = describe(call);
  if (work.taps.C == 0) return 0;
  work.buffers = static_cast<char *>(call->workspace);
  about_to_write(work.outs[0]->data, work.rows * work.taps.C * size_of(work.outs[0]));
  if (work.rows > 0) parallel(work.threads, by_dtype, &work);
  work.next = 0;
  if (work.taps.reach > 0) parallel(work.threads, keep, &work);
  return 0;
}

}  // namespace

extern const transom_impl short_conv = {
    sizeof(transom_impl), TRANSOM_TUNED, "short_conv", "native", TRANSOM_SHORT_CONV_HASH,
    TRANSOM_DETERMINISTIC, 0, supports, workspace, run};

}  // namespace transom::TRANSOM_LEVEL
