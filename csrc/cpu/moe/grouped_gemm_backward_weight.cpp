/* grouped_gemm_backward_weight: for each expert the sum of dy[r] times x[r] over its rows, in their
 * order.
 *
 * Tasks are blocks of a gradient: one thread sums a block over all rows and rounds it once. */
#include "_outer.h"

namespace transom::TRANSOM_LEVEL {

TRANSOM_KERNEL(grouped_gemm_backward_weight, supports, workspace, run)

namespace {

int32_t supports(const transom_call *call, transom_status *status) {
  return readable(tensor(call, ARG(DY)), "dy", status);
}

uint64_t workspace(const transom_call *call) {
  return static_cast<uint64_t>(call->threads) * sizeof(OuterSpace);
}

int32_t run(const transom_call *call, transom_status *) {
  const transom_tensor *dy = tensor(call, ARG(DY)), *x = tensor(call, ARG(X));
  const transom_tensor *offsets = tensor(call, ARG(OFFSETS)), *dw = call->outs[0];
  const int64_t M = x->shape[0], N = dy->shape[1], K = x->shape[1], E = dw->shape[0];
  const int64_t down = ceil_of(N, kOuterHeight), across = ceil_of(K, kOuterWidth);
  const auto end = [&](int64_t e) {
    return e < 0 ? 0 : min_of(integer(offsets, e * offsets->strides[0]), M);
  };
  const double entries = static_cast<double>(N) * static_cast<double>(K);
  if (entries == 0.0) return 0;
  const double rows_and_writes = static_cast<double>(M) + static_cast<double>(E);
  const int32_t threads = threads_for(entries * rows_and_writes, call->threads);
  tasks(threads, E * down * across, [&](int64_t task, int32_t thread) {
    OuterSpace *space = static_cast<OuterSpace *>(call->workspace) + thread;
    const int64_t e = task / (down * across);
    const int64_t n = task / across % down * kOuterHeight, k = task % across * kOuterWidth;
    const int64_t height = min_of(kOuterHeight, N - n), width = min_of(kOuterWidth, K - k);
    const int64_t start = end(e - 1), rows = max_of(end(e) - start, 0);
    const auto left = [&](int64_t r, float *to) {
      read_row(dy, (start + r) * dy->strides[0] + n * dy->strides[1], dy->strides[1], height, to);
    };
    const auto right = [&](int64_t r, float *to) {
      read_row(x, (start + r) * x->strides[0] + k * x->strides[1], x->strides[1], width, to);
    };
    sum_outer(rows, height, width, left, right, space, false);
    for (int64_t i = 0; i < height; i++)
      write_row(at(dw, (e * N + n + i) * K + k), kind(dw),
                space->sums + i * (kOuterWidth + kPanel), width);
  });
  return 0;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
