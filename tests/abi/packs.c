/* A plugin with services: a packed weight that is the weight's first element twice, and a device
 * whose memory is the host's. A call writes what form it was given, or -1, and how many were made. */
#include "transom_ops.h"

#include <stdlib.h>
#include <string.h>

static int made = 0;

static int32_t run(const transom_call *call, transom_status *status) {
  const transom_tensor *out = call->outs[0];
  const float *form = NULL;
  float *y = (float *)out->data;
  (void)status;
  if (TRANSOM_HAS(call, transom_call, packed) && call->packed)
    form = (const float *)call->packed[TRANSOM_GROUPED_GEMM_WEIGHT];
  for (int64_t i = 0; i < out->shape[0] * out->shape[1]; i++) y[i] = 0;
  y[0] = form ? form[0] + form[1] : -1;
  y[1] = (float)made;
  return 0;
}

static uint64_t packed_bytes(const transom_impl *impl, uint32_t at, const transom_value *weight) {
  const transom_tensor *values = weight[0].tensor;
  if (strcmp(impl->op, "grouped_gemm") || at != TRANSOM_GROUPED_GEMM_WEIGHT || values->data) abort();
  return values->shape[0] > 1 ? 2 * sizeof(float) : 0;
}

static int32_t pack(const transom_impl *impl, uint32_t at, const transom_value *weight,
                    void *packed, void *stream, transom_status *status) {
  (void)impl, (void)at, (void)stream;
  if (weight[3].tag == TRANSOM_VALUE_STRING) {
    const float *scales = (const float *)weight[1].tensor->data;
    for (int i = 0; i < 2; i++) ((float *)packed)[i] = scales[0];
  } else {
    for (int i = 0; i < 2; i++) ((float *)packed)[i] = *(const float *)weight[0].tensor->data;
  }
  made++;
#ifdef PACK_FAILS
  strcpy(status->message, "cannot pack this");
  return 2;
#else
  (void)status;
  return (uintptr_t)packed % 64 != 0;
#endif
}

static void *allocate(int32_t device, uint64_t bytes, transom_status *status) {
  if (device == 0 && bytes < 1 << 20) return aligned_alloc(64, (bytes + 63) / 64 * 64);
  strcpy(status->message, "device 0 has 1 MiB");
  return NULL;
}

static int32_t release(int32_t device, void *address, transom_status *status) {
  (void)device, (void)status;
  free(address);
  return 0;
}

static int32_t copy(int32_t device, void *to, const void *from, uint64_t bytes, int32_t direction,
                    void *stream, transom_status *status) {
  (void)device, (void)stream;
  if (direction == TRANSOM_WITHIN_DEVICE) {
    strcpy(status->message, "direction is 3; supported: 1 and 2");
    return TRANSOM_ERROR_DEVICE;
  }
  memcpy(to, from, bytes);
  return 0;
}

static void *stream(int32_t device) { return (void *)(uintptr_t)(40 + device); }

static const transom_services services = {
    .struct_size = sizeof(transom_services),
    .allocate = allocate,
    .release = release,
    .copy = copy,
    .stream = stream,
    .packed_bytes = packed_bytes,
    .pack = pack,
};
static const transom_impl impl = {
    .struct_size = sizeof(transom_impl),
    .tier = TRANSOM_TUNED,
    .op = "grouped_gemm",
    .name = "packs",
    .schema_hash = TRANSOM_GROUPED_GEMM_HASH,
    .flags = TRANSOM_DETERMINISTIC,
    .run = run,
};
static const transom_impl *const impls[] = {&impl};
static const transom_plugin plugin = {
    .struct_size = sizeof(transom_plugin),
    .abi_major = TRANSOM_ABI_MAJOR,
    .abi_minor = TRANSOM_ABI_MINOR,
    .vendor = "packs",
    .version = "1",
    .device_type = "cpu",
    .n_impls = 1,
    .impls = impls,
    .services = &services,
};

const transom_plugin *transom_plugin_v1(const transom_host *host, transom_status *status) {
  (void)host, (void)status;
  return &plugin;
}
