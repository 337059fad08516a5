/* hashed_embedding_backward: the gradient of the whole embedding, see _row_sums.h; every row is
 * written once, with its sum or zeros. */
#include "_row_sums.h"

namespace transom::TRANSOM_LEVEL {

TRANSOM_KERNEL(hashed_embedding_backward, supports, workspace, run)

namespace {

int32_t supports(const transom_call *call, transom_status *status) {
  const RowSums sums = describe_row_sums<Arguments>(call);
  return row_sums_fit(&sums, status);
}

uint64_t workspace(const transom_call *call) {
  return row_sums_workspace(describe_row_sums<Arguments>(call));
}

int32_t run(const transom_call *call, transom_status *) {
  RowSums sums = describe_row_sums<Arguments>(call);
  char *dtable = static_cast<char *>(call->outs[0]->data);
  const int64_t bytes = sums.d * size_of(sums.dy); /* of a row */
  if (bytes == 0 || sums.ranges == 0) return 0;
  const auto clear = [&](int64_t first, int64_t end) {
    memset(dtable + first * bytes, 0, static_cast<size_t>((end - first) * bytes));
  };
  about_to_write(dtable, sums.shape.rows * bytes);
  find_keys(&sums, call->workspace);
  tasks(sums.threads, sums.ranges, [&](int64_t range, int32_t thread) {
    const int64_t end = sums.starts[range + 1];
    int64_t at = sums.starts[range], written = range << sums.shift;
    sort_keys(sums.keys + at, end - at);
    while (at < end) {
      const int64_t row = row_of(&sums, range, sums.keys[at]);
      int64_t last = at + 1;
      while (last < end && row_of(&sums, range, sums.keys[last]) == row) last++;
      clear(written, row);
      sum_rows(&sums, at, last, end, sum_of(&sums, thread), dtable + row * bytes);
      written = row + 1, at = last;
    }
    clear(written, min_of((range + 1) << sums.shift, sums.shape.rows));
  });
  return 0;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
