/* grouped_gemm_dw: for each expert the sum of dy[r] times x[r] over its rows, in row order.
 *
 * Tasks are blocks of a gradient: one thread sums a block over all rows and rounds it once. */
#include "../base/parallel.h"
#include "_outer.h"

namespace transom::TRANSOM_LEVEL {
namespace {

#define ARGUMENT(name) TRANSOM_GROUPED_GEMM_DW_##name

struct Work {
  const transom_call *call;
  const transom_tensor *dy, *x, *offsets;
  int64_t M, N, K, E;
  int64_t next;
  int64_t end(int64_t e) const {
    return e < 0 ? 0 : min_of(integer(offsets, e * offsets->strides[0]), M);
  }
};

void sum_blocks(void *context, int32_t thread) {
  Work *work = static_cast<Work *>(context);
  OuterSpace *space = static_cast<OuterSpace *>(work->call->workspace) + thread;
  const transom_tensor *dy = work->dy, *x = work->x, *dw = work->call->outs[0];
  const int64_t down = ceil_of(work->N, kOuterHeight), across = ceil_of(work->K, kOuterWidth);
  for (;;) {
    const int64_t task = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
    const int64_t e = task / (down * across);
    if (e >= work->E) return;
    const int64_t n = task / across % down * kOuterHeight, k = task % across * kOuterWidth;
    const int64_t height = min_of(kOuterHeight, work->N - n);
    const int64_t width = min_of(kOuterWidth, work->K - k);
    const int64_t start = work->end(e - 1), rows = max_of(work->end(e) - start, 0);
    const auto left = [&](int64_t r, float *to) {
      read_row(dy, (start + r) * dy->strides[0] + n * dy->strides[1], dy->strides[1], height, to);
    };
    const auto right = [&](int64_t r, float *to) {
      read_row(x, (start + r) * x->strides[0] + k * x->strides[1], x->strides[1], width, to);
    };
    sum_outer(rows, height, width, left, right, space, false);
    for (int64_t i = 0; i < height; i++)
      write_row(at(dw, (e * work->N + n + i) * work->K + k), kind(dw),
                space->sums + i * (kOuterWidth + kPanel), width);
  }
}

int32_t supports(const transom_call *call, transom_status *status) {
  return readable(tensor(call, ARGUMENT(DY)), "dy", status);
}

uint64_t workspace(const transom_call *call) {
  return static_cast<uint64_t>(call->threads) * sizeof(OuterSpace);
}

int32_t run(const transom_call *call, transom_status *) {
  Work work = {};
  work.call = call;
  work.dy = tensor(call, ARGUMENT(DY)), work.x = tensor(call, ARGUMENT(X));
  work.offsets = tensor(call, ARGUMENT(OFFSETS));
  work.M = work.x->shape[0], work.N = work.dy->shape[1], work.K = work.x->shape[1];
  work.E = call->outs[0]->shape[0];
  const double entries = static_cast<double>(work.N) * static_cast<double>(work.K);
  if (entries == 0.0) return 0;
  const double rows = static_cast<double>(work.M) + static_cast<double>(work.E);
  parallel(threads_for(entries * rows, call->threads), sum_blocks, &work);
  return 0;
}

}  // namespace

extern const transom_impl grouped_gemm_dw = {
    sizeof(transom_impl), TRANSOM_TUNED, "grouped_gemm_dw", "native",
    TRANSOM_GROUPED_GEMM_DW_HASH, TRANSOM_DETERMINISTIC, 0, supports, workspace, run};

}  // namespace transom::TRANSOM_LEVEL
