/* grouped_gemm: the rows of each expert times the weight of that expert (_grouped.h). */
#include "_grouped.h"

namespace transom::TRANSOM_LEVEL {
namespace {

Grouped describe(const transom_call *call) {
  return grouped_from(call, TRANSOM_GROUPED_GEMM_X, TRANSOM_GROUPED_GEMM_WEIGHT,
                      TRANSOM_GROUPED_GEMM_OFFSETS, false);
}

int32_t supports(const transom_call *call, transom_status *status) {
  return fits(call, TRANSOM_GROUPED_GEMM_X, "x", TRANSOM_GROUPED_GEMM_WEIGHT, "weight", status);
}

uint64_t workspace(const transom_call *call) { return grouped_workspace(describe(call)); }

int32_t run(const transom_call *call, transom_status *) { return run_grouped(describe(call)); }

}  // namespace

extern const transom_impl grouped_gemm = {
    sizeof(transom_impl), TRANSOM_TUNED, "grouped_gemm", "native", TRANSOM_GROUPED_GEMM_HASH,
    TRANSOM_DETERMINISTIC, 0, supports, workspace, run};

}  // namespace transom::TRANSOM_LEVEL
