/* moe_experts: gate and up, activation, down, weighted sum over a token's slots.
 *
 * A stable counting sort of the slots by expert, then for some experts at a time two rounds of
 * tasks. First gate and up of a slice of columns into a tile of the thread, where the activation is
 * applied: only h leaves it. Then a slice of the columns of y for all these experts: down, times
 * the routing weight, added to the tokens' sums. A slice has one thread, so a token's sum runs over
 * its experts in rising order, whatever the threads and the other tokens, and no product of a slot
 * is ever stored. */
#include "../base/parallel.h"
#include "_routed.h"
#include "_activations.h"

namespace transom::TRANSOM_LEVEL {
namespace {

#define ARGUMENT(name) TRANSOM_MOE_EXPERTS_##name

/* Columns of gate, and of up, in a tile; in a row of it they stand side by side or alternate. */
constexpr int64_t kTile = kMostColumns / 2;
constexpr int64_t kUpAt = kTile + kPanel, kTileStride = 2 * kUpAt;

struct Work {
  const transom_call *call;
  const transom_tensor *x, *gate_up_bias, *down_bias;
  int64_t T, D, I;
  int64_t x_fixed, h_fixed; /* fixed_block() of gate_up, of down */
  int64_t x_stride, h_stride, block, thread_floats, l2;
  Gated gated;
  bool interleaved, before;
  int64_t tokens, h_rows; /* the most of a piece, and of a part of its rows */
  Routed routed;
  float *threads, *h, *sums;
  int64_t from, to; /* the rows at hand */
  Tasks tasks;
};

/* Bytes of workspace. */
int64_t lay_out(Work *work) {
  Parts parts = {static_cast<char *>(work->call->workspace)};
  work->threads = parts.take<float>(work->thread_floats * work->call->threads);
  work->h = parts.take<float>(work->h_rows * work->h_stride);
  /* float32 results are summed where they belong */
  const bool apart = kind(work->x) != 0;
  work->sums = parts.take<float>(apart ? work->tokens * work->D : 0);
  work->routed.ends = parts.take<int64_t>(work->routed.E);
  work->routed.order = parts.take<int32_t>(work->tokens * work->routed.K);
  return parts.bytes;
}

Work describe(const transom_call *call) {
  Work work = {};
  const transom_value *args = call->args;
  work.call = call;
  work.x = tensor(call, ARGUMENT(X));
  work.gate_up_bias = tensor(call, ARGUMENT(GATE_UP_BIAS));
  work.down_bias = tensor(call, ARGUMENT(DOWN_BIAS));
  Routed *routed = &work.routed;
  routed->ids = tensor(call, ARGUMENT(IDS));
  routed->weights = tensor(call, ARGUMENT(WEIGHTS));
  routed->E = tensor(call, ARGUMENT(DOWN))->shape[0], routed->K = routed->ids->shape[1];
  work.T = work.x->shape[0], work.D = work.x->shape[1];
  work.I = tensor(call, ARGUMENT(GATE_UP))->shape[1] / 2;
  work.gated = gated_from(args[ARGUMENT(ACTIVATION)].string, &args[ARGUMENT(LIMIT)],
                          args[ARGUMENT(ALPHA)].f);
  work.interleaved = args[ARGUMENT(INTERLEAVED)].i != 0;
  work.before = strcmp(args[ARGUMENT(WEIGHT_POSITION)].string, "before") == 0;
  work.x_fixed = fixed_block(weight_in(call->args + ARGUMENT(GATE_UP), 0), work.D, kind(work.x));
  work.h_fixed = fixed_block(weight_in(call->args + ARGUMENT(DOWN), 0), work.I, kind(work.x));
  work.x_stride = fixed_stride(work.D, work.x_fixed);
  work.h_stride = fixed_stride(work.I, work.h_fixed);
  work.l2 = l2_bytes();
  /* More than half for the sums: with all tokens at once each weight is read once. */
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

/* Elements of `bias` from `column` on, if there is one, else zeros. */
void read_bias(const transom_tensor *bias, int64_t e, int64_t column, int64_t columns,
               float *to) {
  if (bias == nullptr)
    memset(to, 0, static_cast<size_t>(up_to(columns, kWidth)) * sizeof(float));
  else
    read_row(bias, e * bias->strides[0] + column * bias->strides[1], bias->strides[1], columns,
             to);
}

void gate_and_up(void *context, int32_t thread) {
  Work *work = static_cast<Work *>(context);
  const Routed &routed = work->routed;
  const transom_tensor *x = work->x;
  float *rows = work->threads + thread * work->thread_floats;
  float *tile = rows + work->block * work->x_stride;
  float *activated = tile + work->block * kTileStride, *bias = activated + kTileStride;
  const bool interleaved = work->interleaved;
  int64_t held = -1; /* the first of the rows at hand */
  Walk walk(work->from);
  Task task;
  while (take(&work->tasks, &walk, [&](int64_t e) { return routed.ends[e]; }, &task)) {
    Weight weight = weight_at(work->call, ARGUMENT(GATE_UP), task.e);
    weight.fixed = work->x_fixed;
    for (int64_t r = 0; r < task.rows && held != task.row; r++) {
      float *row = rows + r * work->x_stride;
      read_row(x, (routed.first + routed.token(task.row + r)) * x->strides[0], x->strides[1],
               work->D, row);
      fix_row(weight, work->D, row);
    }
    held = task.row;
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

/* Rows of h that a thread turns at a time. */
constexpr int64_t kRowsOfH = 16;

/* Each thread takes some rows of h, which all threads have written. */
void fix_h(void *context, int32_t) {
  Work *work = static_cast<Work *>(context);
  Weight weight = weight_in(work->call->args + ARGUMENT(DOWN), 0);
  weight.fixed = work->h_fixed;
  for (;;) {
    const int64_t from =
        kRowsOfH * __atomic_fetch_add(&work->tasks.next, 1, __ATOMIC_RELAXED);
    const int64_t to = min_of(from + kRowsOfH, work->to - work->from);
    if (from >= to) return;
    for (int64_t r = from; r < to; r++) fix_row(weight, work->I, work->h + r * work->h_stride);
  }
}

/* The sums of a token of the piece. */
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

void down(void *context, int32_t thread) {
  Work *work = static_cast<Work *>(context);
  const Routed &routed = work->routed;
  float *tile = work->threads + thread * work->thread_floats;
  float *bias = tile + work->block * kTileStride;
  const int64_t slices = ceil_of(work->D, work->tasks.columns);
  for (;;) {
    const int64_t slice = __atomic_fetch_add(&work->tasks.next, 1, __ATOMIC_RELAXED);
    if (slice >= slices) return;
    Task task = {};
    task.column = slice * work->tasks.columns;
    task.columns = min_of(work->tasks.columns, work->D - task.column);
    for (int64_t t = 0; t < routed.count && work->from == 0; t++)
      memset(sums_of(work, t) + task.column, 0,
             static_cast<size_t>(task.columns) * sizeof(float));
    int64_t start = work->from;
    for (task.e = 0; task.e < routed.E && start < work->to; task.e++) {
      const int64_t stop = min_of(routed.ends[task.e], work->to);
      if (stop <= start) continue;
      Weight weight = weight_at(work->call, ARGUMENT(DOWN), task.e);
      weight.fixed = work->h_fixed;
      read_bias(work->down_bias, task.e, task.column, task.columns, bias);
      for (task.row = start; task.row < stop; task.row += task.rows) {
        task.rows = min_of(work->block, stop - task.row);
        multiply(task.rows, work->I, work->h + (task.row - work->from) * work->h_stride,
                 work->h_stride, weight, task.column, task.columns, tile, kTileStride, work->l2);
        add_products(work, task, tile, bias);
      }
      start = stop;
    }
    const transom_tensor *y = work->call->outs[0];
    for (int64_t t = 0; t < routed.count && work->to == routed.rows && kind(y) != 0; t++)
      write_row(at(y, (routed.first + t) * work->D + task.column), kind(y),
                sums_of(work, t) + task.column, task.columns);
  }
}

int32_t supports(const transom_call *call, transom_status *status) {
  return fits(call, ARGUMENT(X), "x", ARGUMENT(GATE_UP), "gate_up", status) &&
         fits(call, ARGUMENT(X), "x", ARGUMENT(DOWN), "down", status);
}

uint64_t workspace(const transom_call *call) {
  Work work = describe(call);
  return static_cast<uint64_t>(lay_out(&work));
}

int32_t run(const transom_call *call, transom_status *status) {
  Work work = describe(call);
  Routed *routed = &work.routed;
  if (work.T == 0 || work.D == 0) return 0;
  if (!holds(call, lay_out(&work), status)) return 1;
  for (routed->first = 0; routed->first < work.T; routed->first += work.tokens) {
    routed->count = min_of(work.tokens, work.T - routed->first);
    sort(routed);
    work.from = 0;
    do {
      work.to = part_end(*routed, work.from, work.h_rows);
      const double products = static_cast<double>((work.to - work.from) * work.D);
      const int32_t threads =
          threads_for(3.0 * products * static_cast<double>(work.I), call->threads);
      int64_t stop = work.from;
      const int64_t blocks = count_blocks(routed->E, work.to, work.block,
                                          [&](int64_t e) { return routed->ends[e]; }, &stop);
      const int64_t columns = columns_at_once(work.I, blocks, threads, kTile);
      work.tasks = {routed->E, work.to, work.I, work.block, columns, 0};
      if (blocks > 0) parallel(threads, gate_and_up, &work);
      work.tasks.next = 0;
      if (work.h_fixed > 0)
        parallel(work.to - work.from > kRowsOfH ? threads : 1, fix_h, &work);
      work.tasks.next = 0;
      work.tasks.columns = columns_at_once(work.D, 1, threads, kMostColumns);
      parallel(threads, down, &work);
      work.from = work.to;
    } while (work.from < routed->rows);
  }
  return 0;
}

}  // namespace

extern const transom_impl moe_experts = {
    sizeof(transom_impl), TRANSOM_TUNED, "moe_experts", "native", TRANSOM_MOE_EXPERTS_HASH,
    TRANSOM_DETERMINISTIC, 0, supports, workspace, run};

}  // namespace transom::TRANSOM_LEVEL
