/* moe_experts_backward: the gradients in x, in the routing weights and in the biases.
 *
 * Some experts at a time have their gradients of gate and up taken (_backward.h); then slices of the
 * columns of dx, each summed by one thread over a token's experts in rising order; then what is
 * summed over columns or over an expert's rows, in order. */
#include "_backward.h"

namespace transom::TRANSOM_LEVEL {

TRANSOM_KERNEL(moe_experts_backward, supports, workspace, run)

namespace {

struct Work : Backward {
  const transom_tensor *down_bias, *dx, *dweights, *dgate_up_bias, *ddown_bias;
  float *sums; /* of dx, where it is not float32 */
};

void lay_out(Work *work, Arena &arena) {
  work->threads = arena.take<float>(work->thread_floats * work->call->threads);
  work->dboth = arena.take<float>(work->part_rows * work->both_stride);
  work->dot = arena.take<float>(work->part_rows * work->dots);
  work->sums = arena.take<float>(kind(work->x) == 0 ? 0 : work->tokens * work->D);
  work->routed.ends = arena.take<int64_t>(work->routed.E);
  work->routed.order = arena.take<int32_t>(work->tokens * work->routed.K);
}

Work describe(const transom_call *call) {
  Work work = {};
  static_cast<Backward &>(work) = backward_from<Arguments>(call, false);
  work.down_bias = tensor(call, ARG(DOWN_BIAS));
  work.dx = call->outs[0], work.dweights = call->outs[1];
  work.dgate_up_bias = call->outs[2], work.ddown_bias = call->outs[3];
  const int64_t budget = workspace_budget(call), K = work.routed.K;
  const int64_t a_token = K * 4 + (kind(work.x) == 0 ? 0 : work.D * 4);
  work.tokens = clamp(budget / 2 / max_of(a_token, 1), 1, max_of(work.T, 1));
  work.part_rows = clamp(budget * 3 / 8 / ((work.both_stride + work.dots) * 4), 1,
                         max_of(work.tokens * K, 1));
  size_threads(&work);
  return work;
}

float *sums_of(const Work *work, int64_t token) {
  if (kind(work->x) != 0) return work->sums + token * work->D;
  return static_cast<float *>(at(work->dx, (work->routed.first + token) * work->D));
}

/* Columns column .. column + columns of dx, for the experts of the part. */
void dx_columns(const Work *work, int64_t column, int64_t columns, int32_t thread) {
  const Routed &routed = work->routed;
  float *tile = work->threads + thread * work->thread_floats;
  for (int64_t t = 0; t < routed.count && work->from == 0; t++)
    memset(sums_of(work, t) + column, 0, static_cast<size_t>(columns) * sizeof(float));
  int64_t start = work->from;
  for (int64_t e = 0; e < routed.E && start < work->to; e++) {
    const int64_t stop = min_of(routed.ends[e], work->to);
    if (stop <= start) continue;
    const Weight weight = transposed(expert_weight(*work, work->gate_up, e));
    for (int64_t row = start; row < stop; row += work->block) {
      const int64_t rows = min_of(work->block, stop - row);
      multiply(rows, 2 * work->I, work->dboth + (row - work->from) * work->both_stride,
               work->both_stride, weight, column, columns, tile, kTileStride, work->l2);
      for (int64_t r = 0; r < rows; r++) {
        float *sum = sums_of(work, routed.token(row + r)) + column;
        for (int64_t c = 0; c < columns; c++) sum[c] += tile[r * kTileStride + c];
      }
    }
    start = stop;
  }
  for (int64_t t = 0; t < routed.count && work->to == routed.rows && kind(work->dx) != 0; t++)
    write_row(at(work->dx, (routed.first + t) * work->D + column), kind(work->dx),
              sums_of(work, t) + column, columns);
}

void write_number(const transom_tensor *t, int64_t index, float x) {
  if (t->dtype_bits == 64)
    static_cast<double *>(t->data)[index] = static_cast<double>(x);
  else
    write_row(at(t, index), kind(t), &x, 1);
}

/* A sum over the elements of a row, in an order of its own length only. */
float dot(const float *a, const float *b, int64_t n) {
  vf sums = {};
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) sums += load(a + i) * load(b + i);
  float total = sum(sums);
  for (; i < n; i++) total += a[i] * b[i];
  return total;
}

/* The routing weights of expert e's rows in the part, and what is summed over these rows. */
void expert_sums(const Work *work, int64_t e, int32_t thread) {
  const Routed &routed = work->routed;
  const transom_tensor *dy = work->dy, *b = work->down_bias;
  float *drow = work->threads + thread * work->thread_floats, *bias = drow + work->x_stride;
  const int64_t start = max_of(e == 0 ? 0 : routed.ends[e - 1], work->from);
  const int64_t stop = min_of(routed.ends[e], work->to);
  if (start < stop && b != nullptr)
    read_row(b, e * b->strides[0], b->strides[1], work->D, bias);
  float *dgate_up = static_cast<float *>(at(work->dgate_up_bias, e * 2 * work->I));
  float *ddown = static_cast<float *>(at(work->ddown_bias, e * work->D));
  for (int64_t row = start; row < stop; row++) {
    const float *dboth = work->dboth + (row - work->from) * work->both_stride;
    for (int64_t c = 0; c < 2 * work->I; c++) dgate_up[c] += dboth[c];
    read_row(dy, (routed.first + routed.token(row)) * dy->strides[0], dy->strides[1], work->D,
             drow);
    const float w = routed.weight(row);
    for (int64_t c = 0; c < work->D; c++) ddown[c] += w * drow[c];
    float total = 0.0f;
    for (int64_t i = 0; i < work->dots; i++)
      total += work->dot[(row - work->from) * work->dots + i];
    if (b != nullptr) total += dot(drow, bias, work->D);
    write_number(work->dweights, routed.first * routed.K + routed.order[row], total);
  }
}

int32_t supports(const transom_call *call, transom_status *status) {
  return readable(tensor(call, ARG(DY)), "dy", status) &&
         weight_fits(call, ARG(GATE_UP), "gate_up", status) &&
         weight_fits(call, ARG(DOWN), "down", status);
}

uint64_t workspace(const transom_call *call) {
  Work work = describe(call);
  Arena arena;
  lay_out(&work, arena);
  return arena.bytes();
}

void clear(const transom_tensor *t) {
  int64_t bytes = size_of(t);
  for (int i = 0; i < t->ndim; i++) bytes *= t->shape[i];
  if (bytes > 0) memset(t->data, 0, static_cast<size_t>(bytes));
}

int32_t run(const transom_call *call, transom_status *) {
  Work work = describe(call);
  Routed *routed = &work.routed;
  Arena arena(call->workspace);
  lay_out(&work, arena);
  clear(work.dweights), clear(work.dgate_up_bias), clear(work.ddown_bias);
  for (routed->first = 0; routed->first < work.T; routed->first += work.tokens) {
    routed->count = min_of(work.tokens, work.T - routed->first);
    sort(routed);
    work.from = 0;
    do {
      work.to = part_end(*routed, work.from, work.part_rows);
      const int32_t threads = run_activations_backward(&work);
      const int64_t slice = columns_at_once(work.D, 1, threads, kMostColumns);
      tasks(threads, ceil_of(work.D, slice), [&](int64_t task, int32_t thread) {
        dx_columns(&work, task * slice, min_of(slice, work.D - task * slice), thread);
      });
      tasks(threads, routed->E,
            [&](int64_t e, int32_t thread) { expert_sums(&work, e, thread); });
      work.from = work.to;
    } while (work.from < routed->rows);
  }
  return 0;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
