/* ngram_hash: the row numbers of the n-grams that end at each token, see _hash.h.
 *
 * Bound by arithmetic: some 10 operations on vectors of 8 columns, and some 10 on integers for each
 * token and place. */
#include "_hash.h"

namespace transom::TRANSOM_LEVEL {
namespace {

#define ARGUMENT(name) TRANSOM_NGRAM_HASH_##name

constexpr int64_t kMostTokens = 1024;

struct Work {
  Hash hash;
  int32_t *rows;
  int64_t tokens, block;
  int64_t next; /* block, by fetch-and-add */
};

void blocks(void *context, int32_t) {
  Work *work = static_cast<Work *>(context);
  /* A copy of its own: stores of row numbers could change what is read through a pointer. */
  const Hash hash = work->hash;
  for (;;) {
    const int64_t first = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED) * work->block;
    if (first >= work->tokens) return;
    const int64_t end = min_of(first + work->block, work->tokens);
    Place place = place_of(&hash, first);
    for (int64_t t = first; t < end; t++, step(&hash, &place))
      hash_token(&hash, place, work->rows + t * hash.columns);
  }
}

uint64_t workspace(const transom_call *call) {
  Hash hash = describe_hash(call, HASH_ARGUMENTS);
  return static_cast<uint64_t>(lay_out_hash(&hash, nullptr));
}

int32_t run(const transom_call *call, transom_status *) {
  Work work = {};
  work.hash = describe_hash(call, HASH_ARGUMENTS);
  work.rows = static_cast<int32_t *>(call->outs[0]->data);
  work.tokens = work.hash.B * work.hash.S;
  if (work.tokens == 0 || work.hash.columns == 0) return 0;
  lay_out_hash(&work.hash, static_cast<char *>(call->workspace));
  fill_tables(&work.hash);
  /* A row number takes as long as some 16 multiplications in vectors. */
  const int32_t threads =
      threads_for(16.0 * static_cast<double>(work.tokens * work.hash.columns), call->threads);
  work.block = tokens_at_once(work.tokens, threads, kMostTokens);
  parallel(threads, blocks, &work);
  return 0;
}

}  // namespace

extern const transom_impl ngram_hash = {
    sizeof(transom_impl), TRANSOM_TUNED, "ngram_hash", "native", TRANSOM_NGRAM_HASH_HASH,
    TRANSOM_DETERMINISTIC, 0, nullptr, workspace, run};

}  // namespace transom::TRANSOM_LEVEL
