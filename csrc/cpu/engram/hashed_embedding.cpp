/* hashed_embedding: the rows that the n-grams of each token choose, side by side. */
#include "_gather.h"

namespace transom::TRANSOM_LEVEL {
namespace {

#define ARGUMENT(name) TRANSOM_HASHED_EMBEDDING_##name

Gather describe(const transom_call *call) {
  return describe_gather(call, HASH_ARGUMENTS, ARGUMENT(TABLE), ARGUMENT(SHARD), call->outs[0]);
}

int32_t supports(const transom_call *call, transom_status *status) {
  return table_fits(call, ARGUMENT(TABLE), status);
}

uint64_t workspace(const transom_call *call) { return lookup_workspace(describe(call).lookup); }

int32_t run(const transom_call *call, transom_status *) {
  Gather work = describe(call);
  return run_gather(&work, call);
}

}  // namespace

extern const transom_impl hashed_embedding = {
    sizeof(transom_impl), TRANSOM_TUNED, "hashed_embedding", "native",
    TRANSOM_HASHED_EMBEDDING_HASH, TRANSOM_DETERMINISTIC, 0, supports, workspace, run};

}  // namespace transom::TRANSOM_LEVEL
