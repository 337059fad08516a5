/* grouped_gemm: the rows of each expert times the weight of that expert.
 *
 * Tasks are (expert, slice of columns, block of rows), taken from one counter; a task reads its
 * rows of x into float32, multiplies them (weight.h) and rounds the results. */
#include "../parallel.h"
#include "_tasks.h"

namespace transom::TRANSOM_LEVEL {
namespace {

enum { X = TRANSOM_GROUPED_GEMM_X, W = TRANSOM_GROUPED_GEMM_WEIGHT };

struct Work {
  const transom_call *call;
  const transom_tensor *x, *w, *offsets;
  int64_t M, K, x_stride, thread_floats, l2;
  Tasks tasks;
  int64_t end(int64_t e) const { return integer(offsets, e * offsets->strides[0]); }
};

Work describe(const transom_call *call) {
  Work work = {};
  work.call = call;
  work.x = tensor(call, X);
  work.w = tensor(call, W);
  work.offsets = tensor(call, TRANSOM_GROUPED_GEMM_OFFSETS);
  work.M = work.x->shape[0], work.K = work.x->shape[1];
  work.x_stride = padded(work.K);
  work.l2 = l2_bytes();
  const int64_t rows = clamp(work.M, 1, kMostRows);
  work.tasks = {work.w->shape[0], work.M, work.w->shape[1], rows, kMostColumns, 0};
  work.thread_floats = up_to(rows * (work.x_stride + kProductStride), 16);
  return work;
}

void multiply_tasks(void *context, int32_t thread) {
  Work *work = static_cast<Work *>(context);
  const transom_tensor *x = work->x, *y = work->call->outs[0];
  float *rows = static_cast<float *>(work->call->workspace) + thread * work->thread_floats;
  float *out = rows + work->tasks.rows * work->x_stride;
  int64_t held = -1; /* the first of the rows at hand */
  Walk walk;
  Task task;
  while (take(&work->tasks, &walk, [&](int64_t e) { return work->end(e); }, &task)) {
    for (int64_t r = 0; r < task.rows && held != task.row; r++)
      read_row(x, (task.row + r) * x->strides[0], x->strides[1], work->K,
               rows + r * work->x_stride);
    held = task.row;
    multiply(task.rows, work->K, rows, work->x_stride, weight_at(work->w, task.e), task.column,
             task.columns, out, kProductStride, work->l2);
    for (int64_t r = 0; r < task.rows; r++)
      write_row(at(y, (task.row + r) * work->tasks.N + task.column), kind(y),
                out + r * kProductStride, task.columns);
  }
}

int32_t supports(const transom_call *call, transom_status *status) {
  return fits(call, X, "x", W, "weight", status);
}

uint64_t workspace(const transom_call *call) {
  return static_cast<uint64_t>(describe(call).thread_floats * call->threads) * sizeof(float);
}

int32_t run(const transom_call *call, transom_status *) {
  Work work = describe(call);
  Tasks *tasks = &work.tasks;
  if (work.M == 0 || tasks->N == 0) return 0;
  int64_t stop = 0;
  const int64_t blocks = count_blocks(tasks->E, work.M, tasks->rows,
                                      [&](int64_t e) { return work.end(e); }, &stop);
  const transom_tensor *y = call->outs[0];
  const int64_t nobodys = (work.M - stop) * tasks->N * size_of(y); /* rows without an expert */
  memset(at(y, stop * tasks->N), 0, static_cast<size_t>(nobodys));
  if (blocks > 0) {
    const double products = static_cast<double>(stop * tasks->N) * static_cast<double>(work.K);
    const int32_t threads = threads_for(products, call->threads);
    tasks->columns = columns_at_once(tasks->N, blocks, threads, kMostColumns);
    parallel(threads, multiply_tasks, &work);
  }
  return 0;
}

}  // namespace

extern const transom_impl grouped_gemm = {
    sizeof(transom_impl), TRANSOM_TUNED, "grouped_gemm", "native", TRANSOM_GROUPED_GEMM_HASH,
    TRANSOM_DETERMINISTIC, 0, supports, workspace, run};

}  // namespace transom::TRANSOM_LEVEL
