/* Writes what a call says of itself into its first output; or, with SLOW, what its input held when
 * it began and what it holds later, with workspace in between, so that calls which share anything
 * spoil each other. */
#include "transom_ops.h"

#include <string.h>

#ifndef OP
#define OP "grouped_gemm"
#define HASH TRANSOM_GROUPED_GEMM_HASH
#endif

#ifndef WRITES
#define WRITES 0 /* the argument that an operator without outputs writes to */
#endif
#ifndef BYTES
#define BYTES 0
#endif

static int32_t run(const transom_call *call, transom_status *status) {
  float *y = (float *)(call->n_outs ? call->outs[0] : call->args[WRITES].tensor)->data;
#if defined(SLOW)
  const float *x = (const float *)call->args[0].tensor->data;
  float *kept = (float *)call->workspace;
  (void)status;
  if (call->workspace_bytes != BYTES || (uintptr_t)kept % 64) return 1;
  memset(kept, 0, BYTES);
  for (int i = 0; i < 8; i++) kept[i] = x[i];
  for (volatile int i = 0; i < 200000; i++) {
  }
  for (int m = 0; m < 6; m++)
    for (int n = 0; n < 5; n++) y[m * 5 + n] = (kept[n] + x[n]) / 2;
#elif defined(PLACES)
  const transom_value *weight = call->args + PLACES;
  (void)status;
  for (int i = 0; i < 4; i++) {
    const int whole = weight[i].tag == TRANSOM_VALUE_TENSOR;
    y[2 * i] = (float)(whole ? 100 * weight[i].tensor->dtype_code + weight[i].tensor->dtype_bits
                             : weight[i].tag);
    y[2 * i + 1] = (float)(whole ? weight[i].tensor->shape[2] : (int64_t)weight[i].count);
  }
#elif defined(FLOAT)
  (void)status;
  y[0] = (float)call->args[FLOAT].f;
#else
  y[0] = (float)call->flags;
  y[1] = (float)call->struct_size;
  y[2] = (float)call->threads;
  y[3] = (float)status->code;
  y[4] = (float)status->message[0];
  y[5] = call->packed == 0;
  y[6] = call->stream == 0;
  status->code = 7;
  strcpy(status->message, "never cleared");
#endif
  return 0;
}

static int32_t supports(const transom_call *call, transom_status *status) {
#ifdef FAST_ONLY
  if (call->flags & TRANSOM_CALL_DETERMINISTIC) {
    strcpy(status->message, "sums in any order; supported: without deterministic algorithms");
    return 0;
  }
#endif
  (void)call, (void)status;
  return 1;
}

static uint64_t workspace(const transom_call *call) {
  return call->args[0].tensor->data ? 0 : BYTES; /* the rule is that data is NULL */
}

static const transom_impl impl = {
    .struct_size = sizeof(transom_impl),
    .tier = TRANSOM_TUNED,
    .op = OP,
    .name = "tells",
    .schema_hash = HASH,
    .flags = TRANSOM_DETERMINISTIC,
    .supports = supports,
    .workspace = workspace,
    .run = run,
};
static const transom_impl *const impls[] = {&impl};
static const transom_plugin plugin = {
    .struct_size = sizeof(transom_plugin),
    .abi_major = TRANSOM_ABI_MAJOR,
    .abi_minor = TRANSOM_ABI_MINOR,
    .vendor = "tells",
    .version = "1",
    .device_type = "cpu",
    .n_impls = 1,
    .impls = impls,
};

const transom_plugin *transom_plugin_v1(const transom_host *host, transom_status *status) {
  (void)host, (void)status;
  return &plugin;
}
