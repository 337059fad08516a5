/* sparse_attention_rows: attention over entries of packed rows, decoded as they are gathered
 * (_sparse_attention.h). */
#include "_sparse_attention.h"

namespace transom::TRANSOM_LEVEL {

extern const transom_impl sparse_attention_rows = {
    sizeof(transom_impl), TRANSOM_TUNED, "sparse_attention_rows", "native",
    TRANSOM_SPARSE_ATTENTION_ROWS_HASH, TRANSOM_DETERMINISTIC, 0, supports, workspace, run};

}  // namespace transom::TRANSOM_LEVEL
