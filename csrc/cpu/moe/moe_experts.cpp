/* moe_experts: gate and up, activation, down, weighted sum over a token's slots.
 *
 * The slots are sorted by expert, stably; then some experts at a time have two rounds of tasks. The
 * first takes gate and up of a slice of columns into a tile of the thread, where the activation is
 * applied: only h leaves it. The second takes a slice of the columns of y for all these experts:
 * down, times the routing weight, is added to the tokens' sums. A slice has one thread, so a token's
 * sum runs over its experts in rising order, whatever the threads and the other tokens, and no
 * product of a slot is ever stored. */
#include "_activations.h"
#include "_routed.h"

namespace transom::TRANSOM_LEVEL {

TRANSOM_KERNEL(moe_experts, supports, workspace, run)

namespace {

/* Columns of gate, and of up, in a tile; in a row of it they stand side by side or alternate. */
constexpr int64_t kTile = kMostColumns / 2;
constexpr int64_t kUpAt = kTile + kPanel, kTileStride = 2 * kUpAt;

struct Work {
  const transom_call *call;
  const transom_tensor *x, *gate_up_bias, *down_bias;
  int64_t T, D, I;
  int64_t x_block, h_block; /* integer_block() of gate_up, of down */
  int64_t x_stride, h_stride, block, thread_floats, l2;
  Gated gated;
  bool interleaved, before;
  int64_t tokens, h_rows; /* the most of a batch, and of a part of its rows */
  Routed routed;
  float *threads, *h, *sums;
  int64_t from, to; /* the rows of the part */
};

void lay_out(Work *work, Arena &arena) {
  work->threads = arena.take<float>(work->thread_floats * work->call->threads);
  work->h = arena.take<float>(work->h_rows * work->h_stride);
  /* float32 results are summed where they belong. */
  const bool apart = kind(work->x) != 0;
  work->sums = arena.take<float>(apart ? work->tokens * work->D : 0);
  work->routed.ends = arena.take<int64_t>(work->routed.E);
  work->routed.order = arena.take<int32_t>(work->tokens * work->routed.K);
}

Work describe(const transom_call *call) {
  Work work = {};
  const transom_value *args = call->args;
  work.call = call;
  work.x = tensor(call, ARG(X));
  work.gate_up_bias = tensor(call, ARG(GATE_UP_BIAS));
  work.down_bias = tensor(call, ARG(DOWN_BIAS));
  Routed *routed = &work.routed;
  routed->ids = tensor(call, ARG(IDS));
  routed->weights = tensor(call, ARG(WEIGHTS));
  routed->E = tensor(call, ARG(DOWN))->shape[0], routed->K = routed->ids->shape[1];
  work.T = work.x->shape[0], work.D = work.x->shape[1];
  work.I = tensor(call, ARG(GATE_UP))->shape[1] / 2;
  work.gated = gated_from(args[ARG(ACTIVATION)].string, &args[ARG(LIMIT)],
                          args[ARG(ALPHA)].f);
  work.interleaved = args[ARG(INTERLEAVED)].i != 0;
  work.before = strcmp(args[ARG(WEIGHT_POSITION)].string, "before") == 0;
  work.x_block = integer_block(weight_in(args + ARG(GATE_UP), 0), work.D, kind(work.x));
  work.h_block = integer_block(weight_in(args + ARG(DOWN), 0), work.I, kind(work.x));
  work.x_stride = row_stride(work.D, work.x_block);
  work.h_stride = row_stride(work.I, work.h_block);
  work.l2 = l2_bytes();
  /* More than half is for the sums: with all tokens at once each weight is read once. */
  const int64_t budget = workspace_budget(call);
  const int64_t a_token = routed->K * 4 + (kind(work.x) == 0 ? 0 : work.D * 4);
  work.tokens = clamp(budget / 8 * 5 / max_of(a_token, 1), 1, max_of(work.T, 1));
  const int64_t most = work.tokens * routed->K;
  work.h_rows = clamp(budget / 4 / (work.h_stride * 4), 1, max_of(most, 1));
  work.block = clamp(most, 1, kMostRows);
  /* rows of x, the tile, a row of h, and one of a bias */
  work.thread_floats =
      up_to(work.block * (work.x_stride + kTileStride) + 2 * kTileStride, 16);
  return work;
}

/* Elements of `bias` from `column` on; zeros without one. */
void read_bias(const transom_tensor *bias, int64_t e, int64_t column, int64_t columns,
               float *to) {
  if (bias == nullptr)
    memset(to, 0, static_cast<size_t>(up_to(columns, kWidth)) * sizeof(float));
  else
    read_row(bias, e * bias->strides[0] + column * bias->strides[1], bias->strides[1], columns,
             to);
}

template <class Take>
void gate_and_up(const Work *work, Take take, int32_t thread) {
  const Routed &routed = work->routed;
  const transom_tensor *x = work->x;
  float *rows = work->threads + thread * work->thread_floats;
  float *tile = rows + work->block * work->x_stride;
  float *activated = tile + work->block * kTileStride, *bias = activated + kTileStride;
  const bool interleaved = work->interleaved;
  int64_t loaded = -1; /* the first of the rows in `rows` */
  for (Task task; take(&task);) {
    Weight weight = weight_at(work->call, ARG(GATE_UP), task.e);
    weight.integer_block = work->x_block;
    for (int64_t r = 0; r < task.rows && loaded != task.row; r++) {
      float *row = rows + r * work->x_stride;
      read_row(x, (routed.first + routed.token(task.row + r)) * x->strides[0], x->strides[1],
               work->D, row);
      quantize_row(weight, work->D, row);
    }
    loaded = task.row;
    const auto columns_into = [&](int64_t first, int64_t columns, int64_t at) {
      multiply(task.rows, work->D, rows, work->x_stride, weight, first, columns, tile + at,
               kTileStride, work->l2);
      read_bias(work->gate_up_bias, task.e, first, columns, bias + at);
    };
    if (interleaved) {
      columns_into(2 * task.column, 2 * task.columns, 0);
    } else {
      columns_into(task.column, task.columns, 0);
      columns_into(work->I + task.column, task.columns, kUpAt);
    }
    for (int64_t r = 0; r < task.rows; r++) {
      const vf scale = all(work->before ? routed.weight(task.row + r) : 1.0f);
      const float *both = tile + r * kTileStride;
      for (int64_t c = 0; c < task.columns; c += kWidth) {
        const int64_t left = interleaved ? 2 * c : c;
        const int64_t right = interleaved ? left + kWidth : kUpAt + c;
        vf gate = load(both + left) + load(bias + left);
        vf up = load(both + right) + load(bias + right);
        if (interleaved) separate(&gate, &up);
        const vf h = apply(work->gated, gate, up);
        store(activated + c, work->before ? h * scale : h);
      }
      memcpy(work->h + (task.row + r - work->from) * work->h_stride + task.column, activated,
             static_cast<size_t>(task.columns) * sizeof(float));
    }
  }
}

/* Rows of h that are quantised in one task. */
constexpr int64_t kRowsOfH = 16;

/* Threads quantise some rows of h each, which all threads have written. */
void quantize_h(const Work *work, int32_t threads) {
  Weight weight = weight_in(work->call->args + ARG(DOWN), 0);
  weight.integer_block = work->h_block;
  const int64_t rows = work->to - work->from;
  tasks(rows > kRowsOfH ? threads : 1, ceil_of(rows, kRowsOfH), [&](int64_t task, int32_t) {
    const int64_t from = kRowsOfH * task, to = min_of(from + kRowsOfH, rows);
    for (int64_t r = from; r < to; r++)
      quantize_row(weight, work->I, work->h + r * work->h_stride);
  });
}

/* The sums of a token of the batch. */
float *sums_of(const Work *work, int64_t token) {
  if (kind(work->x) != 0) return work->sums + token * work->D;
  return static_cast<float *>(at(work->call->outs[0], (work->routed.first + token) * work->D));
}

/* Adds the products of one task's rows to the tokens' sums. */
void add_products(const Work *work, const Task &task, const float *tile, const float *bias) {
  for (int64_t r = 0; r < task.rows; r++) {
    const int64_t row = task.row + r;
    const float w = work->routed.weight(row), *product = tile + r * kTileStride;
    float *sum = sums_of(work, work->routed.token(row)) + task.column;
    if (work->before)
      for (int64_t c = 0; c < task.columns; c++) sum[c] += product[c] + w * bias[c];
    else
      for (int64_t c = 0; c < task.columns; c++) sum[c] += w * (product[c] + bias[c]);
  }
}

/* Columns column .. column + columns of y, for the experts of the part. */
void down(const Work *work, int64_t column, int64_t columns, int32_t thread) {
  const Routed &routed = work->routed;
  float *tile = work->threads + thread * work->thread_floats;
  float *bias = tile + work->block * kTileStride;
  const transom_tensor *y = work->call->outs[0];
  Task task = {};
  task.column = column, task.columns = columns;
  for (int64_t t = 0; t < routed.count && work->from == 0; t++)
    memset(sums_of(work, t) + column, 0, static_cast<size_t>(columns) * sizeof(float));
  int64_t start = work->from;
  for (task.e = 0; task.e < routed.E && start < work->to; task.e++) {
    const int64_t stop = min_of(routed.ends[task.e], work->to);
    if (stop <= start) continue;
    Weight weight = weight_at(work->call, ARG(DOWN), task.e);
    weight.integer_block = work->h_block;
    read_bias(work->down_bias, task.e, column, columns, bias);
    for (task.row = start; task.row < stop; task.row += task.rows) {
      task.rows = min_of(work->block, stop - task.row);
      multiply(task.rows, work->I, work->h + (task.row - work->from) * work->h_stride,
               work->h_stride, weight, column, columns, tile, kTileStride, work->l2);
      add_products(work, task, tile, bias);
    }
    start = stop;
  }
  for (int64_t t = 0; t < routed.count && work->to == routed.rows && kind(y) != 0; t++)
    write_row(at(y, (routed.first + t) * work->D + column), kind(y), sums_of(work, t) + column,
              columns);
}

/* Rows work->from .. work->to of the batch. */
void run_part(const Work *work) {
  const Routed &routed = work->routed;
  const auto ends = [&](int64_t e) { return routed.ends[e]; };
  const double products = static_cast<double>((work->to - work->from) * work->D);
  const int32_t threads =
      threads_for(3.0 * products * static_cast<double>(work->I), work->call->threads);
  int64_t stop = work->from;
  const int64_t blocks = count_blocks(routed.E, work->to, work->block, ends, &stop);
  const int64_t columns = columns_at_once(work->I, blocks, threads, kTile);
  if (blocks > 0)
    product_tasks(threads, {routed.E, work->to, work->I, work->block, columns}, work->from, ends,
                  [&](auto take, int32_t thread) { gate_and_up(work, take, thread); });
  if (work->h_block > 0) quantize_h(work, threads);
  const int64_t slice = columns_at_once(work->D, 1, threads, kMostColumns);
  tasks(threads, ceil_of(work->D, slice), [&](int64_t task, int32_t thread) {
    down(work, task * slice, min_of(slice, work->D - task * slice), thread);
  });
}

int32_t supports(const transom_call *call, transom_status *status) {
  return readable(tensor(call, ARG(X)), "x", status) &&
         weight_fits(call, ARG(GATE_UP), "gate_up", status) &&
         weight_fits(call, ARG(DOWN), "down", status);
}

uint64_t workspace(const transom_call *call) {
  Work work = describe(call);
  Arena arena;
  lay_out(&work, arena);
  return arena.bytes();
}

int32_t run(const transom_call *call, transom_status *) {
  Work work = describe(call);
  Routed *routed = &work.routed;
  if (work.T == 0 || work.D == 0) return 0;
  Arena arena(call->workspace);
  lay_out(&work, arena);
  for (routed->first = 0; routed->first < work.T; routed->first += work.tokens) {
    routed->count = min_of(work.tokens, work.T - routed->first);
    sort(routed);
    work.from = 0;
    do {
      work.to = part_end(*routed, work.from, work.h_rows);
      run_part(&work);
      work.from = work.to;
    } while (work.from < routed->rows);
  }
  return 0;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
