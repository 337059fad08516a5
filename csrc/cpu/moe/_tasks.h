/* Products of rows sorted by expert, cut into tasks that threads take from one counter. */
#pragma once

#include "../base/kernel.h"
#include "../gemm/multiply.h"

namespace transom::TRANSOM_LEVEL {
namespace {

inline int64_t ceil_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Rows `row`.. of expert e times columns `column`.. of its weight. */
struct Task {
  int64_t e, row, rows, column, columns;
};

/* The tasks of one product over all experts. */
struct ProductTasks {
  int64_t E, M, N;
  int64_t rows, columns; /* the most of a task */
};

/* Where a thread stands among the tasks. Their numbers come in rising order, so that it walks along
 * the experts once. */
class Walk {
 public:
  explicit Walk(const ProductTasks &tasks, int64_t from = 0)
      : tasks_(tasks), start_(from), stop_(from) {}

  /* The task of a number, if there is one. ends(e): where the rows of expert e end. */
  template <class Ends>
  bool find(int64_t number, Ends ends, Task *task) {
    while (number >= first_ + count_) {
      if (++e_ >= tasks_.E) return false;
      first_ += count_;
      start_ = stop_;
      stop_ = max_of(start_, min_of(ends(e_), tasks_.M));
      blocks_ = ceil_of(stop_ - start_, tasks_.rows);
      count_ = blocks_ * ceil_of(tasks_.N, tasks_.columns);
    }
    /* Blocks of rows after one another for the same columns: the weight is then still in a cache. */
    const int64_t at = number - first_;
    task->e = e_;
    task->row = start_ + at % blocks_ * tasks_.rows;
    task->rows = min_of(tasks_.rows, stop_ - task->row);
    task->column = at / blocks_ * tasks_.columns;
    task->columns = min_of(tasks_.columns, tasks_.N - task->column);
    return true;
  }

 private:
  const ProductTasks tasks_;
  int64_t e_ = -1, start_, stop_, first_ = 0, count_ = 0, blocks_ = 0; /* of expert e_ */
};

/* f(take, thread) on up to `threads` threads, of which take(&task) gives each its tasks in rising
 * order, false after the last one. */
template <class Ends, class F>
inline void product_tasks(int32_t threads, const ProductTasks &tasks, int64_t from, Ends ends,
                          F f) {
  Counter counter(INT64_MAX);
  on_threads(threads, [&](int32_t thread) {
    Walk walk(tasks, from);
    const auto take = [&](Task *task) {
      int64_t number;
      return counter.take(&number) && walk.find(number, ends, task);
    };
    f(take, thread);
  });
}

/* Blocks of rows over all experts; *stop: where their rows begin, then where they end. */
template <class Ends>
inline int64_t count_blocks(int64_t E, int64_t M, int64_t rows, Ends ends, int64_t *stop) {
  int64_t blocks = 0;
  for (int64_t e = 0; e < E; e++) {
    const int64_t end = max_of(*stop, min_of(ends(e), M));
    blocks += ceil_of(end - *stop, rows);
    *stop = end;
  }
  return blocks;
}

/* Rows of x in one task: enough to pay for transposing the weight, and a chunk of kDepth of each
 * stays in L2 whatever their length. */
constexpr int64_t kMostRows = 128;
/* Columns of one task, and floats between the rows of its products. */
constexpr int64_t kMostColumns = 256;
constexpr int64_t kProductStride = kMostColumns + kPanel;

/* Columns of the weight in one task: eight tasks a thread to share, but no slivers. */
inline int64_t columns_at_once(int64_t N, int64_t blocks, int64_t threads, int64_t most) {
  return clamp(up_to(N * blocks / (8 * threads), kPanel), up_to(48, kPanel), most);
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
