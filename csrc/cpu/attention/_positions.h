/* Where the keys of a query stand: its list or all entries, then its window, in pieces of kKeys
 * places. Internal linkage, as in vector.h. */
#pragma once

#include "_attention_tile.h"

namespace transom::TRANSOM_LEVEL {
namespace {

struct Places {
  const transom_tensor *kv, *indices, *visible, *local, *valid;
  int64_t B, S, N, M, window;
  int64_t entry_pieces, pieces; /* of one query: of entries, with those of the window */
};

inline Places places_of(const transom_tensor *q, const transom_tensor *kv,
                        const transom_tensor *indices, const transom_tensor *visible,
                        const transom_tensor *local, const transom_tensor *valid,
                        int64_t window) {
  Places at = {kv, indices, visible, local, valid, q->shape[0], q->shape[1], kv->shape[1], 0, 0, 0,
               0};
  if (local != nullptr) at.M = local->shape[1];
  /* Pieces before the first token are left out, so that those that stay are cut where they were. */
  at.window = window - max_of(window - at.M, 0) / kKeys * kKeys;
  const int64_t named = indices == nullptr ? at.N : indices->shape[2];
  at.entry_pieces = at.N == 0 ? 0 : (named + kKeys - 1) / kKeys;
  at.pieces = at.entry_pieces + (at.window + kKeys - 1) / kKeys;
  return at;
}

/* Query s of batch b sees entries below this. */
inline int64_t bound_of(const Places *at, int64_t b, int64_t s) {
  const transom_tensor *v = at->visible;
  if (v == nullptr) return at->N;
  return min_of(at->N, integer(v, b * v->strides[0] + s * v->strides[1]));
}

/* The entries of a piece of a query's list that it sees. */
inline int64_t listed(const Places *at, int64_t b, int64_t s, int64_t piece, int64_t *list) {
  const transom_tensor *named = at->indices;
  const int64_t start = piece * kKeys, stop = min_of(start + kKeys, named->shape[2]);
  const int64_t row = b * named->strides[0] + s * named->strides[1];
  const int64_t bound = bound_of(at, b, s);
  int64_t count = 0;
  for (int64_t i = start; i < stop; i++) {
    const int64_t j = integer(named, row + i * named->strides[2]);
    if (j >= 0 && j < bound) list[count++] = j;
  }
  return count;
}

/* Places of piece `piece` of a window. */
inline int64_t window_length(const Places *at, int64_t piece) {
  return min_of(kKeys, at->window - piece * kKeys);
}

/* The tokens of piece `piece` of the windows of queries s .. s + queries, without padding; query
 * s + i sees rows before[i] .. before[i + window_length]. before[] has an entry more than the
 * queries - 1 + window_length places. */
inline int64_t near(const Places *at, int64_t b, int64_t s, int64_t queries, int64_t piece,
                    int64_t *list, int16_t *before) {
  const transom_tensor *valid = at->valid;
  const int64_t places = queries - 1 + window_length(at, piece);
  const int64_t base = at->M - at->S + s - at->window + 1 + piece * kKeys;
  int64_t count = 0;
  for (int64_t i = 0; i < places; i++) {
    before[i] = static_cast<int16_t>(count);
    const int64_t j = base + i;
    if (j < 0) continue;
    if (valid != nullptr &&
        static_cast<const uint8_t *>(
            valid->data)[b * valid->strides[0] + j * valid->strides[1]] == 0)
      continue;
    list[count++] = j;
  }
  before[places] = static_cast<int16_t>(count);
  return count;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
