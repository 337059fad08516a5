/* moe_experts_backward: the gradients in x, in the routing weights and in the biases.
 *
 * For some experts at a time: gradients of gate and up (_backward.h); then slices of the columns of
 * dx, each summed by one thread over a token's experts in rising order; then what is summed over
 * columns or over an expert's rows, in order. */
#include "_backward.h"

namespace transom::TRANSOM_LEVEL {
namespace {

#define ARGUMENT(name) TRANSOM_MOE_EXPERTS_BACKWARD_##name

struct Work : Backward {
  const transom_tensor *down_bias, *dx, *dweights, *dgate_up_bias, *ddown_bias;
  float *sums; /* of dx, where it is not float32 */
};

int64_t lay_out(Work *work) {
  Parts parts = {static_cast<char *>(work->call->workspace)};
  work->threads = parts.take<float>(work->thread_floats * work->call->threads);
  work->dboth = parts.take<float>(work->part_rows * work->both_stride);
  work->dot = parts.take<float>(work->part_rows * work->dots);
  work->sums = parts.take<float>(kind(work->x) == 0 ? 0 : work->tokens * work->D);
  work->routed.ends = parts.take<int64_t>(work->routed.E);
  work->routed.order = parts.take<int32_t>(work->tokens * work->routed.K);
  return parts.bytes;
}

Work describe(const transom_call *call) {
  Work work = {};
  const BackwardArguments at = {
      ARGUMENT(DY), ARGUMENT(X), ARGUMENT(IDS), ARGUMENT(WEIGHTS), ARGUMENT(GATE_UP),
      ARGUMENT(DOWN), ARGUMENT(GATE_UP_BIAS), ARGUMENT(ACTIVATION), ARGUMENT(LIMIT),
      ARGUMENT(INTERLEAVED), ARGUMENT(ALPHA), false};
  static_cast<Backward &>(work) = backward_from(call, at);
  work.down_bias = tensor(call, ARGUMENT(DOWN_BIAS));
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

void dx_slices(void *context, int32_t thread) {
  Work *work = static_cast<Work *>(context);
  const Routed &routed = work->routed;
  float *tile = work->threads + thread * work->thread_floats;
  const int64_t slices = ceil_of(work->D, work->tasks.columns);
  for (;;) {
    const int64_t slice = __atomic_fetch_add(&work->tasks.next, 1, __ATOMIC_RELAXED);
    if (slice >= slices) return;
    const int64_t column = slice * work->tasks.columns;
    const int64_t columns = min_of(work->tasks.columns, work->D - column);
    for (int64_t t = 0; t < routed.count && work->from == 0; t++)
      memset(sums_of(work, t) + column, 0, static_cast<size_t>(columns) * sizeof(float));
    int64_t start = work->from;
    for (int64_t e = 0; e < routed.E && start < work->to; e++) {
      const int64_t stop = min_of(routed.ends[e], work->to);
      if (stop <= start) continue;
      const Weight weight = transposed(expert_weight(*work, work->at.gate_up, e));
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

/* By expert: its rows' routing weights, and what is summed over its rows. */
void expert_sums(void *context, int32_t thread) {
  Work *work = static_cast<Work *>(context);
  const Routed &routed = work->routed;
  const transom_tensor *dy = work->dy, *b = work->down_bias;
  float *drow = work->threads + thread * work->thread_floats, *bias = drow + work->x_stride;
  for (;;) {
    const int64_t e = __atomic_fetch_add(&work->tasks.next, 1, __ATOMIC_RELAXED);
    if (e >= routed.E) return;
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
}

int32_t supports(const transom_call *call, transom_status *status) {
  return fits(call, ARGUMENT(DY), "dy", ARGUMENT(GATE_UP), "gate_up", status) &&
         fits(call, ARGUMENT(DY), "dy", ARGUMENT(DOWN), "down", status);
}

uint64_t workspace(const transom_call *call) {
  Work work = describe(call);
  return static_cast<uint64_t>(lay_out(&work));
}

void clear(const transom_tensor *t) {
  int64_t bytes = size_of(t);
  for (int i = 0; i < t->ndim; i++) bytes *= t->shape[i];
  if (bytes > 0) memset(t->data, 0, static_cast<size_t>(bytes));
}

int32_t run(const transom_call *call, transom_status *status) {
  Work work = describe(call);
  Routed *routed = &work.routed;
  if (!holds(call, lay_out(&work), status)) return 1;
  clear(work.dweights), clear(work.dgate_up_bias), clear(work.ddown_bias);
  for (routed->first = 0; routed->first < work.T; routed->first += work.tokens) {
    routed->count = min_of(work.tokens, work.T - routed->first);
    sort(routed);
    work.from = 0;
    do {
      work.to = part_end(*routed, work.from, work.part_rows);
      const int32_t threads = run_activations_backward(&work);
      work.tasks.columns = columns_at_once(work.D, 1, threads, kMostColumns);
      if (work.D > 0) parallel(threads, dx_slices, &work);
      work.tasks.next = 0;
      parallel(threads, expert_sums, &work);
      work.from = work.to;
    } while (work.from < routed->rows);
  }
  return 0;
}

}  // namespace

extern const transom_impl moe_experts_backward = {
    sizeof(transom_impl), TRANSOM_TUNED, "moe_experts_backward", "native",
    TRANSOM_MOE_EXPERTS_BACKWARD_HASH, TRANSOM_DETERMINISTIC, 0, supports, workspace, run};

}  // namespace transom::TRANSOM_LEVEL
