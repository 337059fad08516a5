/* grouped_gemm_dx: the rows of each expert times the transpose of its weight, read as it is stored
 * (_grouped.h). */
#include "_grouped.h"

namespace transom::TRANSOM_LEVEL {
namespace {

Grouped describe(const transom_call *call) {
  return grouped_from(call, TRANSOM_GROUPED_GEMM_DX_DY, TRANSOM_GROUPED_GEMM_DX_WEIGHT,
                      TRANSOM_GROUPED_GEMM_DX_OFFSETS, true);
}

int32_t supports(const transom_call *call, transom_status *status) {
  return fits(call, TRANSOM_GROUPED_GEMM_DX_DY, "dy", TRANSOM_GROUPED_GEMM_DX_WEIGHT, "weight",
              status);
}

uint64_t workspace(const transom_call *call) { return grouped_workspace(describe(call)); }

int32_t run(const transom_call *call, transom_status *) { return run_grouped(describe(call)); }

}  // namespace

extern const transom_impl grouped_gemm_dx = {
    sizeof(transom_impl), TRANSOM_TUNED, "grouped_gemm_dx", "native",
    TRANSOM_GROUPED_GEMM_DX_HASH, TRANSOM_DETERMINISTIC, 0, supports, workspace, run};

}  // namespace transom::TRANSOM_LEVEL
