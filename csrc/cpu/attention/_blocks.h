/* Where the keys of a query stand that selects blocks of tokens: the tokens of its list in order,
 * in pieces of kKeys places. Internal linkage, as in vector.h. */
#pragma once

#include "_attention_tile.h"

namespace transom::TRANSOM_LEVEL {
namespace {

struct Blocks {
  const transom_tensor *k, *v, *indices;
  int64_t B, S, N, Hkv, G, D, Dv; /* G: query heads of a key head */
  int64_t lists, length, block_size, pieces;
  bool causal;
};

inline Blocks blocks_of(const transom_tensor *q, const transom_tensor *k, const transom_tensor *v,
                        const transom_tensor *indices, int64_t block_size, bool causal) {
  Blocks at = {};
  at.k = k, at.v = v, at.indices = indices;
  at.B = q->shape[0], at.S = q->shape[1], at.D = q->shape[3];
  at.N = k->shape[1], at.Hkv = k->shape[2], at.Dv = v->shape[3];
  at.G = q->shape[2] / at.Hkv;
  at.lists = indices->shape[1], at.length = indices->shape[3];
  /* Places of longer blocks than anybody uses end with the keys. */
  at.block_size = block_size <= 1 << 16 ? block_size : min_of(block_size, max_of(at.N, 1));
  at.pieces = at.N == 0 ? 0 : (at.length * at.block_size + kKeys - 1) / kKeys;
  at.causal = causal;
  return at;
}

/* Query s sees tokens below this. */
inline int64_t first_unseen(const Blocks *at, int64_t s) {
  return at->causal ? clamp(at->N - at->S + s + 1, 0, at->N) : at->N;
}

/* The tokens that query s sees of piece `piece` of its list for key head g. */
inline int64_t tokens(const Blocks *at, int64_t given_size, int64_t b, int64_t s, int64_t g,
                      int64_t piece, int64_t *list) {
  const transom_tensor *t = at->indices;
  const int64_t own = at->lists == at->S ? s : s / given_size;
  const int64_t row = b * t->strides[0] + own * t->strides[1] + g * t->strides[2];
  const int64_t size = at->block_size, blocks = (at->N + size - 1) / size;
  const int64_t stop = first_unseen(at, s);
  int64_t count = 0, place = piece * kKeys;
  const int64_t end = min_of(place + kKeys, at->length * size);
  while (place < end) {
    const int64_t slot = place / size, within = place % size;
    const int64_t here = min_of(size - within, end - place);
    const int64_t number = integer(t, row + slot * t->strides[3]);
    place += here;
    if (number < 0 || number >= blocks) continue;
    const int64_t first = number * size + within, last = min_of(first + here, stop);
    for (int64_t j = first; j < last; j++) list[count++] = j;
  }
  return count;
}

/* The keys and values of one key head as they lie in tiles, with the tokens that they are. */
struct Tiles {
  float *keys, *values;
  int64_t tokens[kKeys], count;
};

/* Tiles of these tokens of batch b; nothing is read if it is what they hold. */
inline void gather(const Blocks *at, int64_t b, int64_t g, const int64_t *list, int64_t count,
                   Tiles *tiles) {
  const size_t bytes = static_cast<size_t>(count) * sizeof(int64_t);
  if (tiles->count == count && memcmp(tiles->tokens, list, bytes) == 0) return;
  memcpy(tiles->tokens, list, bytes);
  tiles->count = count;
  const int64_t *k = at->k->strides, *v = at->v->strides;
  gather(at->k, b * k[0] + g * k[2], k[1], list, count, tiles->keys, tile_stride(at->D));
  gather(at->v, b * v[0] + g * v[2], v[1], list, count, tiles->values, tile_stride(at->Dv));
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
