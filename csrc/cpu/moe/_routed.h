/* The slots of a call's tokens sorted by expert, and the size of a call's temporaries. */
#pragma once

#include "_tasks.h"

namespace transom::TRANSOM_LEVEL {
namespace {

/* Some of the tokens, a batch. Rows are their used slots, expert by expert, in each by token and
 * slot. */
struct Routed {
  const transom_tensor *ids, *weights;
  int64_t E, K;
  int64_t first, count; /* tokens of the batch */
  int64_t rows;
  int64_t *ends;  /* by expert: where its rows end */
  int32_t *order; /* slot of a row, counted from the first token's */

  int64_t expert(int64_t slot) const {
    const int64_t id = integer(ids, (first + slot / K) * ids->strides[0] +
                                        slot % K * ids->strides[1]);
    return id >= 0 && id < E ? id : -1;
  }
  int64_t token(int64_t row) const { return order[row] / K; }
  float weight(int64_t row) const {
    const int64_t slot = order[row];
    return number(weights, (first + slot / K) * weights->strides[0] +
                               slot % K * weights->strides[1]);
  }
};

/* Fills ends, order and rows for `count` tokens from `first` on. */
inline void sort(Routed *routed) {
  memset(routed->ends, 0, static_cast<size_t>(routed->E) * sizeof(int64_t));
  const int64_t slots = routed->count * routed->K;
  for (int64_t slot = 0; slot < slots; slot++)
    if (const int64_t e = routed->expert(slot); e >= 0) routed->ends[e]++;
  int64_t total = 0;
  for (int64_t e = 0; e < routed->E; e++) {
    const int64_t rows = routed->ends[e];
    routed->ends[e] = total;
    total += rows;
  }
  for (int64_t slot = 0; slot < slots; slot++)
    if (const int64_t e = routed->expert(slot); e >= 0)
      routed->order[routed->ends[e]++] = static_cast<int32_t>(slot);
  routed->rows = total;
}

/* Where a part of the rows ends that begins at `from`: at the end of an expert if one comes within
 * `most` rows. */
inline int64_t part_end(const Routed &routed, int64_t from, int64_t most) {
  int64_t end = from;
  for (int64_t e = 0; e < routed.E && routed.ends[e] <= from + most; e++)
    end = max_of(end, routed.ends[e]);
  if (end > from || routed.rows == 0) return end;
  return from + (most > kMostRows ? most / kMostRows * kMostRows : most);
}

/* Bytes for what grows with the tokens, beside what each thread needs; of a host that says nothing,
 * 64 MiB. */
inline int64_t workspace_budget(const transom_call *call) {
  const bool said = TRANSOM_HAS(call, transom_call, workspace_limit) && call->workspace_limit != 0;
  const int64_t limit = said ? static_cast<int64_t>(call->workspace_limit) : 64 << 20;
  return clamp(limit, 0, int64_t{1} << 40);
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
