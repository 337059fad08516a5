/* hashed_embedding: the rows that the n-grams of each token choose, side by side. */
#include "_gather.h"

namespace transom::TRANSOM_LEVEL {

TRANSOM_KERNEL(hashed_embedding, supports, workspace, run)

namespace {

Gather describe(const transom_call *call) {
  return describe_gather<Arguments>(call, call->outs[0]);
}

int32_t supports(const transom_call *call, transom_status *status) {
  return embedding_fits(call, ARG(TABLE), status);
}

uint64_t workspace(const transom_call *call) { return lookup_workspace(describe(call).lookup); }

int32_t run(const transom_call *call, transom_status *) { return run_gather(describe(call), call); }

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
