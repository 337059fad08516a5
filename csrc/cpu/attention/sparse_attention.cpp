/* sparse_attention: attention over entries of numbers (_sparse_attention.h). */
#include "_sparse_attention.h"

namespace transom::TRANSOM_LEVEL {

extern const transom_impl sparse_attention = {
    sizeof(transom_impl), TRANSOM_TUNED, "sparse_attention", "native",
    TRANSOM_SPARSE_ATTENTION_HASH, TRANSOM_DETERMINISTIC, 0, supports, workspace, run};

}  // namespace transom::TRANSOM_LEVEL
