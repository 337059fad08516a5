/* The smallest useful plugin: grouped_gemm in float32, one loop after the other.
 *
 *     cc -std=c11 -O2 -shared -fPIC -fvisibility=hidden -I<transom>/include toy.c -o libtoy.so
 *     python -c 'import transom; print(transom.CPlugin("./libtoy.so"))'
 *
 * The tests build it, and pretend with -D to be a vendor who made a mistake. */
#include "transom_ops.h"

#include <stdio.h>
#include <string.h>

#ifndef TOY_HASH
#define TOY_HASH TRANSOM_GROUPED_GEMM_HASH
#endif
#ifndef TOY_IMPL_SIZE
#define TOY_IMPL_SIZE sizeof(transom_impl)
#endif

static const transom_tensor *tensor(const transom_call *call, int at) {
  return call->args[at].tensor;
}

static int is_float32(const transom_tensor *t) {
  return t->dtype_code == TRANSOM_FLOAT && t->dtype_bits == 32;
}

static int32_t supports(const transom_call *call, transom_status *status) {
  if (call->args[TRANSOM_GROUPED_GEMM_WEIGHT_SPEC].tag == TRANSOM_VALUE_STRING) {
    snprintf(status->message, sizeof status->message, "weight is %s; supported: float32",
             call->args[TRANSOM_GROUPED_GEMM_WEIGHT_SPEC].string);
    return 0;
  }
  if (!is_float32(tensor(call, TRANSOM_GROUPED_GEMM_X)) ||
      !is_float32(tensor(call, TRANSOM_GROUPED_GEMM_WEIGHT))) {
    strcpy(status->message, "x or weight is not float32; supported: float32");
    return 0;
  }
  return 1;
}

static uint64_t workspace(const transom_call *call) {
  return (uint64_t)tensor(call, TRANSOM_GROUPED_GEMM_X)->shape[1] * sizeof(float);
}

static int64_t end_of(const transom_tensor *offsets, int64_t expert) {
  const char *at = (const char *)offsets->data;
  int64_t i = expert * offsets->strides[0];
  return offsets->dtype_bits == 32 ? ((const int32_t *)(const void *)at)[i]
                                   : ((const int64_t *)(const void *)at)[i];
}

static int32_t run(const transom_call *call, transom_status *status) {
  const transom_tensor *x = tensor(call, TRANSOM_GROUPED_GEMM_X);
  const transom_tensor *w = tensor(call, TRANSOM_GROUPED_GEMM_WEIGHT);
  const transom_tensor *offsets = tensor(call, TRANSOM_GROUPED_GEMM_OFFSETS);
  int64_t M = x->shape[0], K = x->shape[1], N = w->shape[1], E = w->shape[0], e = 0;
  float *y = (float *)call->outs[0]->data, *row = (float *)call->workspace;
  if (call->workspace_bytes < (uint64_t)K * sizeof(float)) {
    status->code = TRANSOM_ERROR_MEMORY;
    strcpy(status->message, "workspace is too small; expected one row of x");
    return 1;
  }
  for (int64_t m = 0; m < M; m++) {
    while (e < E && end_of(offsets, e) <= m) e++;
    for (int64_t k = 0; k < K && e < E; k++)
      row[k] = ((const float *)x->data)[m * x->strides[0] + k * x->strides[1]];
    for (int64_t n = 0; n < N; n++) {
      float sum = 0;
      for (int64_t k = 0; k < K && e < E; k++)
        sum += row[k] * ((const float *)w->data)[e * w->strides[0] + n * w->strides[1] +
                                                 k * w->strides[2]];
      y[m * N + n] = sum;
    }
  }
#ifdef TOY_OVERRUNS
  y[M * N] = 0;
#endif
#ifdef TOY_FAILS
  status->code = TOY_FAILS;
  strcpy(status->message, "the toy is broken; expected a whole one");
  return 1;
#else
  return 0;
#endif
}

/* By field name: what a later header appends is then zero. */
static const transom_impl gemm = {
    .struct_size = TOY_IMPL_SIZE,
    .tier = TRANSOM_TUNED,
    .op = "grouped_gemm",
    .name = "toy",
    .schema_hash = TOY_HASH,
    .flags = TRANSOM_DETERMINISTIC,
    .supports = supports,
    .workspace = workspace,
    .run = run,
};
static const transom_impl other = {
    .struct_size = sizeof(transom_impl),
    .tier = TRANSOM_PORTABLE,
    .op = "no_such_operator",
    .name = "toy",
    .schema_hash = 1,
    .run = run,
};
static const transom_impl *const impls[] = {&gemm, &other};
static const transom_plugin plugin = {
    .struct_size = sizeof(transom_plugin),
    .abi_major = TRANSOM_ABI_MAJOR,
    .abi_minor = TRANSOM_ABI_MINOR,
    .vendor = "toy",
    .version = "1.0",
    .device_type = "cpu",
    .n_impls = 2,
    .impls = impls,
};

const transom_plugin *transom_plugin_v1(const transom_host *host, transom_status *status) {
  if (host->abi_major != TRANSOM_ABI_MAJOR) {
    strcpy(status->message, "this transom speaks another ABI; expected 1");
    return 0;
  }
  return &plugin;
}
