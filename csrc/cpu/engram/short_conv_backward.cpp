/* short_conv_backward: dv, dweight and dstate, the convolution computed again.
 *
 * A task is some channels of everything: their gradients depend on no others, and the weight's are
 * sums over all rows in one order. Going down the rows, the gradient before SiLU of the last ones
 * is kept in a ring, from which each row of v or of the state takes its own as soon as the last
 * position that read it has passed. */
#include "_causal_conv.h"

namespace transom::TRANSOM_LEVEL {

TRANSOM_KERNEL(short_conv_backward, supports, workspace, run)

namespace {

constexpr int64_t kMostChannels = 256;
/* Rows whose products are added up before they are added to the whole sum. */
constexpr int64_t kRowsOfASum = 64;

struct Work {
  Taps taps;
  const transom_tensor *dy, *dnew_state;
  transom_tensor *const *outs;
  int64_t blocks, ring_rows;
  int32_t threads;
  int64_t thread_bytes;
};

/* The workspace of a thread: weights [K][block], two sums of their gradients, a ring of rows, one
 * row. */
struct Buffers {
  float *weight, *total, *sums, *ring, *row;
  Sources sources;
};

Buffers lay_out(const Work *work, Arena &arena) {
  const Taps *taps = &work->taps;
  const int64_t numbers = taps->K * taps->block;
  Buffers out = {};
  out.weight = arena.take<float>(numbers), out.total = arena.take<float>(numbers);
  out.sums = arena.take<float>(numbers);
  out.ring = arena.take<float>(work->ring_rows * taps->block);
  out.row = arena.take<float>(taps->block);
  out.sources = lay_out_sources(taps, arena);
  return out;
}

Work describe(const transom_call *call) {
  Work work = {};
  Taps *taps = &work.taps;
  *taps = describe_taps<Arguments>(call, kMostChannels);
  work.dy = tensor(call, ARG(DY)), work.dnew_state = tensor(call, ARG(DNEW_STATE));
  work.outs = call->outs;
  work.blocks = (taps->C + taps->block - 1) / taps->block;
  work.ring_rows = taps->reach + 1;
  const double elements = static_cast<double>(taps->B * (taps->S + taps->reach)) *
                          static_cast<double>(taps->C);
  work.threads = threads_for(32.0 * elements, call->threads);
  work.thread_bytes = bytes_of([&](Arena &arena) { lay_out(&work, arena); });
  return work;
}

/* The gradient before SiLU of one position, into its row of the ring, and what it adds to the
 * weight's. */
template <class Number>
void position(const Work *work, int64_t b, int64_t s, int64_t c, int64_t n, const Buffers *own) {
  const Taps *taps = &work->taps;
  const transom_tensor *dy = work->dy;
  const Number *const *rows = sources<Number>(taps, b, s, c, n, own->sources);
  float *dz = own->ring + s % work->ring_rows * taps->block;
  read_row(dy, b * dy->strides[0] + s * dy->strides[1] + c * dy->strides[2], dy->strides[2], n,
           own->row);
  each_vector(n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    const vf z = convolved<Number, 0>(taps, rows, own->weight, i, count);
    const vf sigmoid = 1.0f / (1.0f + exp(-z));
    const vf d = load(own->row + i) * sigmoid * (1.0f + z * (1.0f - sigmoid));
    store(dz + i, d);
    for (int64_t tap = 0; tap < taps->K; tap++) {
      float *sum = own->sums + tap * taps->block + i;
      store(sum, load(sum) + d * load_up_to(rows[tap] + i, count));
    }
  });
}

/* The gradient of row `at` of state and v together, whose readers have all passed. */
template <class Number>
void row_gradient(const Work *work, int64_t b, int64_t at, int64_t c, int64_t n,
                  const Buffers *own) {
  const Taps *taps = &work->taps;
  const transom_tensor *dstate = work->dnew_state;
  if (at >= taps->S)
    read_row(dstate,
             b * dstate->strides[0] + (at - taps->S) * dstate->strides[1] +
                 c * dstate->strides[2],
             dstate->strides[2], n, own->row);
  else
    memset(own->row, 0, static_cast<size_t>(up_to(n, kWidth)) * sizeof(float));
  for (int64_t tap = 0; tap < taps->K; tap++) {
    const int64_t s = at - tap * taps->dilation;
    if (s < 0 || s >= taps->S) continue;
    const float *dz = own->ring + s % work->ring_rows * taps->block;
    const float *weight = own->weight + tap * taps->block;
    for (int64_t i = 0; i < n; i += kWidth)
      store(own->row + i, load(own->row + i) + load(dz + i) * load(weight + i));
  }
  Number *to = at < taps->reach
                   ? static_cast<Number *>(work->outs[2]->data) + (b * taps->reach + at) * taps->C
                   : static_cast<Number *>(work->outs[0]->data) +
                         (b * taps->S + at - taps->reach) * taps->C;
  write_numbers(to + c, own->row, n);
}

void add_sums(const Work *work, const Buffers *own) {
  for (int64_t i = 0; i < work->taps.K * work->taps.block; i += kWidth)
    store(own->total + i, load(own->total + i) + load(own->sums + i));
  memset(own->sums, 0, static_cast<size_t>(work->taps.K * work->taps.block) * sizeof(float));
}

/* All gradients of channels c .. c + n. */
template <class Number>
void channel_gradients(const Work *work, int64_t c, const Buffers *own) {
  const Taps *taps = &work->taps;
  const int64_t n = min_of(taps->block, taps->C - c);
  transpose_weight(taps, c, n, own->weight);
  memset(own->total, 0, static_cast<size_t>(taps->K * taps->block) * sizeof(float));
  for (int64_t b = 0; b < taps->B; b++) {
    for (int64_t at = 0; at < taps->S + taps->reach; at++) {
      if (at < taps->S) position<Number>(work, b, at, c, n, own);
      row_gradient<Number>(work, b, at, c, n, own);
      if (at % kRowsOfASum == kRowsOfASum - 1) add_sums(work, own);
    }
    add_sums(work, own);
  }
  float *dweight = static_cast<float *>(work->outs[1]->data) + c * taps->K;
  for (int64_t j = 0; j < n; j++)
    for (int64_t tap = 0; tap < taps->K; tap++)
      dweight[j * taps->K + tap] = own->total[tap * taps->block + j];
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
  const transom_tensor *dv = work.outs[0];
  if (work.taps.C == 0) return 0;
  about_to_write(dv->data, work.taps.B * work.taps.S * work.taps.C * size_of(dv));
  Counter counter(work.blocks);
  with_type_of(work.taps.v, [&]<class Number>(const Number *) {
    on_threads(work.threads, [&](int32_t thread) {
      char *memory = static_cast<char *>(call->workspace) + thread * work.thread_bytes;
      Arena arena(memory);
      const Buffers own = lay_out(&work, arena);
      memset(memory, 0, static_cast<size_t>(work.thread_bytes));
      for (int64_t block; counter.take(&block);)
        channel_gradients<Number>(&work, block * work.taps.block, &own);
    });
  });
  return 0;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
