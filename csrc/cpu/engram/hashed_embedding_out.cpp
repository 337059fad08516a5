/* hashed_embedding_out: hashed_embedding into the caller's tensor, of any float dtype and strides. */
#include "_gather.h"

namespace transom::TRANSOM_LEVEL {
namespace {

#define ARGUMENT(name) TRANSOM_HASHED_EMBEDDING_OUT_##name

Gather describe(const transom_call *call) {
  return describe_gather(call, HASH_ARGUMENTS, ARGUMENT(TABLE), ARGUMENT(SHARD),
                         tensor(call, ARGUMENT(OUT)));
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

extern const transom_impl hashed_embedding_out = {
    sizeof(transom_impl), TRANSOM_TUNED, "hashed_embedding_out", "native",
    TRANSOM_HASHED_EMBEDDING_OUT_HASH, TRANSOM_DETERMINISTIC, 0, supports, workspace, run};

}  // namespace transom::TRANSOM_LEVEL
