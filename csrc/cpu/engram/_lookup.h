/* Hash and gather in one: the rows of a token are hashed and asked for while those of tokens before
 * it are read, so that some tens of rows are on their way at any time.
 *
 * It is bound by memory: a row is one to a few cache misses, wherever in the embedding it lies. The
 * hash of a token fits into the time of one of its rows. */
#pragma once

#include "_embedding_rows.h"
#include "_hash.h"

namespace transom::TRANSOM_LEVEL {
namespace {

/* Rows asked for before they are read: fewer leave the memory idle, more push each other out of the
 * core's buffers (measured with rows of 128 to 512 bytes on a Xeon with AVX-512). */
constexpr int64_t kAhead = 32;
constexpr int64_t kMostTokens = 128;

/* The workspace of a thread: rows of the tokens ahead and of the one that is read, and `floats`. */
struct LookupWorkspace {
  int64_t *rows;
  float *floats;
};

struct Lookup {
  Hash hash;
  Embedding embedding;
  int64_t tokens, ahead, block;
  int32_t threads;
  char *memory; /* of the threads */
  int64_t thread_bytes, floats;
};

inline LookupWorkspace lay_out_thread(const Lookup &work, Arena &arena) {
  LookupWorkspace own = {};
  own.rows = arena.take<int64_t>((work.ahead + 1) * work.hash.columns);
  own.floats = arena.take<float>(work.floats);
  return own;
}

/* Args: the arguments of an operator that looks up; `floats`: what its kernel wants for each thread,
 * beside the rows. */
template <class Args>
inline Lookup describe_lookup(const transom_call *call, int64_t floats) {
  Lookup work = {};
  work.hash = describe_hash<Args>(call);
  work.embedding = describe_embedding(call, Args::TABLE, Args::SHARD);
  work.tokens = work.hash.B * work.hash.S;
  const int64_t columns = work.hash.columns;
  work.ahead = columns > 0 ? (kAhead + columns - 1) / columns : 0;
  /* A row weighs as much as some 1,000 multiplications and four for each of its bytes. */
  const double rows = static_cast<double>(work.tokens) * static_cast<double>(columns);
  const double row = 1e3 + 4.0 * static_cast<double>(work.embedding.bytes);
  work.threads = threads_for(rows * row, call->threads);
  work.block = tokens_at_once(work.tokens, work.threads, kMostTokens);
  work.floats = floats;
  work.thread_bytes = bytes_of([&](Arena &arena) { lay_out_thread(work, arena); });
  return work;
}

inline void lay_out_lookup(Lookup *work, Arena &arena) {
  lay_out_hash(&work->hash, arena);
  work->memory = arena.take<char>(work->thread_bytes * work->threads);
}

inline uint64_t lookup_workspace(Lookup work) {
  Arena arena;
  lay_out_lookup(&work, arena);
  return arena.bytes();
}

inline void find_rows(const Hash *hash, const Embedding *embedding, Position position,
                      int64_t *rows) {
  hash_token(hash, position, rows);
  for (int64_t c = 0; c < hash->columns; c++) rows[c] = local_row(embedding, rows[c]);
}

/* On all threads, token by token: make_sink(own)->token(position, embedding, rows, coming) with the
 * row of each column, -1 where the embedding has it not, and those of a token to come or NULL, which
 * it asks for between its own: asked for all at once they would wait for each other, and the memory
 * afterwards for more. */
template <class MakeSink>
inline void look_up(Lookup *shared, void *workspace, MakeSink make_sink) {
  Arena arena(workspace);
  lay_out_lookup(shared, arena);
  prepare_hash(&shared->hash);
  Counter counter((shared->tokens + shared->block - 1) / shared->block);
  on_threads(shared->threads, [&](int32_t thread) {
    const Hash hash = shared->hash;
    const Embedding embedding = shared->embedding;
    Arena own_arena(shared->memory + thread * shared->thread_bytes);
    const LookupWorkspace own = lay_out_thread(*shared, own_arena);
    auto sink = make_sink(own);
    int64_t *const ring = own.rows;
    const int64_t columns = hash.columns, ahead = shared->ahead, last = ahead * columns;
    for (int64_t task; counter.take(&task);) {
      const int64_t first = task * shared->block;
      const int64_t end = min_of(first + shared->block, shared->tokens);
      Position here = position_of(&hash, first), coming = here;
      int64_t *read = ring, *write = ring;
      for (int64_t t = first - ahead; t < end; t++) {
        const int64_t *asked = nullptr;
        if (t + ahead < end) {
          find_rows(&hash, &embedding, coming, write);
          step(&hash, &coming);
          asked = write;
          write = write - ring == last ? ring : write + columns;
        }
        if (t < first) {
          for (int64_t c = 0; asked != nullptr && c < columns; c++)
            prefetch_row(&embedding, asked[c]);
          continue;
        }
        sink.token(here, &embedding, read, asked);
        step(&hash, &here);
        read = read - ring == last ? ring : read + columns;
      }
    }
    sink.end();
  });
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
