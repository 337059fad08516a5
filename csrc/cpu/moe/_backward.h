/* What both gradients of moe_experts begin with: gate, up and h computed again, and the gradients
 * of gate and up of every row. */
#pragma once

#include "_activations.h"
#include "_routed.h"

namespace transom::TRANSOM_LEVEL {
namespace {

/* Columns of gate, and of up, in a tile; in a row of it they stand side by side or alternate. */
constexpr int64_t kTile = kMostColumns / 2;
constexpr int64_t kUpAt = kTile + kPanel, kTileStride = 2 * kUpAt;

struct Backward {
  const transom_call *call;
  int gate_up, down; /* arguments */
  bool plain;        /* a weight is one argument, not four */
  const transom_tensor *dy, *x, *gate_up_bias;
  int64_t T, D, I;
  int64_t x_stride, h_stride, both_stride, dots, block, thread_floats, l2;
  Gated gated;
  bool interleaved;
  int64_t tokens, part_rows; /* the most of a batch, and of a part of its rows */
  Routed routed;
  int64_t from, to; /* the rows of the part */
  float *threads;
  float *dboth; /* [row][2*I] in gate_up's order, times the routing weight */
  float *h;     /* [row][I], or null */
  float *dot;   /* [row][dots]: parts of the sum of h times its gradient, or null */
};

inline Weight expert_weight(const Backward &work, int argument, int64_t e) {
  if (work.plain) return plain_weight(tensor(work.call, argument), e);
  return weight_in(work.call->args + argument, e);
}

/* Args: the arguments of either operator. */
template <class Args>
inline Backward backward_from(const transom_call *call, bool plain) {
  Backward work = {};
  const transom_value *args = call->args;
  work.call = call;
  work.gate_up = Args::GATE_UP, work.down = Args::DOWN, work.plain = plain;
  work.dy = tensor(call, Args::DY), work.x = tensor(call, Args::X);
  work.gate_up_bias = tensor(call, Args::GATE_UP_BIAS);
  Routed *routed = &work.routed;
  routed->ids = tensor(call, Args::IDS), routed->weights = tensor(call, Args::WEIGHTS);
  const transom_tensor *gate_up = tensor(call, Args::GATE_UP);
  routed->E = gate_up->shape[0], routed->K = routed->ids->shape[1];
  work.T = work.x->shape[0], work.D = work.x->shape[1], work.I = gate_up->shape[1] / 2;
  work.gated = gated_from(args[Args::ACTIVATION].string, &args[Args::LIMIT], args[Args::ALPHA].f);
  work.interleaved = args[Args::INTERLEAVED].i != 0;
  work.x_stride = padded(work.D), work.h_stride = padded(work.I);
  work.both_stride = padded(2 * work.I);
  work.dots = ceil_of(work.I, kPanel);
  work.l2 = l2_bytes();
  return work;
}

/* Sizes a thread's part for blocks of the most rows that a part has. */
inline void size_threads(Backward *work) {
  work->block = clamp(work->part_rows, 1, kMostRows);
  /* rows of x and dy, a tile of gate and up and one of the gradient of h, four rows of a tile */
  work->thread_floats =
      up_to(work->block * (2 * work->x_stride + kTileStride + kUpAt) + 4 * kTileStride, 16);
}

template <class Take>
inline void activations_backward(const Backward *work, Take take, int32_t thread) {
  const Routed &routed = work->routed;
  const transom_tensor *x = work->x, *dy = work->dy, *b = work->gate_up_bias;
  float *rows = work->threads + thread * work->thread_floats;
  float *drows = rows + work->block * work->x_stride;
  float *tile = drows + work->block * work->x_stride;
  float *dtile = tile + work->block * kTileStride;
  float *bias = dtile + work->block * kUpAt, *dgate = bias + kTileStride;
  float *dup = dgate + kTileStride, *activated = dup + kTileStride;
  const bool interleaved = work->interleaved;
  int64_t loaded = -1; /* the first of the rows in `rows` and `drows` */
  for (Task task; take(&task);) {
    for (int64_t r = 0; r < task.rows && loaded != task.row; r++) {
      const int64_t token = routed.first + routed.token(task.row + r);
      read_row(x, token * x->strides[0], x->strides[1], work->D, rows + r * work->x_stride);
      read_row(dy, token * dy->strides[0], dy->strides[1], work->D, drows + r * work->x_stride);
    }
    loaded = task.row;
    const Weight gate_up = expert_weight(*work, work->gate_up, task.e);
    const auto columns_into = [&](int64_t first, int64_t columns, int64_t to) {
      multiply(task.rows, work->D, rows, work->x_stride, gate_up, first, columns, tile + to,
               kTileStride, work->l2);
      if (b == nullptr)
        memset(bias + to, 0, static_cast<size_t>(up_to(columns, kWidth)) * sizeof(float));
      else
        read_row(b, task.e * b->strides[0] + first * b->strides[1], b->strides[1], columns,
                 bias + to);
    };
    if (interleaved) {
      columns_into(2 * task.column, 2 * task.columns, 0);
    } else {
      columns_into(task.column, task.columns, 0);
      columns_into(work->I + task.column, task.columns, kUpAt);
    }
    multiply(task.rows, work->D, drows, work->x_stride,
             transposed(expert_weight(*work, work->down, task.e)), task.column, task.columns,
             dtile, kUpAt, work->l2);
    for (int64_t r = 0; r < task.rows; r++) {
      const vf scale = all(routed.weight(task.row + r));
      const float *both = tile + r * kTileStride;
      float *out = work->dboth + (task.row + r - work->from) * work->both_stride;
      for (int64_t c = 0; c < task.columns; c += kWidth) {
        const int64_t left = interleaved ? 2 * c : c;
        const int64_t right = interleaved ? left + kWidth : kUpAt + c;
        vf gate = load(both + left) + load(bias + left);
        vf up = load(both + right) + load(bias + right), g, u;
        if (interleaved) separate(&gate, &up);
        const vf dh = load(dtile + r * kUpAt + c);
        store(activated + c, apply_backward(work->gated, gate, up, dh * scale, &g, &u));
        store(dgate + c, g), store(dup + c, u);
      }
      const size_t bytes = static_cast<size_t>(task.columns) * sizeof(float);
      if (interleaved) {
        for (int64_t c = 0; c < task.columns; c++)
          out[2 * (task.column + c)] = dgate[c], out[2 * (task.column + c) + 1] = dup[c];
      } else {
        memcpy(out + task.column, dgate, bytes);
        memcpy(out + work->I + task.column, dup, bytes);
      }
      if (work->h != nullptr)
        memcpy(work->h + (task.row + r - work->from) * work->h_stride + task.column, activated,
               bytes);
      if (work->dot == nullptr) continue;
      /* In parts of one size, since slices of columns depend on the threads. */
      float *dot = work->dot + (task.row + r - work->from) * work->dots + task.column / kPanel;
      for (int64_t c = 0; c < task.columns; c += kPanel) {
        float total = 0.0f;
        for (int64_t i = c; i < min_of(c + kPanel, task.columns); i++)
          total += activated[i] * dtile[r * kUpAt + i];
        *dot++ = total;
      }
    }
  }
}

/* The first round of tasks for the rows from .. to; the threads that it was worth. */
inline int32_t run_activations_backward(const Backward *work) {
  const auto ends = [&](int64_t e) { return work->routed.ends[e]; };
  const double products = static_cast<double>((work->to - work->from) * work->D);
  const int32_t threads =
      threads_for(3.0 * products * static_cast<double>(work->I), work->call->threads);
  int64_t stop = work->from;
  const int64_t blocks = count_blocks(work->routed.E, work->to, work->block, ends, &stop);
  const int64_t columns = columns_at_once(work->I, blocks, threads, kTile);
  if (blocks > 0 && work->I > 0)
    product_tasks(threads, {work->routed.E, work->to, work->I, work->block, columns}, work->from,
                  ends, [&](auto take, int32_t thread) { activations_backward(work, take, thread); });
  return threads;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
