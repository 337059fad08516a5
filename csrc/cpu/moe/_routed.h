/* The slots of a call's tokens sorted by expert, and the size of a call's temporaries. Internal
 * linkage, as in vector.h. */
#pragma once

#include <stdlib.h>

#include "_tasks.h"

namespace transom::TRANSOM_LEVEL {
namespace {

/* A piece of the tokens. Rows are its used slots, expert by expert, in each by token and slot. */
struct Routed {
  const transom_tensor *ids, *weights;
  int64_t E, K;
  int64_t first, count; /* tokens of the piece */
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

/* Hands out the parts of the workspace; without one only counts. */
struct Parts {
  char *base;
  int64_t bytes = 0;
  template <class T>
  T *take(int64_t count) {
    char *start = base == nullptr ? nullptr : base + bytes;
    bytes += up_to(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T *>(start);
  }
};

/* Bytes for what grows with the tokens, beside what each thread needs; of a host that says nothing,
 * 64 MiB. */
inline int64_t workspace_budget(const transom_call *call) {
  const bool said = TRANSOM_HAS(call, transom_call, workspace_limit) && call->workspace_limit != 0;
  const int64_t limit = said ? static_cast<int64_t>(call->workspace_limit) : 64 << 20;
  return clamp(limit, 0, int64_t{1} << 40);
}

/* False, with the reason, if the workspace is not what the call asked for. */
inline bool holds(const transom_call *call, int64_t bytes, transom_status *status) {
  if (static_cast<uint64_t>(bytes) <= call->workspace_bytes) return true;
  status->code = TRANSOM_ERROR_MEMORY;
  snprintf(status->message, sizeof status->message,
           "the workspace is smaller than what was asked for; expected TRANSOM_WORKSPACE_MB to "
           "stay during a call");
  return false;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
