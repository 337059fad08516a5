/* hashed_embedding_backward_rows: the rows that were read, ascending, and their gradients, see
 * _row_sums.h. */
#include "_row_sums.h"

namespace transom::TRANSOM_LEVEL {

TRANSOM_KERNEL(hashed_embedding_backward_rows, supports, workspace, run)

namespace {

/* How many different rows a range has; its keys are sorted. */
int64_t sort_range(const RowSums *sums, int64_t range) {
  const int64_t first = sums->starts[range], end = sums->starts[range + 1];
  sort_keys(sums->keys + first, end - first);
  int64_t unique = first < end;
  for (int64_t i = first + 1; i < end; i++)
    unique += sums->keys[i] >> 32 != sums->keys[i - 1] >> 32;
  return unique;
}

int32_t supports(const transom_call *call, transom_status *status) {
  const RowSums sums = describe_row_sums<Arguments>(call);
  return row_sums_fit(&sums, status);
}

uint64_t workspace(const transom_call *call) {
  return row_sums_workspace(describe_row_sums<Arguments>(call));
}

int32_t run(const transom_call *call, transom_status *) {
  RowSums sums = describe_row_sums<Arguments>(call);
  int64_t *ids = static_cast<int64_t *>(call->outs[0]->data);
  char *gradients = static_cast<char *>(call->outs[1]->data);
  const int64_t bytes = sums.d * size_of(sums.dy); /* of a row */
  if (sums.items == 0) return 0;
  int64_t used = 0;
  if (sums.ranges > 0) {
    find_keys(&sums, call->workspace);
    tasks(sums.threads, sums.ranges,
          [&](int64_t range, int32_t) { sums.unique[range] = sort_range(&sums, range); });
    for (int64_t range = 0; range < sums.ranges; range++) {
      const int64_t here = sums.unique[range];
      sums.unique[range] = used, used += here;
    }
    about_to_write(gradients, sums.items * bytes);
    tasks(sums.threads, sums.ranges, [&](int64_t range, int32_t thread) {
      const int64_t end = sums.starts[range + 1];
      int64_t to = sums.unique[range];
      for (int64_t at = sums.starts[range]; at < end; to++) {
        const int64_t row = row_of(&sums, range, sums.keys[at]);
        int64_t last = at + 1;
        while (last < end && row_of(&sums, range, sums.keys[last]) == row) last++;
        ids[to] = row;
        if (bytes > 0)
          sum_rows(&sums, at, last, end, sum_of(&sums, thread), gradients + to * bytes);
        at = last;
      }
    });
  }
  for (int64_t i = used; i < sums.items; i++) ids[i] = -1;
  if (bytes > 0)
    memset(gradients + used * bytes, 0, static_cast<size_t>((sums.items - used) * bytes));
  return 0;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
