/* hashed_embedding_out: hashed_embedding into the caller's tensor, of any float dtype and strides. */
#include "_gather.h"

namespace transom::TRANSOM_LEVEL {

TRANSOM_KERNEL(hashed_embedding_out, supports, workspace, run)

namespace {

Gather describe(const transom_call *call) {
  return describe_gather<Arguments>(call, tensor(call, ARG(OUT)));
}

int32_t supports(const transom_call *call, transom_status *status) {
  return embedding_fits(call, ARG(TABLE), status);
}

uint64_t workspace(const transom_call *call) { return lookup_workspace(describe(call).lookup); }

int32_t run(const transom_call *call, transom_status *) { return run_gather(describe(call), call); }

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
