/* grouped_gemm: the rows of each expert times the weight of that expert.
 *
 * Tasks are (expert, slice of columns, block of rows), taken from one counter; a task reads its
 * rows of x into float32 once, multiplies them (product.h) and rounds the results. */
#include "../parallel.h"
#include "../product.h"

namespace transom::TRANSOM_LEVEL {
namespace {

enum { X = TRANSOM_GROUPED_GEMM_X, W = TRANSOM_GROUPED_GEMM_WEIGHT };

struct Work {
  const transom_call *call;
  const transom_tensor *x, *w, *offsets;
  int64_t M, K, N, E, x_stride, rows, columns, thread_floats;
  int64_t next; /* task, taken by fetch-and-add */
};

Work describe(const transom_call *call) {
  Work work = {};
  work.call = call;
  work.x = tensor(call, X);
  work.w = tensor(call, W);
  work.offsets = tensor(call, TRANSOM_GROUPED_GEMM_OFFSETS);
  work.M = work.x->shape[0], work.K = work.x->shape[1];
  work.E = work.w->shape[0], work.N = work.w->shape[1];
  work.x_stride = padded(work.K);
  work.rows = rows_at_once(work.K, work.M, l2_bytes());
  work.columns = 480; /* the most that columns_at_once gives */
  work.thread_floats = up_to(work.rows * (work.x_stride + work.columns), 16);
  return work;
}

int64_t ceil_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

void some(void *context, int32_t thread) {
  Work *work = static_cast<Work *>(context);
  const transom_tensor *x = work->x, *y = work->call->outs[0];
  float *panel = static_cast<float *>(work->call->workspace) + thread * work->thread_floats;
  float *out = panel + work->rows * work->x_stride;
  const int64_t slices = ceil_of(work->N, work->columns), size = size_of(y);
  /* Tasks come in rising order: walk along the experts. */
  int64_t e = -1, start = 0, stop = 0, first = 0, blocks = 0;
  for (;;) {
    const int64_t task = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
    while (task >= first + blocks * slices) {
      if (++e == work->E) return;
      first += blocks * slices;
      start = max_of(stop, 0);
      stop = max_of(start, min_of(integer(work->offsets, e * work->offsets->strides[0]), work->M));
      blocks = ceil_of(stop - start, work->rows);
    }
    const int64_t slice = (task - first) / blocks, block = (task - first) % blocks;
    const int64_t n = slice * work->columns, columns = min_of(work->columns, work->N - n);
    const int64_t m = start + block * work->rows, rows = min_of(work->rows, stop - m);
    for (int64_t r = 0; r < rows; r++)
      read_row(x, (m + r) * x->strides[0], x->strides[1], work->K, panel + r * work->x_stride);
    multiply(rows, panel, work->x_stride, work->w, e, n, 1, columns, out, work->columns);
    for (int64_t r = 0; r < rows; r++)
      write_row(static_cast<char *>(y->data) + ((m + r) * work->N + n) * size, kind(y),
                out + r * work->columns, columns);
  }
}

int32_t supports(const transom_call *call, transom_status *status) {
  return fits(call, X, "x", W, "weight", status);
}

uint64_t workspace(const transom_call *call) {
  const Work work = describe(call);
  return static_cast<uint64_t>(work.thread_floats * call->threads) * sizeof(float);
}

int32_t run(const transom_call *call, transom_status *) {
  Work work = describe(call);
  int64_t stop = 0, blocks = 0;
  for (int64_t e = 0; e < work.E; e++) {
    const int64_t end = min_of(integer(work.offsets, e * work.offsets->strides[0]), work.M);
    blocks += ceil_of(max_of(end - stop, 0), work.rows);
    stop = max_of(stop, end);
  }
  const transom_tensor *y = call->outs[0];
  if (stop < work.M && work.N > 0) /* rows that belong to nobody */
    memset(static_cast<char *>(y->data) + stop * work.N * size_of(y), 0,
           static_cast<size_t>((work.M - stop) * work.N * size_of(y)));
  if (work.N > 0 && blocks > 0) {
    work.columns = columns_at_once(work.N, blocks, call->threads);
    parallel(call->threads, some, &work);
  }
  return 0;
}

}  // namespace

extern const transom_impl grouped_gemm = {
    sizeof(transom_impl), TRANSOM_TUNED, "grouped_gemm", "native", TRANSOM_GROUPED_GEMM_HASH,
    TRANSOM_DETERMINISTIC, 0, supports, workspace, run};

}  // namespace transom::TRANSOM_LEVEL
