/* Hash and gather in one: the rows of a token are hashed and asked for while those of tokens before
 * it are read, so that some tens of rows are on their way at any time.
 *
 * Bound by memory: a row is one to a few cache misses, wherever in the table it lies. The hash of a
 * token fits into the time of one of its rows. */
#pragma once

#include "_hash.h"
#include "_embedding_rows.h"

namespace transom::TRANSOM_LEVEL {
namespace {

/* Rows asked for before they are read: fewer leave the memory idle, more push each other out of the
 * core's buffers (measured with rows of 128 to 512 bytes on a Xeon with AVX-512). */
constexpr int64_t kAhead = 32;
constexpr int64_t kMostTokens = 128;

struct Lookup {
  Hash hash;
  Table table;
  int64_t tokens, ahead, block;
  int32_t threads;
  char *memory;         /* of the threads */
  int64_t thread_bytes; /* rows of ahead + 1 tokens, then `floats` */
  int64_t floats;
  int64_t next; /* block, by fetch-and-add */
};

/* `floats`: what a kernel wants for each thread, beside the rows. */
inline Lookup describe_lookup(const transom_call *call, HashArguments at, int table, int shard,
                              int64_t floats) {
  Lookup work = {};
  work.hash = describe_hash(call, at);
  work.table = describe_table(call, table, shard);
  work.tokens = work.hash.B * work.hash.S;
  const int64_t columns = work.hash.columns;
  work.ahead = columns > 0 ? (kAhead + columns - 1) / columns : 0;
  /* A row weighs as much as some 1,000 multiplications and four for each of its bytes. */
  const double rows = static_cast<double>(work.tokens) * static_cast<double>(columns);
  const double row = 1e3 + 4.0 * static_cast<double>(work.table.bytes);
  work.threads = threads_for(rows * row, call->threads);
  work.block = tokens_at_once(work.tokens, work.threads, kMostTokens);
  work.floats = up_to(floats, 16);
  work.thread_bytes = up_to((work.ahead + 1) * columns * 8, 64) + work.floats * 4;
  return work;
}

inline uint64_t lookup_workspace(Lookup work) {
  return static_cast<uint64_t>(lay_out_hash(&work.hash, nullptr) +
                               work.thread_bytes * work.threads);
}

inline void prepare_lookup(Lookup *work, void *workspace) {
  char *memory = static_cast<char *>(workspace);
  work->memory = memory + lay_out_hash(&work->hash, memory);
  fill_tables(&work->hash);
}

inline float *floats_of(const Lookup *work, int32_t thread) {
  char *own = work->memory + thread * work->thread_bytes;
  return reinterpret_cast<float *>(own + work->thread_bytes) - work->floats;
}

inline void find_rows(const Hash *hash, const Table *table, Place place, int64_t *rows) {
  hash_token(hash, place, rows);
  for (int64_t c = 0; c < hash->columns; c++) rows[c] = local_row(table, rows[c]);
}

/* Takes tokens until none is left: sink->token(place, table, rows, coming) with the row of each
 * column, -1 where the table has it not, and those of a token to come or NULL, which it asks for
 * between its own: asked for all at once they would wait for each other, and the memory afterwards
 * for more. */
template <class Sink>
inline void look_up(Lookup *shared, int32_t thread, Sink *sink) {
  const Hash hash = shared->hash;
  const Table table = shared->table;
  int64_t *ring = reinterpret_cast<int64_t *>(shared->memory + thread * shared->thread_bytes);
  const int64_t columns = hash.columns, ahead = shared->ahead, last = ahead * columns;
  for (;;) {
    const int64_t first = __atomic_fetch_add(&shared->next, 1, __ATOMIC_RELAXED) * shared->block;
    if (first >= shared->tokens) return;
    const int64_t end = min_of(first + shared->block, shared->tokens);
    Place here = place_of(&hash, first), coming = here;
    int64_t *read = ring, *write = ring;
    for (int64_t t = first - ahead; t < end; t++) {
      const int64_t *asked = nullptr;
      if (t + ahead < end) {
        find_rows(&hash, &table, coming, write);
        step(&hash, &coming);
        asked = write;
        write = write - ring == last ? ring : write + columns;
      }
      if (t < first) {
        for (int64_t c = 0; asked != nullptr && c < columns; c++) prefetch_row(&table, asked[c]);
        continue;
      }
      sink->token(here, &table, read, asked);
      step(&hash, &here);
      read = read - ring == last ? ring : read + columns;
    }
  }
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
