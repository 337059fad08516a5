/* ngram_hash: the row numbers of the n-grams that end at each token, see _hash.h.
 *
 * It is bound by arithmetic: some 10 operations on vectors of 8 columns, and some 10 on integers for
 * each token and each token before it. */
#include "_hash.h"

namespace transom::TRANSOM_LEVEL {

TRANSOM_KERNEL(ngram_hash, anything, workspace, run)

namespace {

constexpr int64_t kMostTokens = 1024;

uint64_t workspace(const transom_call *call) {
  Hash hash = describe_hash<Arguments>(call);
  Arena arena;
  lay_out_hash(&hash, arena);
  return arena.bytes();
}

int32_t run(const transom_call *call, transom_status *) {
  Hash shared = describe_hash<Arguments>(call);
  int32_t *rows = static_cast<int32_t *>(call->outs[0]->data);
  const int64_t tokens = shared.B * shared.S;
  if (tokens == 0 || shared.columns == 0) return 0;
  Arena arena(call->workspace);
  lay_out_hash(&shared, arena);
  prepare_hash(&shared);
  /* A row number takes as long as some 16 multiplications in vectors. */
  const int32_t threads =
      threads_for(16.0 * static_cast<double>(tokens * shared.columns), call->threads);
  const int64_t block = tokens_at_once(tokens, threads, kMostTokens);
  Counter counter((tokens + block - 1) / block);
  on_threads(threads, [&](int32_t) {
    /* A copy of its own: stores of row numbers could change what is read through a pointer. */
    const Hash hash = shared;
    for (int64_t task; counter.take(&task);) {
      const int64_t first = task * block, end = min_of(first + block, tokens);
      Position position = position_of(&hash, first);
      for (int64_t t = first; t < end; t++, step(&hash, &position))
        hash_token(&hash, position, rows + t * hash.columns);
    }
  });
  return 0;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
