/* The plugin's services: weights in panels (packed.h), for the products with a weight as it is. */
#include "../weights/weight.h"

namespace transom::TRANSOM_LEVEL {
namespace {

uint64_t packed_bytes(const transom_impl *impl, uint32_t, const transom_value *weight) {
  const bool wanted =
      strcmp(impl->op, "moe_experts") == 0 || strcmp(impl->op, "grouped_gemm") == 0;
  return wanted ? panels_bytes(weight) : 0;
}

int32_t pack(const transom_impl *, uint32_t, const transom_value *weight, void *packed, void *,
             transom_status *) {
  write_panels(weight, packed);
  return 0;
}

}  // namespace

extern const transom_services services = {
    sizeof(transom_services), 0, nullptr, nullptr, nullptr, nullptr, nullptr, packed_bytes, pack};

}  // namespace transom::TRANSOM_LEVEL
