/* Rows sorted by expert, cut into tasks that threads take from one counter. Internal linkage, as in
 * vector.h. */
#pragma once

#include "../base/parallel.h"
#include "../weights/weight.h"

namespace transom::TRANSOM_LEVEL {
namespace {

inline int64_t ceil_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Rows `row`.. of expert e times columns `column`.. of its weight. */
struct Task {
  int64_t e, row, rows, column, columns;
};

/* The tasks of one product over all experts. */
struct Tasks {
  int64_t E, M;
  int64_t N;
  int64_t rows, columns; /* the most of a task */
  int64_t next;          /* taken by fetch-and-add */
};

/* Where a thread stands: its tasks come in rising order, so it walks along the experts once. */
struct Walk {
  int64_t e = -1, start, stop, first = 0, tasks = 0, blocks = 0;
  explicit Walk(int64_t from = 0) : start(from), stop(from) {}
};

/* The next task for this thread, if there is one. ends(e): where the rows of expert e end. */
template <class Ends>
inline bool take(Tasks *tasks, Walk *walk, Ends ends, Task *task) {
  const int64_t number = __atomic_fetch_add(&tasks->next, 1, __ATOMIC_RELAXED);
  while (number >= walk->first + walk->tasks) {
    if (++walk->e >= tasks->E) return false;
    walk->first += walk->tasks;
    walk->start = walk->stop;
    walk->stop = max_of(walk->start, min_of(ends(walk->e), tasks->M));
    walk->blocks = ceil_of(walk->stop - walk->start, tasks->rows);
    walk->tasks = walk->blocks * ceil_of(tasks->N, tasks->columns);
  }
  /* Blocks of rows after one another for the same columns: the weight is then still in a cache. */
  const int64_t at = number - walk->first;
  task->e = walk->e;
  task->row = walk->start + at % walk->blocks * tasks->rows;
  task->rows = min_of(tasks->rows, walk->stop - task->row);
  task->column = at / walk->blocks * tasks->columns;
  task->columns = min_of(tasks->columns, tasks->N - task->column);
  return true;
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

/* Rows of x in one task: enough to pay for turning the weight, and a piece of kDepth of each stays
 * in L2 whatever their length. */
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
