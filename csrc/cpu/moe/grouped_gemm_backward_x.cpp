/* grouped_gemm_backward_x: the rows of each expert times the transpose of its weight, read as it is stored
 * (_grouped.h). */
#include "_grouped.h"

namespace transom::TRANSOM_LEVEL {

TRANSOM_KERNEL(grouped_gemm_backward_x, supports, workspace, run)

namespace {

Grouped describe(const transom_call *call) {
  return grouped_from(call, ARG(DY), ARG(WEIGHT), ARG(OFFSETS), true);
}

int32_t supports(const transom_call *call, transom_status *status) {
  return readable(tensor(call, ARG(DY)), "dy", status) &&
         weight_fits(call, ARG(WEIGHT), "weight", status);
}

uint64_t workspace(const transom_call *call) { return grouped_workspace(describe(call)); }

int32_t run(const transom_call *call, transom_status *) { return run_grouped(describe(call)); }

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
