/* short_conv: y = SiLU of a depthwise, causal, dilated convolution; and the rows that the next chunk
 * needs.
 *
 * A task is some channels of some rows: a row of v is read from memory once and then, by the other
 * taps, from the cache. It is bound by memory: v and y once each, and the state. */
#include "_causal_conv.h"

namespace transom::TRANSOM_LEVEL {

TRANSOM_KERNEL(short_conv, supports, workspace, run)

namespace {

constexpr int64_t kMostChannels = 1024, kLeastRows = 16;

struct Work {
  Taps taps;
  transom_tensor *const *outs;
  int64_t blocks, rows, parts; /* tasks: blocks of channels x parts of the B * S rows */
  int32_t threads;
  int64_t thread_bytes;
};

/* The workspace of a thread. */
struct ConvWorkspace {
  float *weight; /* [K][block] */
  Sources sources;
};

ConvWorkspace lay_out(const Taps *taps, Arena &arena) {
  ConvWorkspace own = {};
  own.weight = arena.take<float>(taps->K * taps->block);
  own.sources = lay_out_sources(taps, arena);
  return own;
}

Work describe(const transom_call *call) {
  Work work = {};
  Taps *taps = &work.taps;
  *taps = describe_taps<Arguments>(call, kMostChannels);
  work.outs = call->outs;
  work.blocks = (taps->C + taps->block - 1) / taps->block;
  work.rows = taps->B * taps->S;
  const double elements = static_cast<double>(work.rows + taps->B * taps->reach) *
                          static_cast<double>(taps->C);
  work.threads = threads_for(16.0 * elements, call->threads);
  const int64_t wanted = (8 * work.threads + work.blocks) / max_of(1, work.blocks);
  work.parts = clamp(wanted, 1, max_of(1, work.rows / kLeastRows));
  work.thread_bytes = bytes_of([&](Arena &arena) { lay_out(taps, arena); });
  return work;
}

template <class Number, int kTaps>
void convolve(const Work *work, int64_t b, int64_t s, int64_t c, int64_t n,
              const ConvWorkspace &own) {
  const Taps *taps = &work->taps;
  const float *weight = own.weight;
  const Number *const *rows = sources<Number>(taps, b, s, c, n, own.sources);
  Number *y = static_cast<Number *>(work->outs[0]->data) + (b * taps->S + s) * taps->C + c;
  each_vector(n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    const vf z = convolved<Number, kTaps>(taps, rows, weight, i, count);
    store_up_to(y + i, z / (1.0f + exp(-z)), count);
  });
}

template <class Number>
void convolve_rows(const Work *work, int64_t task, const ConvWorkspace &own) {
  const Taps *taps = &work->taps;
  const int64_t part = task / work->blocks, c = task % work->blocks * taps->block;
  const int64_t n = min_of(taps->block, taps->C - c);
  transpose_weight(taps, c, n, own.weight);
  const int64_t end = work->rows * (part + 1) / work->parts;
  for (int64_t row = work->rows * part / work->parts; row < end; row++) {
    const int64_t b = row / taps->S, s = row % taps->S;
    if (taps->K == 4)
      convolve<Number, 4>(work, b, s, c, n, own);
    else
      convolve<Number, 0>(work, b, s, c, n, own);
  }
}

/* Row `at` of the new state, which has the last `reach` rows of state and v together, bit for bit. */
template <class Number>
void copy_row(const Work *work, int64_t at) {
  const Taps *taps = &work->taps;
  const int64_t b = at / taps->reach, row = taps->S + at % taps->reach;
  Number *to = static_cast<Number *>(work->outs[1]->data) + at * taps->C;
  const Number *from = source<Number>(taps, b, row, 0, taps->C, nullptr, to);
  if (from == nullptr)
    memset(to, 0, static_cast<size_t>(taps->C) * sizeof(Number));
  else if (from != to)
    memcpy(to, from, static_cast<size_t>(taps->C) * sizeof(Number));
}

int32_t supports(const transom_call *call, transom_status *status) {
  const Work work = describe(call);
  return readable(work.taps.v, "v", status);
}

uint64_t workspace(const transom_call *call) {
  const Work work = describe(call);
  return static_cast<uint64_t>(work.threads * work.thread_bytes);
}

int32_t run(const transom_call *call, transom_status *) {
  const Work work = describe(call);
  const Taps *taps = &work.taps;
  if (taps->C == 0) return 0;
  about_to_write(work.outs[0]->data, work.rows * taps->C * size_of(work.outs[0]));
  with_type_of(taps->v, [&]<class Number>(const Number *) {
    Counter counter(work.rows > 0 ? work.blocks * work.parts : 0);
    on_threads(work.threads, [&](int32_t thread) {
      char *memory = static_cast<char *>(call->workspace) + thread * work.thread_bytes;
      Arena arena(memory);
      const ConvWorkspace own = lay_out(taps, arena);
      memset(memory, 0, static_cast<size_t>(work.thread_bytes));
      for (int64_t task; counter.take(&task);) convolve_rows<Number>(&work, task, own);
    });
    tasks(work.threads, taps->B * taps->reach,
          [&](int64_t row, int32_t) { copy_row<Number>(&work, row); });
  });
  return 0;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
