/* Rows of each expert times its weight, or times the weight's transpose: grouped_gemm and its
 * gradient in x.
 *
 * Tasks are (expert, slice of columns, block of rows), taken from one counter; a task reads its
 * rows into float32, multiplies them and rounds the results. */
#pragma once

#include "_tasks.h"

namespace transom::TRANSOM_LEVEL {
namespace {

struct Grouped {
  const transom_call *call;
  const transom_tensor *x, *offsets;
  int weight; /* which argument */
  bool transpose; /* the weight */
  int64_t M, K, integer_block, x_stride, thread_floats, l2;
  ProductTasks tasks;
  int64_t end(int64_t e) const { return integer(offsets, e * offsets->strides[0]); }
};

inline Grouped grouped_from(const transom_call *call, int x, int weight, int offsets,
                            bool transpose) {
  Grouped work = {};
  work.call = call;
  work.x = tensor(call, x);
  work.offsets = tensor(call, offsets);
  work.weight = weight;
  work.transpose = transpose;
  work.M = work.x->shape[0], work.K = work.x->shape[1];
  if (!transpose)
    work.integer_block = integer_block(weight_in(call->args + weight, 0), work.K, kind(work.x));
  work.x_stride = row_stride(work.K, work.integer_block);
  work.l2 = l2_bytes();
  const int64_t rows = clamp(work.M, 1, kMostRows), N = call->outs[0]->shape[1];
  work.tasks = {work.offsets->shape[0], work.M, N, rows, kMostColumns};
  work.thread_floats = up_to(rows * (work.x_stride + kProductStride), 16);
  return work;
}

template <class Take>
inline void grouped_tasks(const Grouped &work, Take take, int32_t thread) {
  const transom_tensor *x = work.x, *y = work.call->outs[0];
  float *rows = static_cast<float *>(work.call->workspace) + thread * work.thread_floats;
  float *out = rows + work.tasks.rows * work.x_stride;
  int64_t loaded = -1; /* the first of the rows in `rows` */
  for (Task task; take(&task);) {
    Weight weight = weight_at(work.call, work.weight, task.e);
    weight.integer_block = work.integer_block;
    for (int64_t r = 0; r < task.rows && loaded != task.row; r++) {
      float *row = rows + r * work.x_stride;
      read_row(x, (task.row + r) * x->strides[0], x->strides[1], work.K, row);
      quantize_row(weight, work.K, row);
    }
    loaded = task.row;
    multiply(task.rows, work.K, rows, work.x_stride, work.transpose ? transposed(weight) : weight,
             task.column, task.columns, out, kProductStride, work.l2);
    for (int64_t r = 0; r < task.rows; r++)
      write_row(at(y, (task.row + r) * work.tasks.N + task.column), kind(y),
                out + r * kProductStride, task.columns);
  }
}

inline uint64_t grouped_workspace(const Grouped &work) {
  return static_cast<uint64_t>(work.thread_floats * work.call->threads) * sizeof(float);
}

inline int32_t run_grouped(Grouped work) {
  ProductTasks *tasks = &work.tasks;
  const auto ends = [&](int64_t e) { return work.end(e); };
  if (work.M == 0 || tasks->N == 0) return 0;
  int64_t stop = 0;
  const int64_t blocks = count_blocks(tasks->E, work.M, tasks->rows, ends, &stop);
  const transom_tensor *y = work.call->outs[0];
  const int64_t without_expert = (work.M - stop) * tasks->N * size_of(y);
  memset(at(y, stop * tasks->N), 0, static_cast<size_t>(without_expert));
  if (blocks > 0) {
    const double products = static_cast<double>(stop * tasks->N) * static_cast<double>(work.K);
    const int32_t threads = threads_for(products, work.call->threads);
    tasks->columns = columns_at_once(tasks->N, blocks, threads, kMostColumns);
    product_tasks(threads, *tasks, 0, ends,
                  [&](auto take, int32_t thread) { grouped_tasks(work, take, thread); });
  }
  return 0;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
