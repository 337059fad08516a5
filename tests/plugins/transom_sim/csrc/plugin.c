/* plugin.c: the table. */
#include <stdlib.h>

#include "device.h"

extern const transom_impl grouped_gemm_impl, grouped_gemm_backward_x_impl, grouped_gemm_backward_weight_impl,
    moe_experts_impl, lightning_indexer_impl, sparse_attention_impl,
    sparse_attention_backward_impl, ngram_hash_impl, hashed_embedding_impl;

static const transom_impl *const impls[] = {
    &grouped_gemm_impl,      &grouped_gemm_backward_x_impl,  &grouped_gemm_backward_weight_impl,
    &moe_experts_impl,       &lightning_indexer_impl, &sparse_attention_impl,
    &sparse_attention_backward_impl, &ngram_hash_impl, &hashed_embedding_impl};

static const transom_plugin plugin = {
    .struct_size = sizeof(transom_plugin),
    .abi_major = TRANSOM_ABI_MAJOR,
    .abi_minor = TRANSOM_ABI_MINOR,
    .vendor = "sim",
    .version = SIM_VERSION,
    .device_type = "sim",
    .n_impls = sizeof impls / sizeof *impls,
    .impls = impls,
    .services = &services,
};

const transom_plugin *transom_plugin_v1(const transom_host *host, transom_status *status) {
  if (fault_of(NULL) == FAULT_CRASH) abort();
  if (host->abi_major != TRANSOM_ABI_MAJOR) {
    say(status, TRANSOM_ERROR_UNSUPPORTED, "sim speaks ABI %d; this transom %d; install a newer sim",
        TRANSOM_ABI_MAJOR, host->abi_major);
    return NULL;
  }
  return &plugin;
}
