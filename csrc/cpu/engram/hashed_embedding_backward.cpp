/* hashed_embedding_backward: the table's gradient as a whole table, see _row_sums.h; every row is
 * written once, with its sum or zeros. */
#include "_row_sums.h"

namespace transom::TRANSOM_LEVEL {
namespace {

#define ARGUMENT(name) TRANSOM_HASHED_EMBEDDING_BACKWARD_##name

struct Work {
  RowSums sums;
  char *dtable;
  int64_t bytes; /* of a row */
};

Work describe(const transom_call *call) {
  Work work = {};
  work.sums = describe_row_sums(call, HASH_ARGUMENTS, ARGUMENT(DY), ARGUMENT(ROWS),
                                ARGUMENT(SHARD));
  work.bytes = work.sums.d * size_of(work.sums.dy);
  return work;
}

void clear(const Work *work, int64_t first, int64_t end) {
  memset(work->dtable + first * work->bytes, 0,
         static_cast<size_t>((end - first) * work->bytes));
}

void ranges(void *context, int32_t thread) {
  Work *work = static_cast<Work *>(context);
  RowSums *sums = &work->sums;
  float *sum = sums->sums + thread * up_to(sums->d, 16);
  for (int64_t range; (range = next_of(sums)) < sums->ranges;) {
    const int64_t end = sums->starts[range + 1];
    int64_t at = sums->starts[range], written = range << sums->shift;
    sort_keys(sums->keys + at, end - at);
    while (at < end) {
      const int64_t row = row_of(sums, range, sums->keys[at]);
      int64_t last = at + 1;
      while (last < end && row_of(sums, range, sums->keys[last]) == row) last++;
      clear(work, written, row);
      sum_rows(sums, at, last, end, sum, work->dtable + row * work->bytes);
      written = row + 1, at = last;
    }
    clear(work, written, min_of((range + 1) << sums->shift, sums->shape.rows));
  }
}

int32_t supports(const transom_call *call, transom_status *status) {
  const Work work = describe(call);
  return row_sums_fit(&work.sums, status);
}

uint64_t workspace(const transom_call *call) {
  Work work = describe(call);
  return static_cast<uint64_t>(lay_out_row_sums(&work.sums, nullptr));
}

int32_t run(const transom_call *call, transom_status *) {
  Work work = describe(call);
  work.dtable = static_cast<char *>(call->outs[0]->data);
  if (work.bytes == 0 || work.sums.ranges == 0) return 0;
  about_to_write(work.dtable, work.sums.shape.rows * work.bytes);
  find_keys(&work.sums, call->workspace);
  parallel(work.sums.threads, ranges, &work);
  return 0;
}

}  // namespace

extern const transom_impl hashed_embedding_backward = {
    sizeof(transom_impl), TRANSOM_TUNED, "hashed_embedding_backward", "native",
    TRANSOM_HASHED_EMBEDDING_BACKWARD_HASH, TRANSOM_DETERMINISTIC, 0, supports, workspace, run};

}  // namespace transom::TRANSOM_LEVEL
