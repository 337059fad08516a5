/* grouped_gemm: the rows of each expert times the weight of that expert (_grouped.h). */
#include "_grouped.h"

namespace transom::TRANSOM_LEVEL {

TRANSOM_KERNEL(grouped_gemm, supports, workspace, run)

namespace {

Grouped describe(const transom_call *call) {
  return grouped_from(call, ARG(X), ARG(WEIGHT), ARG(OFFSETS), false);
}

int32_t supports(const transom_call *call, transom_status *status) {
  return readable(tensor(call, ARG(X)), "x", status) &&
         weight_fits(call, ARG(WEIGHT), "weight", status);
}

uint64_t workspace(const transom_call *call) { return grouped_workspace(describe(call)); }

int32_t run(const transom_call *call, transom_status *) { return run_grouped(describe(call)); }

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
