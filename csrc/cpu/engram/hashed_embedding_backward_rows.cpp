/* hashed_embedding_backward_rows: the rows that were read, ascending, and their gradients, see
 * _row_sums.h. */
#include "_row_sums.h"

namespace transom::TRANSOM_LEVEL {
namespace {

#define ARGUMENT(name) TRANSOM_HASHED_EMBEDDING_BACKWARD_ROWS_##name

struct Work {
  RowSums sums;
  int64_t *ids;
  char *gradients;
  int64_t bytes; /* of a row */
};

Work describe(const transom_call *call) {
  Work work = {};
  work.sums = describe_row_sums(call, HASH_ARGUMENTS, ARGUMENT(DY), ARGUMENT(ROWS),
                                ARGUMENT(SHARD));
  work.bytes = work.sums.d * size_of(work.sums.dy);
  return work;
}

/* How many different rows each range has. */
void sort_ranges(void *context, int32_t) {
  Work *work = static_cast<Work *>(context);
  RowSums *sums = &work->sums;
  for (int64_t range; (range = next_of(sums)) < sums->ranges;) {
    const int64_t first = sums->starts[range], end = sums->starts[range + 1];
    sort_keys(sums->keys + first, end - first);
    int64_t unique = first < end;
    for (int64_t i = first + 1; i < end; i++)
      unique += sums->keys[i] >> 32 != sums->keys[i - 1] >> 32;
    sums->unique[range] = unique;
  }
}

void write_ranges(void *context, int32_t thread) {
  Work *work = static_cast<Work *>(context);
  RowSums *sums = &work->sums;
  float *sum = sums->sums + thread * up_to(sums->d, 16);
  for (int64_t range; (range = next_of(sums)) < sums->ranges;) {
    const int64_t end = sums->starts[range + 1];
    int64_t to = sums->unique[range];
    for (int64_t at = sums->starts[range]; at < end; to++) {
      const int64_t row = row_of(sums, range, sums->keys[at]);
      int64_t last = at + 1;
      while (last < end && row_of(sums, range, sums->keys[last]) == row) last++;
      work->ids[to] = row;
      if (work->bytes > 0)
        sum_rows(sums, at, last, end, sum, work->gradients + to * work->bytes);
      at = last;
    }
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
  RowSums *sums = &work.sums;
  work.ids = static_cast<int64_t *>(call->outs[0]->data);
  work.gradients = static_cast<char *>(call->outs[1]->data);
  if (sums->items == 0) return 0;
  int64_t used = 0;
  if (sums->ranges > 0) {
    find_keys(sums, call->workspace);
    parallel(sums->threads, sort_ranges, &work);
    for (int64_t range = 0; range < sums->ranges; range++) {
      const int64_t here = sums->unique[range];
      sums->unique[range] = used, used += here;
    }
    sums->next = 0;
    about_to_write(work.gradients, sums->items * work.bytes);
    parallel(sums->threads, write_ranges, &work);
  }
  for (int64_t i = used; i < sums->items; i++) work.ids[i] = -1;
  if (work.bytes > 0)
    memset(work.gradients + used * work.bytes, 0,
           static_cast<size_t>((sums->items - used) * work.bytes));
  return 0;
}

}  // namespace

extern const transom_impl hashed_embedding_backward_rows = {
    sizeof(transom_impl), TRANSOM_TUNED, "hashed_embedding_backward_rows", "native",
    TRANSOM_HASHED_EMBEDDING_BACKWARD_ROWS_HASH, TRANSOM_DETERMINISTIC, 0, supports, workspace, run};

}  // namespace transom::TRANSOM_LEVEL
